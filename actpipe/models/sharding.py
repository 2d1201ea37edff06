"""Which activations a model that is split over processes (tensor parallelism) shows whole in each of them.

transformers' plans cut matrices: the queries, keys, values, patterns and neurons of one process are those of its
heads and neurons alone, while what enters the residual stream is summed over all. Hooks see what their own process has.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from actpipe.errors import ModelLoadError
from actpipe.hooks import HookPoint
from actpipe.models.hooked_model import HookedModel
from actpipe.models.identities import probe_ids

IN_PIECES = "each process has a piece of it only"
_TOLERANCE = 1e-2
"""Largest difference between processes that is rounding, as a share of the largest value; that of pieces is about 1."""


def split_over_processes(skeleton: PreTrainedModel) -> dict[str, Any]:
    """Return what `from_pretrained` is given so that the processes of `torchrun` share one model.

    Raises:
        ModelLoadError: There are no such processes, or transformers has no plan for this architecture.
    """
    from transformers.distributed import DistributedConfig

    n_processes = int(os.environ.get("WORLD_SIZE", "1"))
    if n_processes < 2:
        raise ModelLoadError(
            "tensor_parallel splits a model over processes, and this one is alone; start the script with "
            "`torchrun --nproc-per-node N`, or spread the model with `device_map: auto`"
        )
    if not skeleton.supports_tp_plan:
        raise ModelLoadError(
            f"transformers has no plan for splitting {type(skeleton).__name__}; spread it with `device_map: auto`"
        )
    config = skeleton.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    if heads % n_processes:
        raise ModelLoadError(
            f"{heads} heads of keys and values cannot be split over {n_processes} processes; take a divisor of {heads}"
        )
    return {"distributed_config": DistributedConfig(tp_size=n_processes)}


def kinds_in_pieces(model: HookedModel) -> dict[str, str]:
    """Return the kinds of hook points that are not whole in each process, found by running all of them once.

    A kind is whole where its shape is that of the whole model and all processes have the same values.
    """
    ids = probe_ids(model).to(model.device)
    return {point.kind: IN_PIECES for point in _first_of_each_kind(model) if not _is_whole(model, point, ids)}


def _first_of_each_kind(model: HookedModel) -> Iterator[HookPoint]:
    """Yield a point of each kind for each form of block, so that few forward passes are needed."""
    seen = set()
    for point in model.hook_points.values():
        form = (point.kind, None if point.layer is None else model.shape.blocks[point.layer])
        if form not in seen:
            seen.add(form)
            yield point


def _is_whole(model: HookedModel, point: HookPoint, ids: torch.Tensor) -> bool:
    taken: list[torch.Tensor] = []
    try:
        with model.capture([point.name], lambda _, tensor: taken.append(tensor.clone()), stop=True) as capture:
            capture.run(input_ids=ids)
    except Exception:  # noqa: BLE001 - reads that expect whole tensors fail in many ways on pieces
        return False
    (found,) = taken
    wanted = (*ids.shape, *point.row_shape(model.shape, ids.shape[1]))
    if type(found) is not torch.Tensor or tuple(found.shape) != wanted:
        return False
    others = [torch.empty_like(found) for _ in range(dist.get_world_size())]
    dist.all_gather(others, found.contiguous())
    return all(_are_same(other.float(), found.float()) for other in others)


def _are_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    size = other[other.isfinite()].abs().max().item() if bool(other.isfinite().any()) else 0.0
    return torch.allclose(one, other, rtol=0.0, atol=_TOLERANCE * size, equal_nan=True)

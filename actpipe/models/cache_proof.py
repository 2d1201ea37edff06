"""Prove that a model computes the same with a cache of keys and values as without."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from actpipe.devices import ran_out_of_memory
from actpipe.errors import UnsupportedModelError
from actpipe.models.caching import KeyValueCache
from actpipe.models.hooked_model import HookedModel
from actpipe.models.identities import difference, probe_ids, rounding

_PIECES = (7, 5, 1)
"""Lengths of the passes with a cache; the last takes what is left."""


def prove_cache(model: HookedModel, names: Iterable[str] = (), ids: torch.Tensor | None = None) -> None:
    """Compare activations of one pass with those of several that follow one another.

    Args:
        model: A decoder.
        names: Hook points to compare besides the stream that leaves the last block.
        ids: `(batch, position)` token ids; by default some spread over the vocabulary.

    Raises:
        UnsupportedModelError: They differ by more than rounding, or the model does not take a cache.
    """
    cache = KeyValueCache(model.anatomy)
    ids = probe_ids(model) if ids is None else ids
    last = f"blocks.{model.shape.n_layers - 1}.hook_resid_post"
    wanted = [*dict.fromkeys([last, *names])]
    whole = model.run_with_cache(ids, names=wanted)[1]
    try:
        pieces = _in_pieces(model, cache, ids, wanted)
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError) as error:
        if ran_out_of_memory(error):
            raise
        raise UnsupportedModelError(
            f"this {model.anatomy.family.name} model does not run with a cache of keys and values: {error}"
        ) from error
    for name, values in whole.items():
        off_by = _difference(model, values, pieces[name])
        if not off_by <= rounding(model):
            raise UnsupportedModelError(
                f"{name} of this {model.anatomy.family.name} model is not the same with a cache of keys and values: "
                f"off by {off_by:.1e} of its size; leave out `prefix` and `chunk_tokens`, "
                "and use_past_kv_cache=False to generate"
            )


def _in_pieces(
    model: HookedModel, cache: KeyValueCache, ids: torch.Tensor, names: list[str]
) -> dict[str, torch.Tensor]:
    caught: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    rest = ids.shape[1] - sum(_PIECES)
    for piece in torch.split(ids, [*_PIECES, rest] if rest > 0 else [ids.shape[1] - 1, 1], dim=1):
        for name, values in model.run_with_cache(piece, names=names, past_kv_cache=cache)[1].items():
            caught[name].append(_padded(model, name, values, ids.shape[1]))
    axis = {name: 2 if model.hook_points[name].looks_at_keys else 1 for name in names}
    return {name: torch.cat(pieces, dim=axis[name]) for name, pieces in caught.items()}


def _padded(model: HookedModel, name: str, values: torch.Tensor, n_keys: int) -> torch.Tensor:
    """Return scores and patterns with all key positions, those to come being masked."""
    if not model.hook_points[name].looks_at_keys:
        return values
    masked = -torch.inf if name.endswith("scores") else 0.0
    return torch.nn.functional.pad(values, (0, n_keys - values.shape[-1]), value=masked)


def _difference(model: HookedModel, whole: torch.Tensor, pieces: torch.Tensor) -> float:
    """Return the largest relative difference.

    In half precision, where rounding may send a token to another expert, that of the typical token.
    """
    if model.dtype not in (torch.float16, torch.bfloat16) or whole.shape != pieces.shape or whole.ndim != 3:
        return difference(whole, pieces)
    per_token = (whole.float() - pieces.float()).abs().amax(-1)
    return float(per_token.median() / whole.float().abs().max())

"""The logit lens over a whole store: one block of rows, and one slice of the vocabulary's rows, at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from actpipe.compute.attribution import next_tokens
from actpipe.compute.grouping import GroupSums, sum_by_group
from actpipe.compute.lens import LENS_METRICS, AffineSums, FinalNorm, fit_affine, lens_metrics, sum_affine
from actpipe.errors import IncompleteStoreError, RecipeError
from actpipe.jobs.attribution_targets import SCALE
from actpipe.jobs.blocks import Done, RowBlock, even_blocks, map_and_sum, require_arrays
from actpipe.stores.reading import ActivationStore

LOGITS_AT_ONCE = 2**23
"""Most logits of one layer computed together: 32 MiB of float32, whatever the vocabulary."""
TRANSLATORS = "translators.safetensors"
"""Name of the file of fitted translators."""
_TOKENS = ["tokens/input_ids", "tokens/sequence", "tokens/position"]

Translators = Mapping[str, tuple[torch.Tensor, torch.Tensor]]
"""`W` and `b` by the label of the stream that they are applied to."""
ChooseRows = Callable[[RowBlock], npt.NDArray[np.bool_]]


@dataclass(frozen=True)
class Lens:
    """From a residual stream to logits."""

    norm: FinalNorm
    unembed: Callable[[torch.Tensor], torch.Tensor]
    """From normalized rows to logits, soft cap and scaling included."""
    device: torch.device
    """Where both of them are."""
    final_scale: bool = False
    """Whether streams are divided by the scale of the last one in place of their own."""


def lens_streams(names: Mapping[str, object] | set[str], n_layers: int) -> dict[str, str]:
    """Return the residual streams among some names, by TransformerLens' label, in order.

    The stream that enters a block is stored as its `hook_resid_pre` or as `hook_resid_post` of the block before.

    Raises:
        IncompleteStoreError: The last stream is not there.
    """
    streams = dict[str, str]()
    for layer in range(n_layers):
        for name in (f"blocks.{layer}.hook_resid_pre", f"blocks.{layer - 1}.hook_resid_post"):
            if name in names:
                streams.setdefault(f"{layer}_pre", name)
    last = f"blocks.{n_layers - 1}.hook_resid_post"
    if last not in names:
        raise IncompleteStoreError(f"the logit lens compares with the last layer, so {last} must be stored too")
    return {**streams, "final_post": last}


def look_through_lens(
    store: ActivationStore,
    lens: Lens,
    *,
    block_bytes: int,
    translators: Translators | None = None,
    choose: ChooseRows | None = None,
    done: Done = lambda _: None,
) -> tuple[GroupSums, list[str]]:
    """Sum `LENS_METRICS` of every stored residual stream by position.

    Args:
        store: The activations.
        lens: The final norm and the unembedding.
        block_bytes: Memory of one block, in bytes.
        translators: Maps applied to streams before the norm.
        choose: Which rows of a block count; by default all.
        done: Called with 1 after each block.

    Returns:
        Sums by position, one column per stream and metric, metrics running faster; and the streams' labels.
    """
    streams = lens_streams(set(store.hook_names), store.shape.n_layers)
    names = [*streams.values(), *([SCALE] if lens.final_scale else [])]
    require_arrays(store, names, "logit_lens")
    store.require_every_token("logit_lens")

    rows_at_once = max(1, LOGITS_AT_ONCE // store.shape.d_vocab)

    def look(block: RowBlock) -> GroupSums:
        ids = block.read_integers("tokens/input_ids", beyond=1)
        targets = next_tokens(ids, block.read_integers("tokens/sequence", beyond=1), block.n_rows)
        wanted = np.arange(block.n_rows) if choose is None else np.flatnonzero(choose(block))
        read = {label: torch.from_numpy(block.read(name)[wanted]) for label, name in streams.items()}
        scale = torch.from_numpy(block.read(SCALE)[wanted]) if lens.final_scale else None
        values = _look_at(read, lens, torch.from_numpy(targets[wanted]), scale, translators or {}, rows_at_once)
        return sum_by_group(values, block.read_integers("tokens/position")[wanted])

    blocks = even_blocks(store, [*names, *names, *_TOKENS], block_bytes)
    return map_and_sum(look, blocks, done), list(streams)


def _look_at(
    streams: dict[str, torch.Tensor],
    lens: Lens,
    targets: torch.Tensor,
    scale: torch.Tensor | None,
    translators: Translators,
    rows_at_once: int,
) -> npt.NDArray[np.float32]:
    """Return `(row, stream and metric)`, a few rows of the vocabulary's width at a time."""
    n_metrics = len(LENS_METRICS)
    values = torch.empty(len(targets), n_metrics * len(streams))

    def there(rows: torch.Tensor) -> torch.Tensor:
        return rows.to(lens.device)

    with torch.inference_mode():
        for rows in torch.split(torch.arange(len(targets)), rows_at_once):
            divisor = None if scale is None else there(scale[rows])
            final = lens.unembed(lens.norm(there(streams["final_post"][rows]))).float().log_softmax(-1)
            for number, (label, stream) in enumerate(streams.items()):
                wanted = there(stream[rows])
                if label in translators:
                    weight, bias = map(there, translators[label])
                    wanted = wanted @ weight + bias
                logits = lens.unembed(lens.norm(wanted, divisor)).float()
                columns = slice(n_metrics * number, n_metrics * (number + 1))
                values[rows, columns] = lens_metrics(logits, final, there(targets[rows])).cpu()
    return values.numpy()


def fit_translators(
    store: ActivationStore, *, block_bytes: int, ridge: float, choose: ChooseRows, done: Done = lambda _: None
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Fit an affine map from each residual stream to the last one on the rows that are chosen.

    Returns:
        `W (d_model, d_model)` and `b (d_model,)` by label, in float32, for rows from the left: `x W + b`.

    Raises:
        IncompleteStoreError: Fewer than two rows are chosen.
    """
    streams = lens_streams(set(store.hook_names), store.shape.n_layers)
    *sources, target = streams.values()
    require_arrays(store, streams.values(), "logit_lens")

    def summed(block: RowBlock) -> AffineSums:
        wanted = choose(block)
        return sum_affine(np.stack([block.read(name)[wanted] for name in sources]), block.read(target)[wanted])

    sums = map_and_sum(summed, even_blocks(store, [*streams.values()] * 4, block_bytes), done)
    if sums.n_rows < 2:
        raise IncompleteStoreError(
            "no documents are left to fit translators on; take a smaller validation_fraction, or more documents"
        )
    maps, biases = fit_affine(sums, ridge)
    return {
        label: (torch.from_numpy(maps[number]).float(), torch.from_numpy(biases[number]).float())
        for number, label in enumerate(list(streams)[:-1])
    }


def translator_bytes(translators: Translators) -> bytes:
    """Return a file that `read_translators` reads."""
    pairs = ((label, zip(("weight", "bias"), pair, strict=True)) for label, pair in translators.items())
    return save({f"{label}.{name}": tensor.contiguous() for label, pair in pairs for name, tensor in pair})


def read_translators(path: Path, labels: Iterable[str], d_model: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Read the translators of some streams from a safetensors file; a stream without one stays as it is.

    Raises:
        RecipeError: The file cannot be read, has none of them, or has one of another size; says what it needs.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise RecipeError(f"logit_lens: cannot read {path} as a safetensors file: {error}") from error
    found = {}
    for label in labels:
        weight, bias = tensors.get(f"{label}.weight"), tensors.get(f"{label}.bias")
        if weight is None or bias is None:
            continue
        if weight.shape != (d_model, d_model) or bias.shape != (d_model,):
            raise RecipeError(
                f"logit_lens: {label} of {path} is {tuple(weight.shape)} and {tuple(bias.shape)}, and the model's "
                f"residual stream has {d_model} channels"
            )
        found[label] = (weight.float(), bias.float())
    if not found:
        raise RecipeError(
            f"logit_lens: {path} holds {', '.join(sorted(tensors)[:4])}, and none of the streams' translators, such as "
            "0_pre.weight and 0_pre.bias"
        )
    return found


def rows_of_split(store: ActivationStore, fraction: float, seed: int, *, validation: bool) -> ChooseRows:
    """Return what tells the rows of one side of a split by document, drawn by a hash of the documents' ids."""
    documents = store.documents
    held_out = documents.held_out(fraction, seed)
    side = held_out if validation else ~held_out
    return lambda block: side[documents.of_rows(np.arange(block.start, block.stop))]

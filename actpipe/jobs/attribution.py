"""Direct logit attribution over a whole store."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from actpipe.compute.grouping import GroupSums, RangeSums, sum_by_group, sum_by_range
from actpipe.compute.residual import Component, residual_hook
from actpipe.hooks import ModelShape
from actpipe.jobs.attribution_columns import (
    AttributionWeights,
    Neurons,
    Sharing,
    SomeRows,
    attribution_columns,
    flat_ranks,
)
from actpipe.jobs.attribution_targets import NEXT, SCALE, Floats, GroupsOf, Numbers, Target, TokensOfRows
from actpipe.jobs.blocks import Done, RowBlock, even_blocks, map_and_sum, require_arrays
from actpipe.jobs.residual import components_of
from actpipe.jobs.written import branch_arrays
from actpipe.stores.reading import ActivationStore

MODEL_LOGIT = "metrics/correct_logit"
_POSITION = "tokens/position"
_ROOM = 48
"""Bytes that one attribution takes: in float32, and what is summed of it in float64."""

KeepRows = Callable[[int, Floats, Numbers], None]
"""Takes the first row of a block, its `(row, rank, column)` attributions, and the tokens that they are of."""


@dataclass(frozen=True)
class AttributionSums:
    """Attributions by position and by group, and how far their sums are from the model's own; they add up."""

    by_position: GroupSums
    """The sums of a position's ranks follow one another."""
    by_group: RangeSums
    """Those of a group's too."""
    modulus: npt.NDArray[np.float64]
    """Sum of absolute values, `(rank, column)`."""
    worst: float
    """Largest difference of a sum over components from the model's own logit."""
    worst_part: float = 0.0
    """Largest difference of a sum over a layer's heads from what its attention adds."""

    def __add__(self, other: AttributionSums) -> AttributionSums:
        return AttributionSums(
            self.by_position + other.by_position,
            self.by_group + other.by_group,
            self.modulus + other.modulus,
            float(np.maximum(self.worst, other.worst)),
            float(np.maximum(self.worst_part, other.worst_part)),
        )


def needed_arrays(
    components: list[Component],
    shape: ModelShape,
    *,
    heads: bool,
    neurons: bool = False,
    target: Target | None = None,
) -> list[str]:
    """Name the arrays that attribution reads, tokens aside."""
    layers = range(shape.n_layers)
    parts = [name for layer in layers if heads for name in branch_arrays(shape, layer, "attn")]
    parts += [name for layer in layers if neurons for name in branch_arrays(shape, layer, "mlp")]
    last = [residual_hook(shape.n_layers)] if target is not None and target.is_top else []
    return [*(component.hook for component in components), SCALE, *parts, *last]


def attribute_store(
    store: ActivationStore,
    weights: AttributionWeights,
    *,
    block_bytes: int,
    target: Target = NEXT,
    groups: GroupsOf = lambda block, _tokens: np.zeros((block.n_rows, 1), np.int64),
    neurons: Neurons = (),
    keep: KeepRows = lambda _start, _rows, _tokens: None,
    done: Done = lambda _: None,
) -> AttributionSums:
    """Attribute a logit of each row to every component, head by head, and neuron by neuron.

    Args:
        store: The activations.
        weights: The unembedding with the final norm folded in, and the output weights of heads and neurons.
        block_bytes: Memory of one block, in bytes.
        target: Whose logit.
        groups: Gives the number of each row's group; sums by group come beside those by position.
        neurons: Which neurons have columns of their own, where `weights` has those of MLPs.
        keep: Called with every block's rows; NaN where a row has no token.
        done: Called with 1 after each block.

    Returns:
        Sums by position and group, one column per `attribution_columns`; rows without a token are left out. `worst`
        compares their sum with the model's own logit, or, where that is not stored, with what the last residual stream
        gives; 0 where neither is there.
    """
    shape = store.shape
    components = components_of(store)
    has_heads, has_neurons = weights.attention is not None, weights.mlps is not None
    names = needed_arrays(components, shape, heads=has_heads, neurons=has_neurons, target=target)
    require_arrays(store, names, "attribute_logits")
    checked = logits_to_compare(store, target)
    tokens_of = TokensOfRows(store, target, weights.unembedding)
    columns = attribution_columns(components, shape, heads=has_heads, neurons=neurons if has_neurons else None)
    share = Sharing(shape, components, weights, columns)

    def attribute(block: RowBlock) -> AttributionSums:
        tokens, minus = tokens_of(block), tokens_of.minus(block)
        there = np.flatnonzero((tokens >= 0).any(-1))
        wanted = slice(None) if 2 * len(there) > block.n_rows else there
        rows = SomeRows(block, wanted)
        directions, constants = weights.directions(tokens[wanted], None if minus is None else minus[wanted])
        found, worst_part = share(rows, directions, constants)
        is_known = tokens[wanted] >= 0
        total = found[..., : len(components) + 1].sum(-1)
        if checked == MODEL_LOGIT:
            off = _capped(total, shape.logit_softcap) - rows.read(MODEL_LOGIT)[:, None]
        elif checked is not None:
            off = total - _logits(rows.read(checked), directions, rows.read(SCALE)) - constants
        else:
            off = np.zeros_like(total)
        found[~is_known] = np.nan
        keep(block.start, _spread(found, wanted, block.n_rows), tokens)
        position = block.read_integers(_POSITION)
        return AttributionSums(
            sum_by_group(
                *flat_ranks(found, position[wanted][:, None]),
                n_groups=(int(position.max()) + 1) * target.n_ranks,  # of all rows, those without a token too
            ),
            sum_by_range(*flat_ranks(found, groups(block, tokens)[wanted])),
            np.nansum(np.abs(found), 0, dtype=np.float64),
            # a value that is not finite where there is a token must not pass for rounding
            float(np.abs(off)[is_known].max(initial=0.0)),
            worst_part,
        )

    more = target.n_ranks * (8 * shape.d_model + _ROOM * len(columns)) + tokens_of.row_bytes
    read = [*names, *tokens_of.arrays, "tokens/input_ids", _POSITION, *([] if checked is None else [checked])]
    return map_and_sum(attribute, even_blocks(store, read * 2, block_bytes, more_row_bytes=more), done)


def logits_to_compare(store: ActivationStore, target: Target) -> str | None:
    """Name the array that a store has of the model's own logits, or from which they follow; None without either."""
    last = residual_hook(store.shape.n_layers)
    if target.is_models and MODEL_LOGIT in store:
        return MODEL_LOGIT
    return last if last in store else None


def _logits(stream: Floats, directions: Floats, scale: Floats) -> Floats:
    """Return what the last stream gives before any soft cap, less the constant term, `(row, rank)`."""
    found: Floats = np.einsum("rd,rkd->rk", stream, directions) / scale
    return found


def _capped(logits: Floats, cap: float | None) -> Floats:
    """Return what a model with a soft cap makes of its logits; attributions add up to those before it."""
    return logits if cap is None else cap * np.tanh(logits / cap)


def _spread(found: Floats, wanted: slice | Numbers, n_rows: int) -> Floats:
    """Return the attributions of all rows of a block, NaN where none were computed."""
    if isinstance(wanted, slice):
        return found
    rows = np.full((n_rows, *found.shape[1:]), np.nan, np.float32)
    rows[wanted] = found
    return rows

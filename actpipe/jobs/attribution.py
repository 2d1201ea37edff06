"""Direct logit attribution over a whole store."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from actpipe.compute.attribution import FoldedUnembedding, attribute_components, attribute_heads, next_tokens
from actpipe.compute.grouping import GroupSums, sum_by_group
from actpipe.compute.residual import Component
from actpipe.jobs.blocks import Done, RowBlock, even_blocks, map_and_sum, require_arrays
from actpipe.jobs.residual import components_of
from actpipe.stores.reading import ActivationStore

SCALE = "ln_final.hook_scale"
MODEL_LOGIT = "metrics/correct_logit"

Floats = npt.NDArray[np.float32]
KeepRows = Callable[[int, Floats], None]
"""Takes the first row of a block and its `(row, column)` attributions."""


@dataclass(frozen=True)
class AttributionWeights:
    """The weights that attribution needs."""

    unembedding: FoldedUnembedding
    W_O: Floats | None
    """`(layer, head, d_head, d_model)`; None leaves heads out."""
    b_O: Floats | None  # noqa: N815
    """`(layer, d_model)`."""


@dataclass(frozen=True)
class AttributionSums:
    """Attributions by position, and how far their sums are from the model's own logits; they add up."""

    by_position: GroupSums
    worst: float

    def __add__(self, other: AttributionSums) -> AttributionSums:
        return AttributionSums(self.by_position + other.by_position, max(self.worst, other.worst))


def column_labels(components: list[Component], n_layers: int, n_heads: int, *, heads: bool) -> list[str]:
    """Name the columns: components, the constant term, then heads and attention biases, layer by layer."""
    labels = [*(component.label for component in components), "bias"]
    if heads:
        labels += [f"L{layer}H{head}" for layer in range(n_layers) for head in range(n_heads)]
        labels += [f"{layer}_attn_bias" for layer in range(n_layers)]
    return labels


def needed_arrays(components: list[Component], n_layers: int, *, heads: bool) -> list[str]:
    """Name the arrays that attribution reads, tokens aside."""
    z = [f"blocks.{layer}.attn.hook_z" for layer in range(n_layers)] if heads else []
    return [*(component.hook for component in components), SCALE, *z]


def attribute_store(
    store: ActivationStore,
    weights: AttributionWeights,
    *,
    block_bytes: int,
    keep: KeepRows = lambda _start, _rows: None,
    done: Done = lambda _: None,
) -> AttributionSums:
    """Attribute the logit of each row's next token to every component, and head by head.

    Args:
        store: The activations.
        weights: The unembedding with the final norm folded in, and the heads' output weights.
        block_bytes: Memory of one block, in bytes.
        keep: Called with every block's rows; NaN where a row has no next token.
        done: Called with 1 after each block.

    Returns:
        Sums by position, one column per label of `column_labels`, rows without a next token left out.
    """
    shape = store.shape
    components = components_of(store)
    names = needed_arrays(components, shape.n_layers, heads=weights.W_O is not None)
    require_arrays(store, names, "attribute_logits")
    store.require_every_token("attribute_logits")
    checked = [MODEL_LOGIT] if MODEL_LOGIT in store else []

    def attribute(block: RowBlock) -> AttributionSums:
        ids = block.read_integers("tokens/input_ids", beyond=1)
        sequence = block.read_integers("tokens/sequence", beyond=1)
        targets = next_tokens(ids, sequence, block.n_rows)
        rows = _attribute_block(block, components, weights, targets)
        keep(block.start, rows)
        total = _capped(rows[:, : len(components) + 1].sum(-1), shape.logit_softcap)
        worst = float(np.nanmax(np.abs(total - block.read(MODEL_LOGIT)), initial=0.0)) if checked else 0.0
        return AttributionSums(sum_by_group(rows, block.read_integers("tokens/position")), worst)

    tokens = ["tokens/input_ids", "tokens/sequence", "tokens/position"]
    blocks = even_blocks(store, [*names, *names, *tokens, *checked], block_bytes)
    return map_and_sum(attribute, blocks, done)


def _capped(logits: Floats, cap: float | None) -> Floats:
    """Return what a model with a soft cap makes of its logits; attributions add up to those before it."""
    return logits if cap is None else cap * np.tanh(logits / cap)


def _attribute_block(
    block: RowBlock, components: list[Component], weights: AttributionWeights, targets: npt.NDArray[np.int64]
) -> Floats:
    directions = weights.unembedding.directions[np.maximum(targets, 0)]
    scale = block.read(SCALE)[:, 0]
    constants = weights.unembedding.constants[np.maximum(targets, 0)]
    columns = [attribute_components(block.read(component.hook)[None], directions, scale) for component in components]
    columns.append(constants[:, None])
    if weights.W_O is not None and weights.b_O is not None:
        for layer, W_O in enumerate(weights.W_O):
            columns.append(attribute_heads(block.read(f"blocks.{layer}.attn.hook_z"), W_O, directions, scale))
        columns.append(directions @ weights.b_O.T / scale[:, None])
    rows = np.concatenate(columns, axis=-1).astype(np.float32)
    rows[targets < 0] = np.nan
    return rows

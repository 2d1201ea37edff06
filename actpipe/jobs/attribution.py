"""Direct logit attribution over a whole store."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from actpipe.compute.attribution import FoldedUnembedding, attribute_components, attribute_heads, next_tokens
from actpipe.compute.grouping import GroupSums, sum_by_group
from actpipe.compute.residual import Component, residual_hook
from actpipe.jobs.blocks import Done, RowBlock, even_blocks, map_and_sum, require_arrays
from actpipe.jobs.groups import Groups
from actpipe.jobs.residual import components_of
from actpipe.stores.reading import ActivationStore

SCALE = "ln_final.hook_scale"
MODEL_LOGIT = "metrics/correct_logit"

LOGITS_AT_ONCE = 2**23
"""Most logits computed together to find the largest: 32 MiB of float32."""

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
    """Attributions by position and by group, and how far their sums are from the model's own; they add up."""

    by_position: GroupSums
    by_group: GroupSums
    worst: float

    def __add__(self, other: AttributionSums) -> AttributionSums:
        return AttributionSums(
            self.by_position + other.by_position,
            self.by_group + other.by_group,
            float(np.maximum(self.worst, other.worst)),
        )


@dataclass(frozen=True)
class Target:
    """Whose logit is shared out."""

    token: int | Literal["next", "top"] = "next"
    """The token that comes next, the one that the model holds most probable, or one id for all rows."""
    minus: int | None = None
    """The token whose logit is subtracted."""

    @property
    def is_models(self) -> bool:
        """Whether the model's own logit of it may be among the stored metrics."""
        return self.token == "next" and self.minus is None


def column_labels(components: list[Component], n_layers: int, n_heads: int, *, heads: bool) -> list[str]:
    """Name the columns: components, the constant term, then heads and attention biases, layer by layer."""
    labels = [*(component.label for component in components), "bias"]
    if heads:
        labels += [f"L{layer}H{head}" for layer in range(n_layers) for head in range(n_heads)]
        labels += [f"{layer}_attn_bias" for layer in range(n_layers)]
    return labels


def needed_arrays(
    components: list[Component], n_layers: int, *, heads: bool, target: Target | None = None
) -> list[str]:
    """Name the arrays that attribution reads, tokens aside."""
    z = [f"blocks.{layer}.attn.hook_z" for layer in range(n_layers)] if heads else []
    last = [residual_hook(n_layers)] if target is not None and target.token == "top" else []
    return [*(component.hook for component in components), SCALE, *z, *last]


def attribute_store(
    store: ActivationStore,
    weights: AttributionWeights,
    *,
    block_bytes: int,
    target: Target = Target(),
    groups: Groups = lambda block: np.zeros(block.n_rows, np.int64),
    keep: KeepRows = lambda _start, _rows: None,
    done: Done = lambda _: None,
) -> AttributionSums:
    """Attribute the logit of each row's next token to every component, and head by head.

    Args:
        store: The activations.
        weights: The unembedding with the final norm folded in, and the heads' output weights.
        block_bytes: Memory of one block, in bytes.
        target: Whose logit.
        groups: Gives the number of each row's group; sums by group come beside those by position.
        keep: Called with every block's rows; NaN where a row has no next token.
        done: Called with 1 after each block.

    Returns:
        Sums by position and group, one column per label of `column_labels`; of the next token's logit, rows without
        one are left out. `worst` compares their sum with the model's own logit, or, where that is not stored, with
        what the last residual stream gives; 0 where neither is there.
    """
    shape = store.shape
    components = components_of(store)
    names = needed_arrays(components, shape.n_layers, heads=weights.W_O is not None, target=target)
    require_arrays(store, names, "attribute_logits")
    store.require_every_token("attribute_logits")
    last = residual_hook(shape.n_layers)
    checked = next(([name] for name in (MODEL_LOGIT, last) if name in store and (name == last or target.is_models)), [])

    def own_logit(block: RowBlock, tokens: npt.NDArray[np.int64]) -> Floats:
        """Return the model's own logit, before any soft cap where the residual stream gives it."""
        if checked == [MODEL_LOGIT]:
            return block.read(MODEL_LOGIT)
        directions, constants = _directions(weights.unembedding, tokens, target.minus)
        return (block.read(last) * directions).sum(-1) / block.read(SCALE)[:, 0] + constants

    def attribute(block: RowBlock) -> AttributionSums:
        ids = block.read_integers("tokens/input_ids", beyond=1)
        sequence = block.read_integers("tokens/sequence", beyond=1)
        tokens = _tokens_of(target, block, last, weights.unembedding, next_tokens(ids, sequence, block.n_rows))
        rows = _attribute_block(block, components, weights, tokens, target.minus)
        keep(block.start, rows)
        total = rows[:, : len(components) + 1].sum(-1)
        if checked == [MODEL_LOGIT]:
            total = _capped(total, shape.logit_softcap)
        there = tokens >= 0  # a value that is not finite where there is a token must not pass for rounding
        worst = float(np.abs(total - own_logit(block, tokens))[there].max(initial=0.0)) if checked else 0.0
        by_group = sum_by_group(rows, groups(block))
        return AttributionSums(sum_by_group(rows, block.read_integers("tokens/position")), by_group, worst)

    tokens = ["tokens/input_ids", "tokens/sequence", "tokens/position"]
    blocks = even_blocks(store, [*names, *names, *tokens, *checked], block_bytes)
    return map_and_sum(attribute, blocks, done)


def _capped(logits: Floats, cap: float | None) -> Floats:
    """Return what a model with a soft cap makes of its logits; attributions add up to those before it."""
    return logits if cap is None else cap * np.tanh(logits / cap)


def _tokens_of(
    target: Target, block: RowBlock, last: str, unembedding: FoldedUnembedding, following: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Return whose logit is shared out at each row of a block, -1 where there is none."""
    if target.token == "next":
        return following
    if target.token != "top":
        return np.full(block.n_rows, target.token, np.int64)
    stream, scale = block.read(last), block.read(SCALE)
    at_once = max(1, LOGITS_AT_ONCE // len(unembedding.directions))
    found = np.empty(block.n_rows, np.int64)
    for start in range(0, block.n_rows, at_once):
        rows = slice(start, start + at_once)
        found[rows] = (stream[rows] @ unembedding.directions.T / scale[rows] + unembedding.constants).argmax(-1)
    return found


def _directions(
    unembedding: FoldedUnembedding, tokens: npt.NDArray[np.int64], minus: int | None
) -> tuple[Floats, Floats]:
    """Return each row's direction and constant."""
    directions, constants = unembedding.directions[np.maximum(tokens, 0)], unembedding.constants[np.maximum(tokens, 0)]
    if minus is not None:
        directions, constants = directions - unembedding.directions[minus], constants - unembedding.constants[minus]
    return directions, constants


def _attribute_block(
    block: RowBlock,
    components: list[Component],
    weights: AttributionWeights,
    tokens: npt.NDArray[np.int64],
    minus: int | None,
) -> Floats:
    directions, constants = _directions(weights.unembedding, tokens, minus)
    scale = block.read(SCALE)[:, 0]
    columns = [attribute_components(block.read(component.hook)[None], directions, scale) for component in components]
    columns.append(constants[:, None])
    if weights.W_O is not None and weights.b_O is not None:
        for layer, W_O in enumerate(weights.W_O):
            columns.append(attribute_heads(block.read(f"blocks.{layer}.attn.hook_z"), W_O, directions, scale))
        columns.append(directions @ weights.b_O.T / scale[:, None])
    rows = np.concatenate(columns, axis=-1).astype(np.float32)
    rows[tokens < 0] = np.nan
    return rows

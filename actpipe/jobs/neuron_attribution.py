"""How far every neuron writes along the direction of a logit, or of the residual stream, summed over rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from actpipe.compute.attribution import attribute_components, attribute_neurons, seen_through
from actpipe.compute.branches import Branch
from actpipe.hooks import ModelShape
from actpipe.jobs.attribution_columns import AttributionWeights, SomeRows
from actpipe.jobs.attribution_targets import SCALE, Floats, Target, TokensOfRows
from actpipe.jobs.blocks import Done, RowBlock, even_blocks, map_and_sum, require_arrays
from actpipe.jobs.written import branch_arrays
from actpipe.stores.reading import ActivationStore

Wide = npt.NDArray[np.float64]
_ROOM = 32
"""Bytes that one neuron of a row takes: its activation, its attribution in float32, and that and its square in
float64."""


@dataclass(frozen=True)
class NeuronSums:
    """Sums of attributions over rows, in float64, `(rank, neuron)`, layer by layer; they add up."""

    count: npt.NDArray[np.int64]
    """Rows with a token, `(rank,)`."""
    total: Wide
    squares: Wide
    modulus: Wide
    """Of absolute values."""
    worst: float
    """Largest difference of a sum over a layer's neurons, bias included, from what its MLP adds."""

    def __add__(self, other: NeuronSums) -> NeuronSums:
        return NeuronSums(
            self.count + other.count,
            self.total + other.total,
            self.squares + other.squares,
            self.modulus + other.modulus,
            float(np.maximum(self.worst, other.worst)),
        )


def largest_neurons(modulus: Wide, n_neurons: int, mlps: Sequence[Branch]) -> list[tuple[int, int]]:
    """Return layer and number of the neurons with the largest sums, layer by layer.

    Args:
        modulus: Of each neuron, layer by layer.
        n_neurons: How many to take; where sums are equal, the first.
        mlps: Of each layer.
    """
    order = np.argsort(-modulus, kind="stable")[:n_neurons]
    first = np.cumsum([0, *(len(branch.W) for branch in mlps)])
    layer = np.searchsorted(first, order, side="right") - 1
    return sorted(zip(layer.tolist(), (order - first[layer]).tolist(), strict=True))


def neurons_of_rows(
    rows: SomeRows, shape: ModelShape, layer: int, branch: Branch, directions: Floats, scale: Floats
) -> tuple[Floats, Floats]:
    """Return how far each neuron of a layer writes along directions, and how far its bias does.

    Args:
        rows: Reads the activations.
        shape: Sizes of the model.
        layer: Whose neurons.
        branch: Their output weights.
        directions: `(row, d_model)`.
        scale: What each product is divided by, `(row,)`.

    Returns:
        `(row, neuron)` and `(row,)`.
    """
    post, behind = rows.read_branch(shape, layer, "mlp")
    seen = seen_through(branch, directions, scale, behind)
    return attribute_neurons(post, branch.W, seen), seen.bias


def sum_neurons(
    store: ActivationStore,
    weights: AttributionWeights,
    target: Target,
    *,
    block_bytes: int,
    done: Done = lambda _: None,
) -> NeuronSums:
    """Attribute a logit of each row to every neuron, and sum over rows.

    An attribution is a neuron's activation times the product of its output weights with the logit's direction, so that
    nothing of rows times neurons times d_model is ever formed; a block's layers are gone through one after another.

    Args:
        store: The activations.
        weights: With those of MLPs.
        target: Whose logit.
        block_bytes: Memory of one block, in bytes.
        done: Called with 1 after each block.
    """
    shape = store.shape
    mlps = weights.mlps or ()
    tokens_of = TokensOfRows(store, target, weights.unembedding)
    parts = [branch_arrays(shape, layer, "mlp") for layer in range(len(mlps))]
    outs = [f"blocks.{layer}.hook_mlp_out" for layer in range(len(mlps))]
    names = [SCALE, *outs, *(name for layer in parts for name in layer)]
    require_arrays(store, names, "attribute_logits")

    def summed(block: RowBlock) -> NeuronSums:
        tokens, minus = tokens_of(block), tokens_of.minus(block)
        by_rank = []
        for rank in range(tokens.shape[1]):
            there = np.flatnonzero(tokens[:, rank] >= 0)
            rows = SomeRows(block, there)
            directions, _ = weights.directions(tokens[there, rank][:, None], None if minus is None else minus[there])
            scale, worst, sums = rows.read(SCALE)[:, 0], [0.0], []
            for layer, branch in enumerate(mlps):
                found, bias = neurons_of_rows(rows, shape, layer, branch, directions[:, 0], scale)
                wide = found.astype(np.float64)
                sums.append(np.stack([wide.sum(0), (wide**2).sum(0), np.abs(wide).sum(0)]))
                whole = attribute_components(rows.read(outs[layer])[None], directions[:, 0], scale)[:, 0]
                worst.append(float(np.abs(wide.sum(-1) + bias - whole).max(initial=0.0)))
            by_rank.append((len(there), np.concatenate(sums, -1), float(np.max(worst))))
        count, of_rank, off = zip(*by_rank, strict=True)
        total, squares, modulus = np.stack(of_rank, 1)
        return NeuronSums(np.array(count, np.int64), total, squares, modulus, float(np.max(off)))

    more = _ROOM * max(branch.W.shape[0] for branch in mlps) + 16 * shape.d_model * target.n_ranks
    blocks = even_blocks(store, [*names, *tokens_of.arrays], block_bytes, more_row_bytes=more + tokens_of.row_bytes)
    return map_and_sum(summed, blocks, done, fan_in=2)


def neuron_shares(
    store: ActivationStore,
    branches: Sequence[Branch],
    stream: str,
    *,
    block_bytes: int,
    done: Done = lambda _: None,
) -> Wide:
    """Sum over rows the modulus of each neuron's share of a residual stream, layer by layer; see `sum_residual_shares`.

    Args:
        store: The activations.
        branches: The MLPs of the first layers.
        stream: What neurons are projected onto.
        block_bytes: Memory of one block, in bytes.
        done: Called with 1 after each block.
    """
    shape = store.shape
    names = [stream, *(name for layer in range(len(branches)) for name in branch_arrays(shape, layer, "mlp"))]
    require_arrays(store, names, "decompose_residual")

    def summed(block: RowBlock) -> Wide:
        rows = SomeRows(block, slice(None))
        directions = rows.read(stream)
        squared = (directions.astype(np.float64) ** 2).sum(-1)
        scale = np.where(squared > 0, squared, np.inf).astype(np.float32)
        shares = (
            neurons_of_rows(rows, shape, layer, branch, directions, scale)[0] for layer, branch in enumerate(branches)
        )
        return np.concatenate([np.abs(share).sum(0, dtype=np.float64) for share in shares])

    more = _ROOM * max(len(branch.W) for branch in branches) + 16 * shape.d_model
    return map_and_sum(summed, even_blocks(store, names, block_bytes, more_row_bytes=more), done)

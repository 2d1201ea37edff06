"""Direct logit attribution of every neuron over a whole store, summed over rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from actpipe.compute.attribution import attribute_components, attribute_neurons, seen_through
from actpipe.jobs.attribution_columns import AttributionWeights, SomeRows
from actpipe.jobs.attribution_targets import SCALE, Target, TokensOfRows
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

    def largest(self, n_neurons: int, sizes: list[int]) -> list[tuple[int, int]]:
        """Return layer and number of the neurons whose mean modulus over rows and ranks is largest.

        Args:
            n_neurons: How many.
            sizes: Neurons of each layer.
        """
        order = np.argsort(-self.modulus.sum(0), kind="stable")[:n_neurons]
        layer = np.searchsorted(np.cumsum(sizes), order, side="right")
        first = np.cumsum([0, *sizes])
        return sorted(zip(layer.tolist(), (order - first[layer]).tolist(), strict=True))


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
                post, behind = rows.read_branch(shape, layer, "mlp")
                seen = seen_through(branch, directions[:, 0], scale, behind)
                wide = attribute_neurons(post, branch.W, seen).astype(np.float64)
                sums.append(np.stack([wide.sum(0), (wide**2).sum(0), np.abs(wide).sum(0)]))
                whole = attribute_components(rows.read(outs[layer])[None], directions[:, 0], scale)[:, 0]
                worst.append(float(np.abs(wide.sum(-1) + seen.bias - whole).max(initial=0.0)))
            by_rank.append((len(there), np.concatenate(sums, -1), float(np.max(worst))))
        count, found, off = zip(*by_rank, strict=True)
        total, squares, modulus = np.stack(found, 1)
        return NeuronSums(np.array(count, np.int64), total, squares, modulus, float(np.max(off)))

    more = _ROOM * max(branch.W.shape[0] for branch in mlps) + 16 * shape.d_model * target.n_ranks
    blocks = even_blocks(store, [*names, *tokens_of.arrays], block_bytes, more_row_bytes=more + tokens_of.row_bytes)
    return map_and_sum(summed, blocks, done, fan_in=2)

"""What logits are shared out to, and the sharing out of some rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from actpipe.compute.attribution import (
    FoldedUnembedding,
    attribute_components,
    attribute_heads,
    attribute_neurons,
    seen_through,
)
from actpipe.compute.branches import Branch
from actpipe.compute.residual import Component
from actpipe.hooks import ModelShape
from actpipe.jobs.attribution_targets import SCALE, Floats, Numbers
from actpipe.jobs.blocks import RowBlock
from actpipe.jobs.residual_sources import Column
from actpipe.jobs.written import BranchName, branch_arrays

Neurons = Sequence[tuple[int, int]]
"""Layers and numbers of neurons."""


@dataclass(frozen=True)
class AttributionWeights:
    """The weights that attribution needs."""

    unembedding: FoldedUnembedding
    attention: tuple[Branch, ...] | None = None
    """Of each layer; None leaves heads out."""
    mlps: tuple[Branch, ...] | None = None
    """Of each layer; None leaves neurons out."""

    def directions(self, tokens: Numbers, minus: Numbers | None) -> tuple[Floats, Floats]:
        """Return the direction `(row, rank, d_model)` and the constant `(row, rank)` of the logits of tokens.

        Args:
            tokens: `(row, rank)`; -1 gives those of token 0.
            minus: `(row,)`, the tokens whose logits are subtracted.
        """
        every = self.unembedding
        directions, constants = every.directions[np.maximum(tokens, 0)], every.constants[np.maximum(tokens, 0)]
        if minus is not None:
            others = np.maximum(minus, 0)[:, None]
            directions -= every.directions[others]
            constants -= every.constants[others]
        return directions, constants


def attribution_columns(
    components: Sequence[Component], shape: ModelShape, *, heads: bool, neurons: Neurons | None = None
) -> list[Column]:
    """Name the columns: components, the constant term, heads and attention biases, neurons and what is left of MLPs.

    Args:
        components: What writes to the residual stream.
        shape: Sizes of the model.
        heads: Whether heads have columns.
        neurons: Those that have columns of their own, layer by layer; None leaves neurons out.
    """
    columns = [Column(one.label, one.kind, one.layer) for one in components]
    columns.append(Column("bias", "bias"))
    layers = range(shape.n_layers)
    if heads:
        sizes = [shape.blocks[layer].n_heads for layer in layers]
        columns += [Column(f"L{i}H{head}", "head", i, head=head) for i in layers for head in range(sizes[i])]
        columns += [Column(f"{layer}_attn_bias", "attn_bias", layer) for layer in layers]
    if neurons is not None:
        columns += [Column(f"L{layer}N{neuron}", "neuron", layer, neuron=neuron) for layer, neuron in sorted(neurons)]
        columns += [Column(f"{layer}_other_neurons", "other_neurons", layer) for layer in layers]
        columns += [Column(f"{layer}_mlp_bias", "mlp_bias", layer) for layer in layers]
    return columns


@dataclass(frozen=True)
class SomeRows:
    """Some rows of a block."""

    block: RowBlock
    wanted: slice | Numbers

    def read(self, name: str) -> Floats:
        """Return these rows of one array, in float32."""
        return self.block.read(name)[self.wanted]

    def read_branch(self, shape: ModelShape, layer: int, which: BranchName) -> tuple[Floats, Floats | None]:
        """Return the parts of a branch, heads or neurons, and the scale of the norm behind it, where there is one."""
        parts, *behind = (self.read(name) for name in branch_arrays(shape, layer, which))
        return parts, behind[0] if behind else None


@dataclass(frozen=True)
class Sharing:
    """Shares logits out over columns."""

    shape: ModelShape
    components: Sequence[Component]
    weights: AttributionWeights
    columns: Sequence[Column]

    def __call__(self, rows: SomeRows, directions: Floats, constants: Floats) -> tuple[Floats, float]:
        """Return attributions, and the largest difference of a layer's heads, bias included, from what attention adds.

        Args:
            rows: Reads the activations.
            directions: `(row, rank, d_model)`.
            constants: `(row, rank)`.

        Returns:
            Logits (nats), `(row, rank, column)`.
        """
        scale = rows.read(SCALE)[:, 0]
        ranks = range(directions.shape[1])
        found = np.empty((*constants.shape, len(self.columns)), np.float32)
        for number, component in enumerate(self.components):
            written = rows.read(component.hook)[None]
            for rank in ranks:
                found[:, rank, number] = attribute_components(written, directions[:, rank], scale)[:, 0]
        found[..., len(self.components)] = constants
        worst = [0.0]
        for layer, branch in enumerate(self.weights.attention or ()):
            z, behind = rows.read_branch(self.shape, layer, "attn")
            for rank in ranks:
                seen = seen_through(branch, directions[:, rank], scale, behind)
                heads = attribute_heads(z, branch.W, seen)
                found[:, rank, self._places["head", layer]] = heads
                found[:, rank, self._places["attn_bias", layer]] = seen.bias[:, None]
                whole = found[:, rank, self._places["attn_out", layer][0]]
                worst.append(float(np.abs(heads.sum(-1) + seen.bias - whole).max(initial=0.0)))
        for layer, branch in enumerate(self.weights.mlps or ()):
            self._neurons(rows, layer, branch, directions, found)
        return found, float(np.max(worst))

    def _neurons(self, rows: SomeRows, layer: int, branch: Branch, directions: Floats, found: Floats) -> None:
        """Fill in a layer's neurons, its bias, and what is left of its MLP."""
        places = self._places.get(("neuron", layer), [])
        numbers = np.array([self.columns[place].neuron for place in places], np.int64)
        post, behind = rows.read_branch(self.shape, layer, "mlp")
        scale = rows.read(SCALE)[:, 0]
        for rank in range(directions.shape[1]):
            seen = seen_through(branch, directions[:, rank], scale, behind)
            neurons = attribute_neurons(post[:, numbers], branch.W[numbers], seen)
            found[:, rank, places] = neurons
            found[:, rank, self._places["mlp_bias", layer]] = seen.bias[:, None]
            whole = found[:, rank, self._places["mlp_out", layer][0]]
            found[:, rank, self._places["other_neurons", layer][0]] = whole - seen.bias - neurons.sum(-1)

    @cached_property
    def _places(self) -> dict[tuple[str, int], list[int]]:
        """Which columns are of a kind and a layer."""
        places: dict[tuple[str, int], list[int]] = {}
        for number, column in enumerate(self.columns):
            if column.layer is not None:
                places.setdefault((column.kind, column.layer), []).append(number)
        return places


def flat_ranks(values: Floats, number: Numbers) -> tuple[Floats, npt.NDArray[np.int64]]:
    """Return `(row, rank, column)` values as rows of their own, and the groups `number * n_ranks + rank` of each.

    Args:
        values: What is summed.
        number: Group of each row, `(row, 1 or rank)`.
    """
    n_ranks = values.shape[1]
    groups = number * n_ranks + np.arange(n_ranks)
    return values.reshape(-1, values.shape[-1]), groups.ravel()

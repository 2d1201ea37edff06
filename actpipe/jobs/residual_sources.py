"""Where the parts of a residual stream come from: what is stored, and what heads, neurons and biases write."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from actpipe.compute.branches import Branch
from actpipe.compute.residual import Component, residual_hook
from actpipe.hooks import ModelShape
from actpipe.jobs.blocks import RowBlock
from actpipe.jobs.written import BranchName, branch_arrays

Floats = npt.NDArray[np.float32]
BranchAt = Callable[[int, BranchName], Branch]
"""Gives the output weights of a layer's heads or neurons."""


@dataclass(frozen=True)
class Column:
    """One thing that writes to the residual stream, or to which a logit is shared out."""

    label: str
    kind: str
    """As of components; `bias`, `head`, `attn_bias`, `neuron`, `other_neurons`, `mlp_bias` or `resid`."""
    layer: int | None = None
    head: int | None = None
    neuron: int | None = None


class Source(Protocol):
    """Where some parts of the residual stream come from."""

    @property
    def columns(self) -> Sequence[Column]:
        """What the parts are."""

    @property
    def arrays(self) -> Sequence[str]:
        """Names of what must be stored."""

    def read(self, block: RowBlock) -> Iterator[Floats]:
        """Yield each part of a block's rows, `(row, d_model)`."""


@dataclass(frozen=True)
class Stored:
    """A part that is stored as it is."""

    column: Column
    hook: str

    @property
    def columns(self) -> list[Column]:
        """The part."""
        return [self.column]

    @property
    def arrays(self) -> list[str]:
        """Its array."""
        return [self.hook]

    def read(self, block: RowBlock) -> Iterator[Floats]:
        """Yield it."""
        yield block.read(self.hook)


@dataclass(frozen=True)
class _OfBranch:
    """Parts of what attention or an MLP writes."""

    which: ClassVar[BranchName]
    shape: ModelShape
    layer: int
    branch_at: BranchAt

    @property
    def arrays(self) -> list[str]:
        """What the parts are computed from."""
        return branch_arrays(self.shape, self.layer, self.which)

    @cached_property
    def _branch(self) -> Branch:
        return self.branch_at(self.layer, self.which)

    def _read(self, block: RowBlock) -> tuple[Floats, Floats | None]:
        parts, *behind = (block.read(name) for name in self.arrays)
        return parts, behind[0] if behind else None


@dataclass(frozen=True)
class Heads(_OfBranch):
    """What the heads of a layer write."""

    which = "attn"

    @property
    def columns(self) -> list[Column]:
        """The heads."""
        heads = range(self.shape.blocks[self.layer].n_heads)
        return [Column(f"L{self.layer}H{head}", "head", self.layer, head=head) for head in heads]

    def read(self, block: RowBlock) -> Iterator[Floats]:
        """Yield what each writes."""
        z, behind = self._read(block)
        for head, W_O in enumerate(self._branch.W):
            yield self._branch.writes(z[:, head] @ W_O, behind)


@dataclass(frozen=True)
class Neurons(_OfBranch):
    """What some neurons of a layer write, and all others together."""

    which = "mlp"
    neurons: tuple[int, ...]

    @property
    def columns(self) -> list[Column]:
        """The neurons, and the others."""
        layer = self.layer
        own = [Column(f"L{layer}N{neuron}", "neuron", layer, neuron=neuron) for neuron in self.neurons]
        return [*own, Column(f"{layer}_other_neurons", "other_neurons", layer)]

    def read(self, block: RowBlock) -> Iterator[Floats]:
        """Yield what each writes, then the sum over the others."""
        post, behind = self._read(block)
        for neuron in self.neurons:
            yield self._branch.writes(post[:, neuron, None] * self._branch.W[neuron], behind)
        others = post.copy()
        others[:, list(self.neurons)] = 0.0
        yield self._branch.writes(others @ self._branch.W, behind)


@dataclass(frozen=True)
class Biases:
    """The sum of biases that stand beside heads and neurons, as it arrives in the stream."""

    shape: ModelShape
    branches: tuple[tuple[int, BranchName], ...]
    """Whose they are."""
    branch_at: BranchAt

    @property
    def columns(self) -> list[Column]:
        """Their sum."""
        return [Column("bias", "bias")]

    @property
    def arrays(self) -> list[str]:
        """Scales of norms that stand behind them."""
        return [name for branch in self.branches for name in branch_arrays(self.shape, *branch)[1:]]

    @cached_property
    def _branches(self) -> list[Branch]:
        return [self.branch_at(*branch) for branch in self.branches]

    def read(self, block: RowBlock) -> Iterator[Floats]:
        """Yield the sum."""
        total = np.zeros((block.n_rows, self.shape.d_model), np.float32)
        for names, branch in zip(self.branches, self._branches, strict=True):
            behind = [block.read(name) for name in branch_arrays(self.shape, *names)[1:]]
            total += branch.bias(block.n_rows, behind[0] if behind else None)
        yield total


@dataclass(frozen=True)
class Wanted:
    """Which parts of the residual stream."""

    layer: int
    """The stream that enters this layer; of the number of layers, that leaving the last."""
    attention: bool = True
    """Whether what attention writes is among them."""
    mlps: bool = True
    """Whether what MLPs write is."""
    embeds: bool = True
    """Whether the embeddings are."""
    mlp_input: bool = False
    """Whether it is the stream that the layer's MLP reads."""
    heads: bool = False
    """Attention head by head."""
    neurons: Sequence[tuple[int, int]] | None = None
    """MLPs by these neurons, layer and number, and all others of each layer; None takes them whole."""

    @property
    def is_whole(self) -> bool:
        """Whether the parts add up to the stream."""
        return self.attention and self.mlps and self.embeds

    def stream(self, n_layers: int) -> str:
        """Name the stream."""
        return f"blocks.{self.layer}.hook_resid_mid" if self.mlp_input else residual_hook(n_layers, self.layer)


def sources_of(wanted: Wanted, components: Sequence[Component], shape: ModelShape, branch_at: BranchAt) -> list[Source]:
    """Return where the parts come from.

    Args:
        wanted: Which parts.
        components: Those of the stream that enters the layer; see `residual_components`.
        shape: Sizes of the model.
        branch_at: Gives weights, when they are needed.

    Returns:
        Components in their own order; with heads or neurons, in that of `get_full_resid_decomposition`: attention,
        MLPs, embeddings, biases.
    """
    if wanted.mlp_input:
        own = f"{wanted.layer}_attn_out"
        components = [*components, Component(own, f"blocks.{wanted.layer}.hook_attn_out", wanted.layer, "attn_out")]
    taken = {"attn_out": wanted.attention, "mlp_out": wanted.mlps, "embed": wanted.embeds, "pos_embed": wanted.embeds}
    whole = [(one, Stored(Column(one.label, one.kind, one.layer), one.hook)) for one in components if taken[one.kind]]
    if not wanted.heads and wanted.neurons is None:
        return [source for _, source in whole]
    attention: list[Source] = []
    mlps: list[Source] = []
    biases: list[tuple[int, BranchName]] = []
    for one, source in whole:
        if one.layer is None:
            continue
        if one.kind == "attn_out" and wanted.heads:
            attention.append(Heads(shape, one.layer, branch_at))
            biases.append((one.layer, "attn"))
        elif one.kind == "mlp_out" and wanted.neurons is not None:
            own_neurons = tuple(neuron for layer, neuron in wanted.neurons if layer == one.layer)
            mlps.append(Neurons(shape, one.layer, branch_at, own_neurons))
            biases.append((one.layer, "mlp"))
        else:
            (attention if one.kind == "attn_out" else mlps).append(source)
    embeds = [source for one, source in whole if one.layer is None]
    return [*attention, *mlps, *embeds, Biases(shape, tuple(biases), branch_at)]

"""A model's weights under TransformerLens' names and in its layout: `x @ W`, heads apart.

Source: TransformerLens 2.16, `weight_conversions` and the properties of `HookedTransformer`.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from einops import rearrange
from torch import nn

from actpipe.errors import UnknownHookError, did_you_mean
from actpipe.models.anatomy import Anatomy, matrix
from actpipe.models.families.fused import Part, split_heads

_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")


class Weights:
    """Views of a loaded model's weights; nothing is copied before it is asked for.

    `weights["blocks.0.attn.W_Q"]` is one parameter by its TransformerLens name, and the
    properties are the same stacked over layers. Biases that a model lacks are zeros.
    """

    def __init__(self, anatomy: Anatomy) -> None:
        self._anatomy = anatomy
        self._shape = anatomy.shape

    def __getitem__(self, name: str) -> torch.Tensor:
        """Return one parameter.

        Raises:
            UnknownHookError: The model has no parameter of that name.
        """
        found = _BLOCK.fullmatch(name)
        if found and int(found.group(1)) < self._shape.n_layers:
            getters = self._of_block(int(found.group(1)))
            key = found.group(2)
        else:
            getters, key = self._outside_blocks(), name
        if key not in getters:
            raise UnknownHookError(f"this model has no weight {name!r}{did_you_mean(key, getters)}")
        return getters[key]().detach()

    def _outside_blocks(self) -> dict[str, Callable[[], torch.Tensor]]:
        anatomy = self._anatomy
        getters: dict[str, Callable[[], torch.Tensor]] = {
            "embed.W_E": lambda: _tensor(anatomy.embed, "weight"),
            "unembed.W_U": lambda: matrix(anatomy.unembed),
            "unembed.b_U": lambda: _bias(anatomy.unembed),
            **self._norm("ln_final", anatomy.final_norm),
        }
        if anatomy.pos_embed is not None:
            pos_embed = anatomy.pos_embed
            getters["pos_embed.W_pos"] = lambda: _tensor(pos_embed, "weight")
        return getters

    def _of_block(self, layer: int) -> dict[str, Callable[[], torch.Tensor]]:
        family, part = self._anatomy.family, self._anatomy.part
        out, w_in, w_out = (part(layer, path) for path in (family.out, family.w_in, family.w_out))
        getters: dict[str, Callable[[], torch.Tensor]] = {
            **self._norm("ln1", part(layer, family.ln1)),
            **self._norm("ln2", part(layer, family.ln2)),
            "attn.W_O": lambda: rearrange(matrix(out), "(h d) m -> h d m", h=self._shape.n_heads),
            "attn.b_O": lambda: _bias(out),
            "mlp.W_in": lambda: matrix(w_in),
            "mlp.b_in": lambda: _bias(w_in),
            "mlp.W_out": lambda: matrix(w_out),
            "mlp.b_out": lambda: _bias(w_out),
        }
        if family.w_gate is not None:
            gate = part(layer, family.w_gate)
            getters["mlp.W_gate"] = lambda: matrix(gate)
        for which in ("q", "k", "v"):
            getters[f"attn.W_{which.upper()}"] = lambda which=which: self._heads(layer, which, "weight")  # type: ignore[misc]
            getters[f"attn.b_{which.upper()}"] = lambda which=which: self._heads(layer, which, "bias")  # type: ignore[misc]
        return getters

    def _norm(self, name: str, norm: nn.Module) -> dict[str, Callable[[], torch.Tensor]]:
        getters: dict[str, Callable[[], torch.Tensor]] = {f"{name}.w": lambda: _tensor(norm, "weight")}
        if self._anatomy.family.norm == "LN":
            getters[f"{name}.b"] = lambda: _tensor(norm, "bias")
        return getters

    def _heads(self, layer: int, which: Part, what: str) -> torch.Tensor:
        """Return `(head, d_model, d_head)` or `(head, d_head)`; grouped keys and values are repeated, as there."""
        projection = getattr(self._anatomy.family, which)
        module = self._anatomy.part(layer, projection.module)
        fused = matrix(module) if what == "weight" else _bias(module)
        heads = split_heads(fused, projection.layout, which, self._shape)
        heads = heads.transpose(0, 1) if what == "weight" else heads
        return heads.repeat_interleave(self._shape.n_heads // heads.shape[0], dim=0)

    def _stack(self, kind: str) -> torch.Tensor:
        return torch.stack([self[f"blocks.{layer}.{kind}"] for layer in range(self._shape.n_layers)])

    @property
    def W_E(self) -> torch.Tensor:
        """Token embedding, `(d_vocab, d_model)`."""
        return self["embed.W_E"]

    @property
    def W_pos(self) -> torch.Tensor:
        """Position embedding, `(n_ctx, d_model)`."""
        return self["pos_embed.W_pos"]

    @property
    def W_U(self) -> torch.Tensor:
        """Unembedding, `(d_model, d_vocab)`."""
        return self["unembed.W_U"]

    @property
    def b_U(self) -> torch.Tensor:
        """Unembedding bias, `(d_vocab,)`."""
        return self["unembed.b_U"]

    @property
    def W_Q(self) -> torch.Tensor:
        """Query weights, `(n_layers, n_heads, d_model, d_head)`."""
        return self._stack("attn.W_Q")

    @property
    def W_K(self) -> torch.Tensor:
        """Key weights, `(n_layers, n_heads, d_model, d_head)`, repeated where heads share them."""
        return self._stack("attn.W_K")

    @property
    def W_V(self) -> torch.Tensor:
        """Value weights, `(n_layers, n_heads, d_model, d_head)`, repeated where heads share them."""
        return self._stack("attn.W_V")

    @property
    def W_O(self) -> torch.Tensor:
        """Output weights, `(n_layers, n_heads, d_head, d_model)`."""
        return self._stack("attn.W_O")

    @property
    def b_Q(self) -> torch.Tensor:
        """Query biases, `(n_layers, n_heads, d_head)`."""
        return self._stack("attn.b_Q")

    @property
    def b_K(self) -> torch.Tensor:
        """Key biases, `(n_layers, n_heads, d_head)`."""
        return self._stack("attn.b_K")

    @property
    def b_V(self) -> torch.Tensor:
        """Value biases, `(n_layers, n_heads, d_head)`."""
        return self._stack("attn.b_V")

    @property
    def b_O(self) -> torch.Tensor:
        """Output biases, `(n_layers, d_model)`."""
        return self._stack("attn.b_O")

    @property
    def W_in(self) -> torch.Tensor:
        """MLP input weights, `(n_layers, d_model, d_mlp)`; the linear branch of a gated MLP."""
        return self._stack("mlp.W_in")

    @property
    def W_gate(self) -> torch.Tensor:
        """Gate weights, `(n_layers, d_model, d_mlp)`."""
        return self._stack("mlp.W_gate")

    @property
    def W_out(self) -> torch.Tensor:
        """MLP output weights, `(n_layers, d_mlp, d_model)`."""
        return self._stack("mlp.W_out")

    @property
    def b_in(self) -> torch.Tensor:
        """MLP input biases, `(n_layers, d_mlp)`."""
        return self._stack("mlp.b_in")

    @property
    def b_out(self) -> torch.Tensor:
        """MLP output biases, `(n_layers, d_model)`."""
        return self._stack("mlp.b_out")


def _tensor(module: nn.Module, name: str) -> torch.Tensor:
    tensor = getattr(module, name)
    assert isinstance(tensor, torch.Tensor)
    return tensor


def _bias(module: nn.Module) -> torch.Tensor:
    """Return a linear module's bias, zeros where it has none."""
    weight = matrix(module)
    bias = getattr(module, "bias", None)
    return weight.new_zeros(weight.shape[1]) if bias is None else bias

"""A model's weights under TransformerLens' names and in its layout: `x @ W`, heads apart.

Source: TransformerLens 2.16, `weight_conversions` and the properties of `HookedTransformer`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

import torch
from einops import rearrange
from torch import nn

from actpipe.compute.factored import FactoredMatrix
from actpipe.errors import UnknownHookError, did_you_mean
from actpipe.models.anatomy import Anatomy, linear_sizes, matrix
from actpipe.models.encoder_weights import outside_blocks
from actpipe.models.families.entry import CrossAttention, Family, Projection
from actpipe.models.families.fused import Part, split_branch, split_heads
from actpipe.models.parameters import Reader, read_parameter

_BLOCK = re.compile(r"((?:blocks|encoder|decoder)\.\d+)\.(.+)")


class Weights:
    """Views of a model's weights; nothing is read or copied before it is asked for.

    `weights["blocks.0.attn.W_Q"]` is one parameter by its TransformerLens name, and the
    properties are the same stacked over layers. Biases that a model lacks are zeros.

    Args:
        anatomy: The model, or its skeleton.
        read: Where parameters come from: the model's modules, or a checkpoint.
    """

    def __init__(self, anatomy: Anatomy, read: Reader = read_parameter) -> None:
        self._anatomy = anatomy
        self._shape = anatomy.shape
        self._read = read

    def __getitem__(self, name: str) -> torch.Tensor:
        """Return one parameter.

        Raises:
            UnknownHookError: The model has no parameter of that name.
        """
        found = _BLOCK.fullmatch(name)
        layers = {self._shape.block_name(layer): layer for layer in range(self._shape.n_layers)}
        if found and found.group(1) in layers:
            getters = self._of_block(layers[found.group(1)])
            key = found.group(2)
        else:
            getters, key = self._outside_blocks(), name
        if key not in getters:
            raise UnknownHookError(f"this model has no weight {name!r}{did_you_mean(key, getters)}")
        return getters[key]().detach()

    def names(self) -> list[str]:
        """Return the names of all weights, as a state dict of TransformerLens has them.

        Keys and values that several queries share are there once, under `_W_K`, `_W_V`, `_b_K` and `_b_V`.
        """
        found = list(self._outside_blocks())
        for layer in range(self._shape.n_layers):
            getters = self._of_block(layer)
            shared = {name.replace("._", ".") for name in getters if "._" in name}
            found += [f"{self._shape.block_name(layer)}.{name}" for name in getters if name not in shared]
        return found

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return all weights by name, as `actpipe.models.processing` takes them; see `names`."""
        return {name: self[name] for name in self.names()}

    def _outside_blocks(self) -> dict[str, Callable[[], torch.Tensor]]:
        anatomy, config = self._anatomy, self._anatomy.config
        embed_scale, logit_scale = float(anatomy.family.embed_scale(config)), anatomy.logit_scale
        if anatomy.shape.encoder_decoder or not anatomy.shape.causal:
            return outside_blocks(anatomy, self._norm, self._read)
        getters: dict[str, Callable[[], torch.Tensor]] = {
            "embed.W_E": lambda: _times(self._tensor(anatomy.embed, "weight"), embed_scale),
            "unembed.W_U": lambda: _times(self._matrix(anatomy.unembed), logit_scale),
            "unembed.b_U": lambda: _times(self._bias(anatomy.unembed), logit_scale),
        }
        if anatomy.final_norm is not None:
            getters |= self._norm("ln_final", anatomy.final_norm)
        if anatomy.embed_norm is not None:
            getters |= self._norm("embed.ln", anatomy.embed_norm)
        if anatomy.pos_embed is not None:
            pos_embed, name = anatomy.pos_embed, "weight" if hasattr(anatomy.pos_embed, "weight") else "weights"
            offset = anatomy.family.position_offset(config)
            getters["pos_embed.W_pos"] = lambda: self._tensor(pos_embed, name)[offset:]
        return getters

    def _of_block(self, layer: int) -> dict[str, Callable[[], torch.Tensor]]:
        anatomy, family, block = self._anatomy, self._anatomy.family_at(layer), self._shape.blocks[layer]
        scale = anatomy.branch_scale
        getters = self._attention(layer, "attn", family) if block.attention and block.z else {}
        if family.cross is not None:
            getters |= self._attention(layer, "cross_attn", family.cross)
        for name in ("ln1", "ln2", "ln3", "ln1_post", "ln2_post"):
            if getattr(family, name) is not None:
                getters |= self._norm(name, anatomy.part(layer, getattr(family, name)))
        if block.relative_bias:
            table = anatomy.part(layer, family.relative_bias or "")
            getters["attn.rel_pos_bias.weight"] = lambda: self._tensor(table, "weight")
        if block.mlp in ("plain", "gated"):
            w_out, gate = anatomy.part(layer, family.w_out), family.gate(anatomy.config)
            if family.w_in is not None:
                getters |= self._branch("in", layer, family.w_in)
            getters["mlp.W_out"] = lambda: _times(self._matrix(w_out), scale)
            getters["mlp.b_out"] = lambda: _times(self._bias(w_out), scale)
            if gate is not None:
                getters |= self._branch("gate", layer, gate)
        elif block.mlp == "experts":
            router = anatomy.part(layer, family.router or "")
            getters["mlp.W_router"] = lambda: self._matrix(router)
            getters["mlp.b_router"] = lambda: self._bias(router)
        return getters

    def _attention(
        self, layer: int, where: str, paths: Family | CrossAttention
    ) -> dict[str, Callable[[], torch.Tensor]]:
        anatomy, block = self._anatomy, self._shape.blocks[layer]
        out, scale = anatomy.part(layer, paths.out), anatomy.branch_scale
        getters: dict[str, Callable[[], torch.Tensor]] = {
            f"{where}.W_O": lambda: _times(rearrange(self._matrix(out), "(h d) m -> h d m", h=block.n_heads), scale),
            f"{where}.b_O": lambda: _times(self._bias(out), scale),
        }
        if block.projections:
            for which in ("q", "k", "v"):
                heads = partial(self._heads, layer, which, getattr(paths, which))
                getters[f"{where}.W_{which.upper()}"] = partial(heads, "weight")
                getters[f"{where}.b_{which.upper()}"] = partial(heads, "bias")
                if which != "q" and block.n_kv_heads != block.n_heads:
                    getters[f"{where}._W_{which.upper()}"] = partial(heads, "weight", repeat=False)
                    getters[f"{where}._b_{which.upper()}"] = partial(heads, "bias", repeat=False)
        if where == "attn" and block.qk_norm != "none":
            getters |= self._qk_norms(layer)
        sinks = self._anatomy.family_at(layer).sinks
        if where == "attn" and sinks is not None:
            path, _, name = sinks.rpartition(".")
            getters["attn.sinks"] = lambda: self._tensor(anatomy.part(layer, path), name)
        return getters

    def _branch(self, name: str, layer: int, projection: Projection) -> dict[str, Callable[[], torch.Tensor]]:
        module = self._anatomy.part(layer, projection.module)
        layout = projection.layout_in(self._anatomy.config)
        return {
            f"mlp.W_{name}": lambda: split_branch(self._matrix(module), layout),
            f"mlp.b_{name}": lambda: split_branch(self._bias(module), layout),
        }

    def _norm(self, name: str, norm: nn.Module) -> dict[str, Callable[[], torch.Tensor]]:
        offset, size = self._anatomy.family.norm_offset, self._shape.d_model
        getters: dict[str, Callable[[], torch.Tensor]] = {f"{name}.w": lambda: self._norm_weight(norm, size, offset)}
        if self._anatomy.family.norm == "LN":
            getters[f"{name}.b"] = lambda: self._norm_bias(norm, size)
        return getters

    def _qk_norms(self, layer: int) -> dict[str, Callable[[], torch.Tensor]]:
        """Return weights of the norms of queries and keys; one row per head where heads have their own."""
        family, block, offset = (
            self._anatomy.family_at(layer),
            self._shape.blocks[layer],
            self._anatomy.family.norm_offset,
        )
        getters: dict[str, Callable[[], torch.Tensor]] = {}
        for which in ("q_norm", "k_norm"):
            norm = self._anatomy.part(layer, getattr(family, which))
            leaves = [module for module in norm.modules() if not list(module.children())]
            if len(leaves) == 1:
                getters[f"attn.{which}.w"] = partial(self._norm_weight, leaves[0], block.d_qk, offset)
                getters[f"attn.{which}.b"] = partial(self._norm_bias, leaves[0], block.d_qk)
            else:
                getters[f"attn.{which}.w"] = partial(_stacked, self._norm_weight, leaves, block.d_qk, offset)
                getters[f"attn.{which}.b"] = partial(_stacked, self._norm_bias, leaves, block.d_qk)
        return getters

    def _heads(
        self, layer: int, which: Part, projection: Projection, what: str, *, repeat: bool = True
    ) -> torch.Tensor:
        """Return `(head, d_model, d_head)` or `(head, d_head)`; grouped keys and values are repeated, as there."""
        module, block = self._anatomy.part(layer, projection.module), self._shape.blocks[layer]
        fused = self._matrix(module) if what == "weight" else self._bias(module)
        heads = split_heads(fused, projection.layout_in(self._anatomy.config), which, block)
        heads = heads.transpose(0, 1) if what == "weight" else heads
        return heads.repeat_interleave(block.n_heads // heads.shape[0], dim=0) if repeat else heads

    def _tensor(self, module: nn.Module, name: str) -> torch.Tensor:
        tensor = self._read(module, name)
        assert tensor is not None
        return tensor

    def _matrix(self, linear: nn.Module) -> torch.Tensor:
        return matrix(linear, self._read)

    def _bias(self, linear: nn.Module) -> torch.Tensor:
        """Return a linear module's bias, zeros where it has none."""
        bias = self._read(linear, "bias")
        if bias is not None:
            return bias
        size, declared = linear_sizes(linear)[1], linear.weight
        if isinstance(declared, torch.Tensor) and declared.is_meta and declared.is_floating_point():
            return torch.zeros(size, dtype=declared.dtype)
        return self._tensor(linear, "weight").new_zeros(size)

    def _norm_weight(self, norm: nn.Module, size: int, offset: float) -> torch.Tensor:
        """Return what a norm multiplies with, ones where it has no weight."""
        weight = self._read(norm, "weight")
        if weight is None:
            return torch.ones(size)
        return weight if offset == 0 else weight.float() + offset

    def _norm_bias(self, norm: nn.Module, size: int) -> torch.Tensor:
        """Return what a norm adds, zeros where it has no bias."""
        bias = self._read(norm, "bias")
        if bias is not None:
            return bias
        weight = self._read(norm, "weight")
        return torch.zeros(size) if weight is None else torch.zeros_like(weight)

    def _stack(self, kind: str) -> torch.Tensor:
        return torch.stack([self[f"{self._shape.block_name(i)}.{kind}"] for i in range(self._shape.n_layers)])

    @property
    def W_E(self) -> torch.Tensor:
        """Token embedding, `(d_vocab, d_model)`."""
        return self["embed.embed.W_E" if "embed.embed.W_E" in self._outside_blocks() else "embed.W_E"]

    @property
    def W_pos(self) -> torch.Tensor:
        """Position embedding, `(n_ctx, d_model)`."""
        return self["embed.pos_embed.W_pos" if "embed.pos_embed.W_pos" in self._outside_blocks() else "pos_embed.W_pos"]

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
    def QK(self) -> FactoredMatrix:
        """`W_Q @ W_K.T` of every head, `(n_layers, n_heads, d_model, d_model)`, kept as its factors."""
        return FactoredMatrix(self.W_Q, self.W_K.mT)

    @property
    def OV(self) -> FactoredMatrix:
        """`W_V @ W_O` of every head, `(n_layers, n_heads, d_model, d_model)`, kept as its factors."""
        return FactoredMatrix(self.W_V, self.W_O)

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


def _times(tensor: torch.Tensor, factor: float) -> torch.Tensor:
    return tensor if factor == 1.0 else tensor * factor


def _stacked(read: Callable[..., torch.Tensor], norms: list[nn.Module], *args: float) -> torch.Tensor:
    return torch.stack([read(norm, *args) for norm in norms])

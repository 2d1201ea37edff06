"""Where each name is read: a module, a side of it, and what turns that tensor into the activation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import nn

from actpipe.hooks import BlockShape, HookPoint
from actpipe.models.anatomy import Anatomy, matrix, norm_epsilon
from actpipe.models.attention import AttentionSeen
from actpipe.models.families.entry import Layout
from actpipe.models.families.fused import Part, split_branch, split_heads

Side = Literal["input", "output", "attention"]


@dataclass(frozen=True)
class Tap:
    """One name's place in the model.

    `read` maps what passes there (a `(batch, position, ...)` tensor, or an `AttentionSeen`) to the
    activation, `(batch, position, ...)` too. It may return a view: whoever keeps it copies it.
    """

    name: str
    module: nn.Module
    side: Side
    read: Callable[[Any], torch.Tensor]
    flat: bool = False
    """Whether batch and positions pass there as one axis."""
    item: int = 0
    """Which one to take where a module returns several."""
    fresh: bool = False
    """Whether `read` returns a tensor of its own, which nothing else writes to."""


UNEMBED_INPUT = "unembed.hook_in"
"""What the unembedding multiplies: the final norm's output, weight and bias included."""


def unembed_input_tap(anatomy: Anatomy) -> Tap:
    """Return where the input of the unembedding is read; not one of TransformerLens 2.16's names."""
    return Tap(UNEMBED_INPUT, anatomy.unembed, "input", _same)


def tap_for(anatomy: Anatomy, point: HookPoint) -> Tap:
    """Return where `point` is read in this model."""
    if point.layer is None:
        return _outside_blocks(anatomy, point.name)
    return _InBlock(anatomy, point.layer, point.name).tap(point.kind)


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _outside_blocks(anatomy: Anatomy, name: str) -> Tap:
    if name == "hook_tokens":
        return Tap(name, anatomy.embed, "input", _same)
    if name == "hook_embed":
        if anatomy.pos_embed is None:
            return Tap(name, anatomy.blocks[0], "input", _same)
        return Tap(name, anatomy.embed, "output", _same)
    if name == "hook_pos_embed":
        assert anatomy.pos_embed is not None
        return Tap(name, anatomy.pos_embed, "output", _same)
    if name.startswith("embed.ln."):
        assert anatomy.embed_norm is not None
        return _norm_tap(anatomy, name, anatomy.embed_norm)
    return _norm_tap(anatomy, name, anatomy.final_norm)


@dataclass(frozen=True)
class _InBlock:
    """Finds the names of one block."""

    anatomy: Anatomy
    layer: int
    name: str

    def tap(self, kind: str) -> Tap:
        prefix, _, what = kind.rpartition(".")
        if prefix.startswith("ln"):
            norm = self.anatomy.part(self.layer, getattr(self.anatomy.family, prefix))
            return _norm_tap(self.anatomy, self.name, norm, flat=prefix == "ln2" and self.anatomy.family.flat_mlp)
        if prefix in ("attn.q_norm", "attn.k_norm"):
            return self._qk_norm(prefix.removeprefix("attn."), what)
        if prefix == "attn":
            return self._attention(what.removeprefix("hook_"))
        return self._mlp(what) if prefix == "mlp" else self._stream(what)

    def _at(
        self, module: nn.Module, side: Side, read: Callable[[Any], torch.Tensor] = _same, *, flat: bool = False
    ) -> Tap:
        return Tap(self.name, module, side, read, flat)

    @property
    def _block(self) -> BlockShape:
        return self.anatomy.shape.blocks[self.layer]

    def _part(self, paths: Any) -> nn.Module:
        return self.anatomy.part(self.layer, paths)

    def _stream(self, kind: str) -> Tap:
        family, block = self.anatomy.family, self.anatomy.blocks[self.layer]
        scaled = partial(_times, factor=self.anatomy.branch_scale)
        if kind == "hook_resid_post":
            return self._at(block, "output")
        if kind == "hook_attn_out":
            return self._at(self._part(family.attn_out or family.ln1_post or family.attention), "output", scaled)
        if kind == "hook_mlp_out":
            return self._at(self._part(family.ln2_post or family.mlp), "output", scaled, flat=family.flat_mlp)
        if kind == "hook_resid_mid" or (kind == "hook_mlp_in" and not self._block.parallel):
            flat = family.flat_mlp
            return self._at(self._part(family.ln2 or family.mlp), "input", flat=flat)
        if kind in ("hook_resid_pre", "hook_mlp_in"):
            return self._at(block, "input")
        n_copies = self._block.n_kv_heads if kind in ("hook_k_input", "hook_v_input") else self._block.n_heads
        return self._at(block, "input", partial(_copies, n_copies=n_copies))

    def _mlp(self, kind: str) -> Tap:
        family, config = self.anatomy.family, self.anatomy.native.config
        if kind in ("hook_pre", "hook_pre_linear"):
            projection = family.w_in if kind == "hook_pre_linear" else family.w_gate or family.w_in
            branch = partial(split_branch, layout=projection.layout_in(config))
            return self._at(self._part(projection.module), "output", branch, flat=family.flat_mlp)
        if kind == "hook_post":
            return self._at(self._part(family.w_out), "input", flat=family.flat_mlp)
        router = self._part(family.router)
        if kind == "hook_expert_indices":
            return Tap(self.name, router, "output", _same, flat=True, item=2)
        read = _same if kind == "hook_router_logits" else _SCORED[family.router_scores]
        return Tap(self.name, router, "output", read, flat=True)

    def _attention(self, what: str) -> Tap:
        family, block = self.anatomy.family, self._block
        projection = getattr(family, what, None) if what in ("q", "k", "v") else None
        if projection is not None:
            layout = projection.layout_in(self.anatomy.native.config)
            read = partial(_read_projection, layout=layout, part=cast(Part, what), block=block)
            return self._at(self._part(projection.module), "output", read)
        if what in ("z", "result"):
            out = self._part(family.out)
            if what == "z":
                return self._at(out, "input", partial(_read_z, n_heads=block.n_heads))
            scale = self.anatomy.branch_scale
            read = partial(_read_result, out=out, n_heads=block.n_heads, scale=scale)
            return replace(self._at(out, "input", read), fresh=True)
        attention = self._part(family.attention)
        if what in ("v", "rot_k"):
            read = partial(_read_value if what == "v" else _read_key, block=block)
            return self._at(attention, "attention", read)
        return replace(self._at(attention, "attention", _FROM_ATTENTION[what]), fresh=what != "rot_q")

    def _qk_norm(self, which: str, what: str) -> Tap:
        family = self.anatomy.family
        norm = self._part(getattr(family, which))
        swap = family.qk_norm_input == "heads_first"
        leaf = next(module for module in norm.modules() if not list(module.children()))
        measure = _norm_scale if what == "hook_scale" else _divided
        read = partial(measure, kind=family.qk_norm, epsilon=norm_epsilon(leaf))
        return self._at(norm, "input", partial(_positions_first, read=read) if swap else read)


def _times(tensor: torch.Tensor, factor: float) -> torch.Tensor:
    return tensor if factor == 1.0 else tensor * factor


def _copies(tensor: torch.Tensor, n_copies: int) -> torch.Tensor:
    return tensor.unsqueeze(-2).expand(*tensor.shape[:-1], n_copies, tensor.shape[-1])


def _read_projection(tensor: torch.Tensor, layout: Layout, part: Part, block: BlockShape) -> torch.Tensor:
    return split_heads(tensor, layout, part, block)


def _read_z(tensor: torch.Tensor, n_heads: int) -> torch.Tensor:
    return tensor.reshape(*tensor.shape[:-1], n_heads, -1)


def _read_result(tensor: torch.Tensor, out: nn.Module, n_heads: int, scale: float) -> torch.Tensor:
    z = _read_z(tensor, n_heads)
    result = torch.einsum("bphd,hdm->bphm", z, matrix(out).to(z).reshape(*z.shape[-2:], -1))
    return _times(result, scale)


def _unrepeated(heads: torch.Tensor, block: BlockShape) -> torch.Tensor:
    """Return `(batch, position, kv_head, d)` of keys or values, which a model may have repeated for its queries."""
    return heads[:, :: heads.shape[1] // block.n_kv_heads].transpose(1, 2)


def _read_value(seen: AttentionSeen, block: BlockShape) -> torch.Tensor:
    assert seen.value is not None
    return _unrepeated(seen.value, block)


def _read_key(seen: AttentionSeen, block: BlockShape) -> torch.Tensor:
    return _unrepeated(seen.key, block)


_FROM_ATTENTION: dict[str, Callable[[AttentionSeen], torch.Tensor]] = {
    "rot_q": lambda seen: seen.query.transpose(1, 2),
    "attn_scores": lambda seen: seen.scores.transpose(1, 2),
    "pattern": lambda seen: seen.pattern.transpose(1, 2),
}
_SCORED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "softmax": lambda logits: logits.float().softmax(-1),
    "sigmoid": lambda logits: logits.float().sigmoid(),
}


def _norm_tap(anatomy: Anatomy, name: str, norm: nn.Module, *, flat: bool = False) -> Tap:
    """Read a norm as TransformerLens 2.16 means it: LayerNorm's `normalized` has weight and bias, RMSNorm's not."""
    kind = anatomy.family.norm
    if kind == "LN" and name.endswith("hook_normalized"):
        return Tap(name, norm, "output", _same, flat)
    read = _norm_scale if name.endswith("hook_scale") else _divided
    epsilon = norm_epsilon(norm, anatomy.family.norm_epsilon)
    return Tap(name, norm, "input", partial(read, kind=kind, epsilon=epsilon), flat, fresh=True)


def tap_before_affine(anatomy: Anatomy, tap: Tap) -> Tap:
    """Return the tap of a norm's `hook_normalized` before weight and bias; that of an RMSNorm is so already."""
    if tap.side == "input":
        return tap
    epsilon = norm_epsilon(tap.module, anatomy.family.norm_epsilon)
    return replace(tap, side="input", read=partial(_divided, kind="LN", epsilon=epsilon))


def _norm_scale(tensor: torch.Tensor, kind: Literal["LN", "RMS"], epsilon: float) -> torch.Tensor:
    wide = tensor.float()
    if kind == "LN":
        wide = wide - wide.mean(-1, keepdim=True)
    return (wide.square().mean(-1, keepdim=True) + epsilon).sqrt()


def _divided(tensor: torch.Tensor, kind: Literal["LN", "RMS"], epsilon: float) -> torch.Tensor:
    """Return a norm's input, centred for LayerNorm, over its scale: before weight and bias."""
    wide = tensor.float()
    if kind == "LN":
        wide = wide - wide.mean(-1, keepdim=True)
    return (wide / _norm_scale(tensor, kind, epsilon)).to(tensor.dtype)


def _positions_first(tensor: torch.Tensor, read: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    return read(tensor).transpose(1, 2)

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
from actpipe.models.attention_calls import AttentionSeen
from actpipe.models.families.entry import CrossAttention, Family, Layout
from actpipe.models.families.fused import Part, split_branch, split_heads

Side = Literal["input", "output", "attention", "own_attention"]
"""`attention` goes through transformers' attention interface, `own_attention` is code of the module's own."""


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
"""What the unembedding multiplies: the last norm's output, weight and bias included."""


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


def _batched(tensor: torch.Tensor) -> torch.Tensor:
    """Return positions with a batch axis, which some models add only later."""
    return tensor if tensor.ndim == 3 else tensor.unsqueeze(0)


def _outside_blocks(anatomy: Anatomy, name: str) -> Tap:
    found = _around_encoder(anatomy, name)
    if found is not None:
        return found
    if name == "hook_tokens":
        return Tap(name, anatomy.embed, "input", _same)
    if name == "hook_embed":
        if anatomy.pos_embed is None:
            return Tap(name, anatomy.blocks[0], "input", _same)
        return Tap(name, anatomy.embed, "output", _same)
    if name == "hook_pos_embed":
        assert anatomy.pos_embed is not None
        return Tap(name, anatomy.pos_embed, "output", _batched)
    if name.startswith("embed.ln."):
        assert anatomy.embed_norm is not None
        return _norm_tap(anatomy, name, anatomy.embed_norm)
    final_norm = anatomy.decoder.final_norm if anatomy.decoder and name.startswith("decoder") else anatomy.final_norm
    assert final_norm is not None
    return _norm_tap(anatomy, name, final_norm)


def _around_encoder(anatomy: Anatomy, name: str) -> Tap | None:
    """Return where the names of an encoder's embedding and heads are read; None for others."""
    heads = anatomy.heads
    if name == "hook_full_embed":
        return Tap(name, anatomy.blocks[0], "input", _same)
    places: dict[str, nn.Module | None] = {
        "embed.hook_embed": anatomy.embed,
        "embed.hook_pos_embed": anatomy.pos_embed,
        "embed.hook_token_type_embed": anatomy.token_type_embed,
        "pooler.hook_pooler_out": heads.pooler if heads else None,
        "nsp_head.hook_nsp_out": heads.next_sentence if heads else None,
    }
    module = places.get(name)
    if module is not None:
        return Tap(name, module, "output", _same)
    return _norm_tap(anatomy, name, heads.norm) if heads and name.startswith("mlm_head.ln.") else None


@dataclass(frozen=True)
class _InBlock:
    """Finds the names of one block."""

    anatomy: Anatomy
    layer: int
    name: str

    def tap(self, kind: str) -> Tap:
        if kind in self._family.others:
            scale = self.anatomy.branch_scale if kind in self._block.branches else 1.0
            return self._at(self._part(self._family.others[kind]), "output", partial(_times, factor=scale))
        prefix, _, what = kind.rpartition(".")
        if prefix.startswith("ln"):
            norm = self._part(getattr(self._family, prefix))
            return _norm_tap(self.anatomy, self.name, norm, flat=prefix == "ln2" and self._family.flat_mlp)
        if prefix in ("attn.q_norm", "attn.k_norm"):
            return self._qk_norm(prefix.removeprefix("attn."), what)
        if prefix in ("attn", "cross_attn"):
            paths = self._family if prefix == "attn" else self._family.cross
            assert paths is not None
            return self._attention(what.removeprefix("hook_"), paths)
        return self._mlp(what) if prefix == "mlp" else self._stream(what)

    def _at(
        self, module: nn.Module, side: Side, read: Callable[[Any], torch.Tensor] = _same, *, flat: bool = False
    ) -> Tap:
        return Tap(self.name, module, side, read, flat)

    @property
    def _block(self) -> BlockShape:
        return self.anatomy.shape.blocks[self.layer]

    @property
    def _family(self) -> Family:
        return self.anatomy.family_at(self.layer)

    def _part(self, paths: Any) -> nn.Module:
        return self.anatomy.part(self.layer, paths)

    def _stream(self, kind: str) -> Tap:
        family, block = self._family, self.anatomy.blocks[self.layer]
        scaled = partial(_times, factor=self.anatomy.branch_scale)
        if kind == "hook_attn_out":
            return self._at(self._part(family.attn_out or family.ln1_post or family.attention), "output", scaled)
        if kind == "hook_cross_attn_out":
            assert family.cross is not None
            return self._at(self._part(family.cross.attention), "output", scaled)
        if kind == "hook_mlp_out":
            return self._at(self._part(family.ln2_post or family.mlp), "output", scaled, flat=family.flat_mlp)
        if kind == "hook_normalized_resid_post" or (kind == "hook_resid_post" and not family.post_norm):
            return self._at(block, "output")
        copied = {"hook_cross_attn_in": "hook_resid_mid", "hook_mlp_in": self._block.mlp_stream}
        norm = self._norm_that_reads(copied.get(kind, kind))
        if norm is not None:
            return self._at(self._part(norm), "input", flat=family.flat_mlp)
        if kind in ("hook_resid_pre", "hook_mlp_in"):
            return self._at(block, "input")
        n_copies = self._block.n_kv_heads if kind in ("hook_k_input", "hook_v_input") else self._block.n_heads
        return self._at(block, "input", partial(_copies, n_copies=n_copies))

    def _norm_that_reads(self, stream: str) -> Any:
        """Return the path of the norm, or else the MLP, whose input is a stream inside the block; None for others."""
        family = self._family
        if stream == "hook_resid_post":
            return family.ln3 or family.ln2
        if stream == "hook_resid_mid_cross":
            return family.ln2 if family.post_norm else family.ln3
        if stream == "hook_resid_mid":
            return family.ln1 if family.post_norm else family.ln2 or family.mlp
        return None

    def _mlp(self, kind: str) -> Tap:
        family, config = self._family, self.anatomy.config
        if kind in ("hook_pre", "hook_pre_linear"):
            projection = family.w_in if kind == "hook_pre_linear" else family.gate(config) or family.w_in
            assert projection is not None
            branch = partial(split_branch, layout=projection.layout_in(config))
            return self._at(self._part(projection.module), "output", branch, flat=family.flat_mlp)
        if kind == "hook_post":
            return self._at(self._part(family.w_out), "input", flat=family.flat_mlp)
        router = self._part(family.router)
        if kind == "hook_expert_indices":
            return Tap(self.name, router, "output", _same, flat=True, item=2)
        read = _same if kind == "hook_router_logits" else _SCORED[family.router_scores]
        return Tap(self.name, router, "output", read, flat=True)

    def _attention(self, what: str, paths: Family | CrossAttention) -> Tap:
        block = self._block
        projection = getattr(paths, what, None) if what in ("q", "k", "v") else None
        if projection is not None:
            layout = projection.layout_in(self.anatomy.config)
            read = partial(_read_projection, layout=layout, part=cast(Part, what), block=block)
            return self._at(self._part(projection.module), "output", read)
        if what in ("z", "result"):
            out = self._part(paths.out)
            if what == "z":
                return self._at(out, "input", partial(_read_z, n_heads=block.n_heads))
            scale = self.anatomy.branch_scale
            read = partial(_read_result, out=out, n_heads=block.n_heads, scale=scale)
            return replace(self._at(out, "input", read), fresh=True)
        attention = self._part(paths.attention)
        side: Side = "attention" if self._family.sees_attention_by == "interface" else "own_attention"
        if what in ("v", "rot_k"):
            read = partial(_read_value if what == "v" else _read_key, block=block)
            return self._at(attention, side, read)
        computed = what in ("attn_scores", "pattern")
        return replace(self._at(attention, side, _FROM_ATTENTION[what]), fresh=computed)

    def _qk_norm(self, which: str, what: str) -> Tap:
        family = self._family
        norm = self._part(getattr(family, which))
        swap = family.qk_norm_input == "heads_first"
        leaf = next(module for module in norm.modules() if not list(module.children()))
        measure = norm_scale if what == "hook_scale" else _divided
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


def _unrepeated(heads: torch.Tensor, seen: AttentionSeen, block: BlockShape) -> torch.Tensor:
    """Return `(batch, position, kv_head, d)` of this pass' keys or values.

    A model may have repeated them for its queries, and put those of earlier passes before them.
    """
    return heads[:, :: heads.shape[1] // block.n_kv_heads, -seen.query.shape[2] :].transpose(1, 2)


def _read_value(seen: AttentionSeen, block: BlockShape) -> torch.Tensor:
    assert seen.value is not None
    return _unrepeated(seen.value, seen, block)


def _read_key(seen: AttentionSeen, block: BlockShape) -> torch.Tensor:
    return _unrepeated(seen.key, seen, block)


def _read_mixed(seen: AttentionSeen) -> torch.Tensor:
    assert seen.output is not None
    return seen.output


_FROM_ATTENTION: dict[str, Callable[[AttentionSeen], torch.Tensor]] = {
    "rot_q": lambda seen: seen.query.transpose(1, 2),
    "attn_scores": lambda seen: seen.scores.transpose(1, 2),
    "pattern": lambda seen: seen.pattern.transpose(1, 2),
    "z_ungated": _read_mixed,
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
    read = norm_scale if name.endswith("hook_scale") else _divided
    epsilon = norm_epsilon(norm, anatomy.family.norm_epsilon)
    return Tap(name, norm, "input", partial(read, kind=kind, epsilon=epsilon), flat, fresh=True)


def tap_before_affine(anatomy: Anatomy, tap: Tap) -> Tap:
    """Return the tap of a norm's `hook_normalized` before weight and bias; that of an RMSNorm is so already."""
    if tap.side == "input":
        return tap
    epsilon = norm_epsilon(tap.module, anatomy.family.norm_epsilon)
    return replace(tap, side="input", read=partial(_divided, kind="LN", epsilon=epsilon))


def norm_scale(tensor: torch.Tensor, kind: Literal["LN", "RMS"], epsilon: float) -> torch.Tensor:
    """Return what a norm divides by, `(..., 1)` in float32."""
    wide = tensor.float()
    if kind == "LN":
        wide = wide - wide.mean(-1, keepdim=True)
    return (wide.square().mean(-1, keepdim=True) + epsilon).sqrt()


def norm_divided(tensor: torch.Tensor, kind: Literal["LN", "RMS"], scale: torch.Tensor) -> torch.Tensor:
    """Return a norm's input, centred for LayerNorm, over a scale, in float32: before weight and bias."""
    wide = tensor.float()
    if kind == "LN":
        wide = wide - wide.mean(-1, keepdim=True)
    return wide / scale


def _divided(tensor: torch.Tensor, kind: Literal["LN", "RMS"], epsilon: float) -> torch.Tensor:
    return norm_divided(tensor, kind, norm_scale(tensor, kind, epsilon)).to(tensor.dtype)


def _positions_first(tensor: torch.Tensor, read: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    return read(tensor).transpose(1, 2)

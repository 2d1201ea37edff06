"""Where each name is read: a module, a side of it, and what turns that tensor into the activation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import nn

from actpipe.hooks import HookPoint, ModelShape
from actpipe.models.anatomy import Anatomy, matrix, norm_epsilon
from actpipe.models.attention import AttentionCall
from actpipe.models.families.entry import Projection
from actpipe.models.families.fused import Part, split_heads

Side = Literal["input", "output", "attention"]


@dataclass(frozen=True)
class Tap:
    """One name's place in the model.

    `read` maps what passes there (a `(batch, position, ...)` tensor, or an `AttentionCall`) to the
    activation, `(batch, position, ...)` too. It may return a view: whoever keeps it copies it.
    """

    name: str
    module: nn.Module
    side: Side
    read: Callable[[Any], torch.Tensor]


UNEMBED_INPUT = "unembed.hook_in"
"""What the unembedding multiplies: the final norm's output, weight and bias included."""


def unembed_input_tap(anatomy: Anatomy) -> Tap:
    """Return where the input of the unembedding is read; not one of TransformerLens 2.16's names."""
    return Tap(UNEMBED_INPUT, anatomy.unembed, "input", _same)


def tap_for(anatomy: Anatomy, point: HookPoint) -> Tap:
    """Return where `point` is read in this model."""
    if point.layer is None:
        module, side, read = _outside_blocks(anatomy, point.name)
    elif point.kind.startswith(("ln1.", "ln2.")):
        norm = anatomy.part(point.layer, getattr(anatomy.family, point.kind[:3]))
        module, side, read = _norm(norm, point.kind[4:], anatomy.family.norm)
    elif point.kind.startswith("attn."):
        module, side, read = _attention(anatomy, point.layer, point.kind[len("attn.hook_") :])
    else:
        module, side, read = _rest_of_block(anatomy, point.layer, point.kind)
    return Tap(point.name, module, side, read)


_Place = tuple[nn.Module, Side, Callable[[Any], torch.Tensor]]


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _outside_blocks(anatomy: Anatomy, name: str) -> _Place:
    if name == "hook_embed":
        return anatomy.embed, "output", _same
    if name == "hook_pos_embed":
        assert anatomy.pos_embed is not None
        return anatomy.pos_embed, "output", _same
    return _norm(anatomy.final_norm, name.removeprefix("ln_final."), anatomy.family.norm)


def _rest_of_block(anatomy: Anatomy, layer: int, kind: str) -> _Place:
    family = anatomy.family
    places: dict[str, tuple[str, Side]] = {
        "hook_resid_pre": ("", "input"),
        "hook_attn_out": (family.attention, "output"),
        "hook_resid_mid": (family.ln2, "input"),
        "mlp.hook_pre": (family.w_gate or family.w_in, "output"),
        "mlp.hook_pre_linear": (family.w_in, "output"),
        "mlp.hook_post": (family.w_out, "input"),
        "hook_mlp_out": (family.mlp, "output"),
        "hook_resid_post": ("", "output"),
    }
    path, side = places[kind]
    return anatomy.part(layer, path), side, _same


def _attention(anatomy: Anatomy, layer: int, what: str) -> _Place:
    family, shape = anatomy.family, anatomy.shape
    if what in ("q", "k", "v"):
        projection: Projection = getattr(family, what)
        read = partial(_read_projection, projection=projection, part=cast(Part, what), shape=shape)
        return anatomy.part(layer, projection.module), "output", read
    if what in ("z", "result"):
        out = anatomy.part(layer, family.out)
        read = partial(_read_z, shape=shape) if what == "z" else partial(_read_result, out=out, shape=shape)
        return out, "input", read
    return anatomy.part(layer, family.attention), "attention", _FROM_CALL[what]


def _read_projection(tensor: torch.Tensor, projection: Projection, part: Part, shape: ModelShape) -> torch.Tensor:
    return split_heads(tensor, projection.layout, part, shape)


def _read_z(tensor: torch.Tensor, shape: ModelShape) -> torch.Tensor:
    return tensor.reshape(*tensor.shape[:-1], shape.n_heads, -1)


def _read_result(tensor: torch.Tensor, out: nn.Module, shape: ModelShape) -> torch.Tensor:
    z = _read_z(tensor, shape)
    return torch.einsum("bphd,hdm->bphm", z, matrix(out).reshape(*z.shape[-2:], -1))


_FROM_CALL: dict[str, Callable[[AttentionCall], torch.Tensor]] = {
    "rot_q": lambda call: call.query.transpose(1, 2),
    "rot_k": lambda call: call.key.transpose(1, 2),
    "attn_scores": lambda call: call.scores.transpose(1, 2),
    "pattern": lambda call: call.pattern.transpose(1, 2),
}


def _norm(norm: nn.Module, what: str, kind: Literal["LN", "RMS"]) -> _Place:
    """Read a norm as TransformerLens 2.16 means it: LayerNorm's `normalized` has weight and bias, RMSNorm's not."""
    if what == "hook_scale":
        return norm, "input", partial(_norm_scale, kind=kind, epsilon=norm_epsilon(norm))
    if kind == "LN":
        return norm, "output", _same
    return norm, "input", partial(_rms_normalized, epsilon=norm_epsilon(norm))


def _norm_scale(tensor: torch.Tensor, kind: Literal["LN", "RMS"], epsilon: float) -> torch.Tensor:
    wide = tensor.float()
    if kind == "LN":
        wide = wide - wide.mean(-1, keepdim=True)
    return (wide.square().mean(-1, keepdim=True) + epsilon).sqrt()


def _rms_normalized(tensor: torch.Tensor, epsilon: float) -> torch.Tensor:
    return (tensor.float() / _norm_scale(tensor, "RMS", epsilon)).to(tensor.dtype)

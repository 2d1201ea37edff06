"""Which TransformerLens names a model has, with the axes of each, in the order in which they fire.

Source: TransformerLens 2.16 (`HookedTransformer`, `TransformerBlock`, `AbstractAttention`, `GatedMLP`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Axis = str
"""`head`, `kv_head`, `d_head`, `d_model`, `d_mlp`, `key_position`, or `one` for a kept axis of length 1."""


@dataclass(frozen=True)
class ModelShape:
    """The sizes and the few structural facts that decide which names exist."""

    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_mlp: int
    d_vocab: int
    n_ctx: int
    norm: Literal["LN", "RMS"]
    learned_positions: bool
    rotary: bool
    parallel: bool
    gated: bool

    def axis_size(self, axis: Axis, context_length: int) -> int:
        """Return the length of a named axis; `key_position` is as long as the context."""
        sizes = {
            "one": 1,
            "head": self.n_heads,
            "kv_head": self.n_kv_heads,
            "d_head": self.d_head,
            "d_model": self.d_model,
            "d_mlp": self.d_mlp,
            "key_position": context_length,
        }
        return sizes[axis]


@dataclass(frozen=True)
class HookPoint:
    """One named activation of a model."""

    name: str
    axes: tuple[Axis, ...]
    """Axes of one row (one token), outermost first."""
    layer: int | None
    meaning: str
    on_request: bool = False
    """True where a wildcard does not reach: large, and given by other names."""
    float32: bool = False
    """True where TransformerLens keeps float32 in a half-precision model."""

    @property
    def kind(self) -> str:
        """The name without its layer: `blocks.3.attn.hook_z` is of kind `attn.hook_z`."""
        return self.name.split(".", 2)[2] if self.layer is not None else self.name

    def row_shape(self, shape: ModelShape, context_length: int) -> tuple[int, ...]:
        """Return the shape of one row."""
        return tuple(shape.axis_size(axis, context_length) for axis in self.axes)


def build_catalogue(shape: ModelShape) -> dict[str, HookPoint]:
    """Return every hook point of a decoder of this shape by name, in firing order."""
    points = [HookPoint("hook_embed", ("d_model",), None, "token embedding")]
    if shape.learned_positions:
        points.append(HookPoint("hook_pos_embed", ("d_model",), None, "position embedding"))
    for layer in range(shape.n_layers):
        points.extend(_block_points(shape, layer))
    points.extend(_norm_points("ln_final", None, "final norm"))
    return {point.name: point for point in points}


def _block_points(shape: ModelShape, layer: int) -> Iterator[HookPoint]:
    prefix = f"blocks.{layer}."

    def point(kind: str, axes: tuple[Axis, ...], meaning: str, *, on_request: bool = False) -> HookPoint:
        float32 = kind in {"attn.hook_attn_scores", "attn.hook_pattern"}
        return HookPoint(prefix + kind, axes, layer, meaning, on_request=on_request, float32=float32)

    yield point("hook_resid_pre", ("d_model",), "residual stream entering the block")
    yield from _norm_points(prefix + "ln1", layer, "norm before attention")
    yield point("attn.hook_q", ("head", "d_head"), "queries, before rotary")
    yield point("attn.hook_k", ("kv_head", "d_head"), "keys, before rotary")
    yield point("attn.hook_v", ("kv_head", "d_head"), "values")
    if shape.rotary:
        yield point("attn.hook_rot_q", ("head", "d_head"), "queries after rotary")
        yield point("attn.hook_rot_k", ("kv_head", "d_head"), "keys after rotary")
    yield point("attn.hook_attn_scores", ("head", "key_position"), "scores before softmax, -inf where masked")
    yield point("attn.hook_pattern", ("head", "key_position"), "attention of this token to each position")
    yield point("attn.hook_z", ("head", "d_head"), "values mixed by the pattern")
    yield point("attn.hook_result", ("head", "d_model"), "what each head writes: z W_O", on_request=True)
    yield point("hook_attn_out", ("d_model",), "what attention adds to the residual stream")
    if not shape.parallel:
        yield point("hook_resid_mid", ("d_model",), "residual stream between attention and MLP")
    yield from _norm_points(prefix + "ln2", layer, "norm before the MLP")
    yield point("mlp.hook_pre", ("d_mlp",), "MLP before the non-linearity (the gate branch where there is one)")
    if shape.gated:
        yield point("mlp.hook_pre_linear", ("d_mlp",), "linear branch of a gated MLP")
    yield point("mlp.hook_post", ("d_mlp",), "MLP neurons: what W_out multiplies")
    yield point("hook_mlp_out", ("d_model",), "what the MLP adds to the residual stream")
    yield point("hook_resid_post", ("d_model",), "residual stream leaving the block")


def _norm_points(prefix: str, layer: int | None, meaning: str) -> Iterator[HookPoint]:
    yield HookPoint(f"{prefix}.hook_scale", ("one",), layer, f"{meaning}: divisor", float32=True)
    yield HookPoint(f"{prefix}.hook_normalized", ("d_model",), layer, f"{meaning}: normalized input")

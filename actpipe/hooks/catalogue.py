"""Which TransformerLens names a model has, with the axes of each, in the order in which they fire.

Source: TransformerLens 2.16 (`HookedTransformer`, `TransformerBlock`, `AbstractAttention`, `GatedMLP`, `MoE`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Axis = str
"""`head`, `kv_head`, `d_head`, `d_qk`, `d_model`, `d_mlp`, `expert`, `key_position`, or `one` for a kept axis."""

Norm = Literal["LN", "RMS"]
Mlp = Literal["plain", "gated", "experts", "opaque"]


@dataclass(frozen=True)
class BlockShape:
    """The sizes and the structural facts of one block that decide which names it has."""

    n_heads: int
    n_kv_heads: int
    d_head: int
    """Length of a value vector, and of a head's z."""
    d_qk: int
    """Length of a query or key vector; `d_head` but for latent attention."""
    d_mlp: int
    """Neurons of a plain or gated MLP, else 0."""
    mlp: Mlp
    """`experts` for a router and experts; `opaque` where only its output can be named."""
    n_experts: int = 0
    n_experts_per_token: int = 0
    projections: bool = True
    """Whether queries, keys and values exist before rotary, each as one projection of the norm's output."""
    rotary: bool = False
    parallel: bool = False
    """Whether attention and MLP both read the block's input."""
    ln1: bool = True
    ln2: bool = True
    ln1_post: bool = False
    ln2_post: bool = False
    qk_norm: Literal["none", "head", "all"] = "none"
    """`head`: over each head's vector; `all`: over all heads together."""
    attention: bool = True
    """Whether queries, keys and a pattern are seen."""
    z: bool = True
    """Whether one projection mixes the heads into what attention puts out."""
    gated_z: bool = False
    """Whether something stands between the mixed values and that projection."""
    branches: tuple[str, ...] = ("hook_attn_out", "hook_mlp_out")
    """What is added to the stream, in order; none where the block does something else to it."""
    others: tuple[tuple[str, int], ...] = ()
    """More outputs of modules by name, with their lengths."""

    def axis_size(self, axis: Axis) -> int:
        """Return the length of an axis that belongs to the block."""
        sizes = {
            "head": self.n_heads,
            "kv_head": self.n_kv_heads,
            "d_head": self.d_head,
            "d_qk": self.d_qk,
            "d_mlp": self.d_mlp,
            "expert": self.n_experts,
            "choice": self.n_experts_per_token,
            "q_all": self.n_heads * self.d_qk,
            "k_all": self.n_kv_heads * self.d_qk,
            **{f"d_{kind}": size for kind, size in self.others},
        }
        return sizes[axis]


@dataclass(frozen=True)
class ModelShape:
    """The sizes and the few structural facts that decide which names exist."""

    d_model: int
    d_vocab: int
    n_ctx: int
    norm: Norm
    learned_positions: bool
    """Whether a position embedding is added to the token embedding."""
    blocks: tuple[BlockShape, ...]
    final_norm: bool = True
    embed_norm: bool = False
    """Whether the embedding passes a norm of its own before the first block."""
    logit_softcap: float | None = None
    withheld: tuple[str, ...] = ()
    """Kinds of hook points that are not offered, as no identity proves them."""

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @property
    def n_heads(self) -> int:
        """Heads of the first block."""
        return self.blocks[0].n_heads

    @property
    def n_kv_heads(self) -> int:
        """Key and value heads of the first block."""
        return self.blocks[0].n_kv_heads

    @property
    def d_head(self) -> int:
        """Length of a value vector of the first block."""
        return self.blocks[0].d_head

    @property
    def d_mlp(self) -> int:
        """Neurons of the largest MLP; 0 where there are only experts."""
        return max(block.d_mlp for block in self.blocks)

    def axis_size(self, axis: Axis, layer: int | None, context_length: int) -> int:
        """Return the length of a named axis; `key_position` is as long as the context."""
        sizes = {"one": 1, "d_model": self.d_model, "key_position": context_length}
        if axis in sizes or layer is None:
            return sizes[axis]
        return self.blocks[layer].axis_size(axis)


@dataclass(frozen=True)
class HookPoint:
    """One named activation of a model."""

    name: str
    axes: tuple[Axis, ...]
    """Axes of one row (one token), outermost first."""
    layer: int | None
    meaning: str
    on_request: str = ""
    """Where a wildcard does not reach, because another name gives it: which."""
    float32: bool = False
    """True where TransformerLens keeps float32 in a half-precision model."""
    integer: bool = False
    """True where values are numbers of something."""

    @property
    def kind(self) -> str:
        """The name without its layer: `blocks.3.attn.hook_z` is of kind `attn.hook_z`."""
        return self.name.split(".", 2)[2] if self.layer is not None else self.name

    @property
    def looks_at_keys(self) -> bool:
        """Whether its last axis is over key positions, as that of scores and patterns is."""
        return self.axes[-1:] == ("key_position",)

    def row_shape(self, shape: ModelShape, context_length: int) -> tuple[int, ...]:
        """Return the shape of one row."""
        return tuple(shape.axis_size(axis, self.layer, context_length) for axis in self.axes)

    def row_size(self, shape: ModelShape, context_length: int) -> int:
        """Return the number of values of one row."""
        return math.prod(self.row_shape(shape, context_length))


def build_catalogue(shape: ModelShape) -> dict[str, HookPoint]:
    """Return every hook point of a decoder of this shape by name, in firing order."""
    points = [HookPoint("hook_tokens", (), None, "token ids", on_request="tokens/input_ids", integer=True)]
    if shape.embed_norm:
        points.extend(_norm_points("embed.ln", None, "norm of the embedding"))
    points.append(HookPoint("hook_embed", ("d_model",), None, "token embedding, as the first block gets it"))
    if shape.learned_positions:
        points.append(HookPoint("hook_pos_embed", ("d_model",), None, "position embedding"))
    for layer, block in enumerate(shape.blocks):
        points.extend(_block_points(block, layer))
    if shape.final_norm:
        points.extend(_norm_points("ln_final", None, "final norm"))
    return {point.name: point for point in points if point.kind not in shape.withheld}


def _block_points(block: BlockShape, layer: int) -> Iterator[HookPoint]:
    prefix = f"blocks.{layer}."

    def point(kind: str, axes: tuple[Axis, ...], meaning: str, on_request: str = "") -> HookPoint:
        return HookPoint(prefix + kind, axes, layer, meaning, on_request=on_request)

    yield point("hook_resid_pre", ("d_model",), "residual stream entering the block")
    if block.attention:
        for kind, axis in _copies(block):
            yield point(kind, (axis, "d_model"), "the block's input, once for each head", f"{prefix}hook_resid_pre")
    if block.ln1:
        yield from _norm_points(prefix + "ln1", layer, "norm before attention")
    if block.attention:
        yield from _attention_points(block, prefix, layer)
    for kind, _ in block.others:
        length: Axis = "d_model" if kind in block.branches else f"d_{kind}"
        yield point(kind, (length,), f"what {kind.removesuffix('.hook_out')} puts out")
    if block.ln1_post:
        yield from _norm_points(prefix + "ln1_post", layer, "norm of what attention puts out")
    if "hook_attn_out" in block.branches:
        yield point("hook_attn_out", ("d_model",), "what attention adds to the residual stream")
    yield from _mlp_side(block, prefix, layer)
    yield point("hook_resid_post", ("d_model",), "residual stream leaving the block")


def _copies(block: BlockShape) -> Iterator[tuple[str, Axis]]:
    if block.n_heads == block.n_kv_heads:
        yield "hook_attn_in", "head"
    yield from {"hook_q_input": "head", "hook_k_input": "kv_head", "hook_v_input": "kv_head"}.items()


def _mlp_side(block: BlockShape, prefix: str, layer: int) -> Iterator[HookPoint]:
    def point(kind: str, meaning: str, on_request: str = "") -> HookPoint:
        return HookPoint(prefix + kind, ("d_model",), layer, meaning, on_request=on_request)

    second_input = "hook_resid_pre" if block.parallel else "hook_resid_mid"
    if "hook_mlp_out" in block.branches:
        if not block.parallel:
            yield point("hook_resid_mid", "residual stream between attention and MLP")
        yield point("hook_mlp_in", "residual stream that the MLP's norm reads", prefix + second_input)
    if block.ln2:
        yield from _norm_points(prefix + "ln2", layer, "norm before the MLP")
    yield from _mlp_points(block, prefix, layer)
    if block.ln2_post:
        yield from _norm_points(prefix + "ln2_post", layer, "norm of what the MLP puts out")
    if "hook_mlp_out" in block.branches:
        yield point("hook_mlp_out", "what the MLP adds to the residual stream")


def _attention_points(block: BlockShape, prefix: str, layer: int) -> Iterator[HookPoint]:
    def point(
        kind: str, axes: tuple[Axis, ...], meaning: str, *, float32: bool = False, on_request: str = ""
    ) -> HookPoint:
        return HookPoint(f"{prefix}attn.{kind}", axes, layer, meaning, on_request=on_request, float32=float32)

    vector: Axis = "d_head" if block.d_qk == block.d_head else "d_qk"
    if block.projections:
        yield point("hook_q", ("head", vector), "queries, before norm and rotary")
        yield point("hook_k", ("kv_head", vector), "keys, before norm and rotary")
    yield point("hook_v", ("kv_head", "d_head"), "values")
    if block.qk_norm != "none":
        for which, axis in (("q", "head"), ("k", "kv_head")):
            heads: tuple[Axis, ...] = (axis,) if block.qk_norm == "head" else ()
            length: Axis = vector if block.qk_norm == "head" else f"{which}_all"
            yield point(f"{which}_norm.hook_scale", (*heads, "one"), f"norm of {which}: divisor", float32=True)
            yield point(f"{which}_norm.hook_normalized", (*heads, length), f"norm of {which}: normalized input")
    if block.rotary:
        yield point("hook_rot_q", ("head", vector), "queries after rotary")
        yield point("hook_rot_k", ("kv_head", vector), "keys after rotary")
    pairs = ("head", "key_position")
    yield point("hook_attn_scores", pairs, "scores before softmax, -inf where masked", float32=True)
    yield point("hook_pattern", pairs, "attention of this token to each position", float32=True)
    if block.gated_z:
        yield point("hook_z_ungated", ("head", "d_head"), "values mixed by the pattern, before what follows them")
    if not block.z:
        return
    yield point("hook_z", ("head", "d_head"), "what W_O multiplies: values mixed by the pattern")
    yield point("hook_result", ("head", "d_model"), "what each head writes: z W_O", on_request=f"{prefix}attn.hook_z")


def _mlp_points(block: BlockShape, prefix: str, layer: int) -> Iterator[HookPoint]:
    def point(
        kind: str, axes: tuple[Axis, ...], meaning: str, *, float32: bool = False, integer: bool = False
    ) -> HookPoint:
        return HookPoint(f"{prefix}mlp.{kind}", axes, layer, meaning, float32=float32, integer=integer)

    if block.mlp in ("plain", "gated"):
        yield point("hook_pre", ("d_mlp",), "MLP before the non-linearity (the gate branch where there is one)")
        if block.mlp == "gated":
            yield point("hook_pre_linear", ("d_mlp",), "linear branch of a gated MLP")
        yield point("hook_post", ("d_mlp",), "MLP neurons: what W_out multiplies")
    elif block.mlp == "experts":
        yield point("hook_router_logits", ("expert",), "router before softmax", float32=True)
        yield point(
            "hook_expert_weights", ("expert",), "probability of every expert, before any is chosen", float32=True
        )
        yield point("hook_expert_indices", ("choice",), "experts that were chosen", integer=True)


def _norm_points(prefix: str, layer: int | None, meaning: str) -> Iterator[HookPoint]:
    yield HookPoint(f"{prefix}.hook_scale", ("one",), layer, f"{meaning}: divisor", float32=True)
    yield HookPoint(f"{prefix}.hook_normalized", ("d_model",), layer, f"{meaning}: normalized input")

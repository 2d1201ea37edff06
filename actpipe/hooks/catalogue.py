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
Stack = Literal["blocks", "encoder", "decoder"]


_BRANCHES = ("hook_attn_out", "hook_mlp_out")


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
    branches: tuple[str, ...] = _BRANCHES
    """What is added to the stream, in order; none where the block does something else to it."""
    others: tuple[tuple[str, int], ...] = ()
    """More outputs of modules by name, with their lengths."""
    stack: Stack = "blocks"
    """How its names begin: `encoder` or `decoder` where a model has both."""
    post_norm: bool = False
    """Whether norms stand after each sum, as in BERT, and not before each branch."""
    causal: bool = True
    """Whether a token attends to none after it."""
    cross: bool = False
    """Whether a second attention, between the first and the MLP, looks at the encoder's output."""
    relative_bias: bool = False
    """Whether the block holds the learned bias of scores by distance, which its stack shares."""

    @property
    def mlp_norm(self) -> str:
        """The norm beside the MLP: the last of the block."""
        return "ln3" if self.cross else "ln2"

    @property
    def mlp_stream(self) -> str:
        """The activation that the MLP's side of the block reads."""
        return "hook_resid_pre" if self.parallel else "hook_resid_mid_cross" if self.cross else "hook_resid_mid"

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
    embed_norm: bool = False
    """Whether the embedding passes a norm of its own before the first block."""
    logit_softcap: float | None = None
    withheld: tuple[str, ...] = ()
    """Kinds of hook points that are not offered, as no identity proves them."""
    final_norm: bool = True
    """Whether a norm stands after the last block."""
    token_types: int = 0
    """Kinds of segment that the embedding tells apart."""
    masked_head: bool = False
    """Whether a layer and a norm stand between the last block and the unembedding, as in BERT."""
    next_sentence: bool = False
    """Whether a second head says if one sentence follows the other."""

    @property
    def n_layers(self) -> int:
        """Number of blocks; those of the encoder and then those of the decoder where a model has both."""
        return len(self.blocks)

    @property
    def encoder_decoder(self) -> bool:
        """Whether the model has an encoder and a decoder."""
        return self.blocks[0].stack == "encoder"

    @property
    def causal(self) -> bool:
        """Whether every block predicts the next token; otherwise there are no next-token metrics."""
        return all(block.causal for block in self.blocks)

    @property
    def sums_to_logits(self) -> bool:
        """Whether what the blocks write adds up to the stream that the final norm and the unembedding read."""
        written = {"hook_embed", "hook_pos_embed", *_BRANCHES, "ln_final.hook_scale", "ln_final.hook_normalized"}
        usual = all(block.branches == _BRANCHES and not block.post_norm for block in self.blocks)
        return self.causal and usual and self.final_norm and not written & set(self.withheld)

    def block_name(self, layer: int) -> str:
        """Return how the names of a block begin: `blocks.3`, or `decoder.0` for the first after the encoder's."""
        stack = self.blocks[layer].stack
        first = next(number for number, block in enumerate(self.blocks) if block.stack == stack)
        return f"{stack}.{layer - first}"

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
        sizes = {"one": 1, "answer": 2, "d_model": self.d_model, "key_position": context_length}
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
    """Number of its block among all blocks of the model."""
    meaning: str
    on_request: str = ""
    """Where a wildcard does not reach, because another name gives it: which."""
    float32: bool = False
    """True where TransformerLens keeps float32 in a half-precision model."""
    integer: bool = False
    """True where values are numbers of something."""
    not_stored: str = ""
    """Why a corpus does not give one of it for each token, where it does not."""

    @property
    def kind(self) -> str:
        """The name without its layer: `blocks.3.attn.hook_z` is of kind `attn.hook_z`."""
        return self.name.split(".", 2)[2] if self.layer is not None else self.name

    @property
    def block(self) -> str:
        """The block as names begin, `blocks.3`; empty outside the blocks."""
        return self.name[: -len(self.kind) - 1] if self.layer is not None else ""

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


def block_points(shape: ModelShape, layer: int) -> Iterator[HookPoint]:
    """Yield the hook points of a block whose norms stand before its branches."""
    block, prefix = shape.blocks[layer], f"{shape.block_name(layer)}."

    def point(kind: str, axes: tuple[Axis, ...], meaning: str, on_request: str = "") -> HookPoint:
        return HookPoint(prefix + kind, axes, layer, meaning, on_request=on_request)

    yield point("hook_resid_pre", ("d_model",), "residual stream entering the block")
    if block.attention:
        for kind, axis in _copies(block):
            yield point(kind, (axis, "d_model"), "the block's input, once for each head", f"{prefix}hook_resid_pre")
    if block.ln1:
        yield from norm_points(prefix + "ln1", layer, "norm before attention")
    if block.attention:
        yield from attention_points(block, prefix, layer)
    for kind, _ in block.others:
        length: Axis = "d_model" if kind in block.branches else f"d_{kind}"
        yield point(kind, (length,), f"what {kind.removesuffix('.hook_out')} puts out")
    if block.ln1_post:
        yield from norm_points(prefix + "ln1_post", layer, "norm of what attention puts out")
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

    if "hook_mlp_out" in block.branches:
        after_attention = "cross-attention" if block.cross else "MLP"
        if not block.parallel:
            yield point("hook_resid_mid", f"residual stream between attention and {after_attention}")
        if block.cross:
            yield from cross_points(block, prefix, layer)
        yield point("hook_mlp_in", "residual stream that the MLP's norm reads", prefix + block.mlp_stream)
    if block.ln2:
        yield from norm_points(prefix + block.mlp_norm, layer, "norm before the MLP")
    yield from mlp_points(block, prefix, layer)
    if block.ln2_post:
        yield from norm_points(prefix + "ln2_post", layer, "norm of what the MLP puts out")
    if "hook_mlp_out" in block.branches:
        yield point("hook_mlp_out", "what the MLP adds to the residual stream")


def cross_points(block: BlockShape, prefix: str, layer: int) -> Iterator[HookPoint]:
    """Yield the hook points of cross-attention, from the stream that it reads to the one that it leaves."""
    read = f"{prefix}hook_resid_mid"
    meaning = "residual stream that cross-attention's norm reads"
    yield HookPoint(f"{prefix}hook_cross_attn_in", ("d_model",), layer, meaning, on_request=read)
    if not block.post_norm:
        yield from norm_points(f"{prefix}ln2", layer, "norm before cross-attention")
    yield from attention_points(block, prefix, layer, where="cross_attn")
    yield HookPoint(f"{prefix}hook_cross_attn_out", ("d_model",), layer, "what cross-attention adds to the stream")
    stream = "residual stream between cross-attention and MLP"
    yield HookPoint(f"{prefix}hook_resid_mid_cross", ("d_model",), layer, stream)


def attention_points(block: BlockShape, prefix: str, layer: int, *, where: str = "attn") -> Iterator[HookPoint]:
    """Yield the hook points inside an attention module."""

    def point(
        kind: str, axes: tuple[Axis, ...], meaning: str, *, float32: bool = False, on_request: str = ""
    ) -> HookPoint:
        return HookPoint(f"{prefix}{where}.{kind}", axes, layer, meaning, on_request=on_request, float32=float32)

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
    yield point(
        "hook_result", ("head", "d_model"), "what each head writes: z W_O", on_request=f"{prefix}{where}.hook_z"
    )


def mlp_points(block: BlockShape, prefix: str, layer: int) -> Iterator[HookPoint]:
    """Yield the hook points inside an MLP."""

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


def norm_points(prefix: str, layer: int | None, meaning: str) -> Iterator[HookPoint]:
    """Yield the two hook points of a norm."""
    yield HookPoint(f"{prefix}.hook_scale", ("one",), layer, f"{meaning}: divisor", float32=True)
    yield HookPoint(f"{prefix}.hook_normalized", ("d_model",), layer, f"{meaning}: normalized input")

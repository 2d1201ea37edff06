"""What one architecture says of itself: where its parts are, and how they are put together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Layout = Literal["whole", "columns", "grouped", "codegen", "first_half", "second_half"]
"""Which part of a module's output a projection is.

`whole`: all of it, heads in order.
`columns`: one module computes all q heads, then all k heads, then all v heads (GPT-2).
`grouped`: one module computes, for each key head, the q heads that share it, then k, then v (GPT-NeoX, Falcon).
`codegen`: in four blocks, each with a quarter of the q heads, then of the v heads, then of the k heads.
`first_half`, `second_half`: one module computes both branches of a gated MLP (Phi-3).
"""

Config = Any
"""A transformers configuration."""
Paths = str | tuple[str, ...]
"""A path inside the block; of several, the first that the block has."""


@dataclass(frozen=True)
class Projection:
    """Where queries, keys, values or neurons come from."""

    module: Paths
    """Path inside the block."""
    layout: Layout | Callable[[Config], Layout] = "whole"

    def layout_in(self, config: Config) -> Layout:
        """Return the layout that this configuration asks for."""
        return self.layout(config) if callable(self.layout) else self.layout


@dataclass(frozen=True)
class CrossAttention:
    """Where the attention of a decoder's block to the encoder's output is."""

    attention: str
    q: Projection
    k: Projection
    v: Projection
    out: str


@dataclass(frozen=True)
class Heads:
    """What an encoder has above its last block; paths start at the whole model."""

    dense: str
    """The layer before the unembedding."""
    norm: str
    """The norm after that layer."""
    pooler: str | None = None
    next_sentence: str | None = None
    """Both only in models that were loaded with them."""
    activation: Callable[[Config], str] = lambda config: config.hidden_act
    """Name of what stands between the layer and the norm."""


def fused(module: str, layout: Layout | Callable[[Config], Layout]) -> dict[str, Any]:
    """Return the entries of q, k and v for one module that computes all three."""
    return {which: Projection(module, layout) for which in ("q", "k", "v")}


def n_heads(config: Config) -> int:
    """Return the number of attention heads that a configuration asks for."""
    return int(config.num_attention_heads)


@dataclass(frozen=True)
class Family:
    """One architecture. Paths of `blocks`, `embed`, `pos_embed` and the norms beside them start at the base model."""

    name: str
    model_types: tuple[str, ...]
    """Values of `config.model_type` that this entry is for."""
    norm: Literal["LN", "RMS"]
    embed: str
    blocks: str
    final_norm: str | None
    ln1: Paths | None
    attention: str | None
    """The module that runs attention; where it adds the residual stream itself, see `attn_out`."""
    q: Projection | None
    """None where queries and keys are put together from latent vectors."""
    k: Projection | None
    v: Projection | None
    out: str | None
    """The projection whose weight is W_O."""
    ln2: Paths | None
    """The norm before the MLP; in some parallel blocks the same module as `ln1`, beside cross-attention its norm."""
    mlp: str | None
    """The module that runs the MLP; where it adds the residual stream itself, its last projection."""
    w_in: Projection | None
    w_out: str | None
    w_gate: Projection | None = None
    gated: Callable[[Config], bool] = lambda _: True
    """Whether the gate, where one is named, is there in this configuration."""
    router: str | None = None
    """The module that scores experts, in those blocks that have it."""
    router_scores: Literal["softmax", "sigmoid"] = "softmax"

    embed_norm: str | None = None
    """Norm between the embedding and the first block."""
    pos_embed: str | None = None
    """Module of the position embedding that is added, where there is one."""
    pos_embed_offset: int | Callable[[Config], int] = 0
    """Rows of its table before position 0."""
    ln1_post: str | None = None
    ln2_post: str | None = None
    attn_out: str | None = None
    """The module whose output attention adds to the stream, where it is not `attention` or `ln1_post`."""
    q_norm: str | None = None
    k_norm: str | None = None
    """Norms of queries and keys before rotary, in those blocks that have them."""
    qk_norm: Literal["LN", "RMS"] = "RMS"
    qk_norm_input: Literal["positions_first", "heads_first", "all_heads"] = "positions_first"
    """Axes of what the norms take: `(position, head, d)`, `(head, position, d)` or `(position, head * d)`."""
    sinks: str | None = None
    """Parameter inside the block: one more score per head, of a key that has no value."""

    norm_offset: float = 0.0
    """What is added to a norm's weight before it multiplies (Gemma: 1)."""
    norm_epsilon: float | None = None
    """Where the module does not say it."""
    rotary: bool | Callable[[Config], bool] = False
    alibi: bool | Callable[[Config], bool] = False
    parallel: bool | Callable[[Config], bool] = False
    """Whether attention and MLP both read the block's input."""
    flat_mlp: bool = False
    """Whether the MLP sees batch and positions as one axis."""
    sees_attention_by: Literal["interface", "softmax"] = "interface"
    """Whether attention goes through transformers' attention interface, or by code of the model's own."""
    n_kv_heads: Callable[[Config], int] = lambda config: getattr(config, "num_key_value_heads", None) or n_heads(config)
    embed_scale: Callable[[Config], float] = lambda _: 1.0
    """What the token embedding is multiplied with."""
    branch_scale: Callable[[Config], float] = lambda _: 1.0
    """What attention's and the MLP's outputs are multiplied with before they are added."""
    logit_scale: Callable[[Config], float] = lambda _: 1.0
    """What the unembedding's output is multiplied with."""
    n_heads: Callable[[Config], int] = n_heads
    d_qk: Callable[[Config], int] | None = None
    """Length of a query vector, where it is not that of a value vector."""
    branches: tuple[str, ...] = ("hook_attn_out", "hook_mlp_out")
    """What the block adds to the stream, in order; none where it does something else to it."""
    others: Mapping[str, str] = field(default_factory=dict)
    """More outputs of modules by name: path inside the block."""
    gated_z: bool = False
    """Whether something stands between the mixed values and the projection that W_O is."""
    layers: tuple[Family, ...] = ()
    """One entry per layer, where layers are not alike."""
    withheld: Mapping[str, str] = field(default_factory=dict)
    """Kinds of hook points that are not offered: which identity does not hold."""
    by_structure: bool = False
    """Whether nobody wrote this entry: it was found out by running a small model."""
    default_prepend_bos: bool = True
    """TransformerLens' `default_prepend_bos`."""

    task: Literal["causal", "masked", "seq2seq"] = "causal"
    """What the model was trained for, which decides the class that is loaded."""
    post_norm: bool = False
    """Whether norms stand after each sum (BERT); then `ln1` is attention's and the last one the MLP's."""
    causal: bool = True
    """Whether a token attends to none after it."""
    cross: CrossAttention | None = None
    ln3: str | None = None
    """The MLP's norm in a block with cross-attention."""
    relative_bias: str | None = None
    """Table of the bias of scores by distance, in the block that has it."""
    token_type_embed: str | None = None
    heads: Heads | None = None
    unembed_input_scale: Callable[[Config], float] = lambda _: 1.0
    """What the final norm's output is multiplied with before the unembedding."""
    logit_bias: str | None = None
    """What is added to the unembedding's output, where the unembedding has no bias of its own."""
    takes_position_ids: bool = True
    """Whether positions may be given, as padding on the left needs where they are learned."""
    pads_have_no_position: bool = False
    """Whether the model counts positions over ids that are not padding, from `pos_embed_offset` on (RoBERTa)."""
    decoder: Family | None = None
    """The second stack; then this entry is that of the encoder, and holds what both share."""

    def position_offset(self, config: Config) -> int:
        """Return the rows of the position table before position 0."""
        return self.pos_embed_offset(config) if callable(self.pos_embed_offset) else self.pos_embed_offset

    @property
    def stack(self) -> Literal["blocks", "encoder", "decoder"]:
        """How the names of its blocks begin."""
        if self.decoder is not None:
            return "encoder"
        return "blocks" if self.cross is None else "decoder"

    def gate(self, config: Config) -> Projection | None:
        """Return the gate of the MLP, where this configuration has one."""
        return self.w_gate if self.gated(config) else None

    def is_rotary(self, config: Config) -> bool:
        """Whether queries and keys are rotated by their position."""
        return self.rotary(config) if callable(self.rotary) else self.rotary

    def is_alibi(self, config: Config) -> bool:
        """Whether scores are lowered by distance."""
        return self.alibi(config) if callable(self.alibi) else self.alibi

    def is_parallel(self, config: Config) -> bool:
        """Whether attention and MLP both read the block's input."""
        return self.parallel(config) if callable(self.parallel) else self.parallel


def latent_size(config: Config) -> int:
    """Return the length of a query that is put together from latent vectors."""
    return int(config.qk_nope_head_dim + config.qk_rope_head_dim)


def gpt_layout(name: str, *model_types: str, **differences: Any) -> Family:
    """Return an entry laid out as GPT-2's descendants are, but for the differences."""
    return Family(
        **{
            "name": name,
            "model_types": model_types,
            "norm": "LN",
            "embed": "wte",
            "blocks": "h",
            "final_norm": "ln_f",
            "ln1": "ln_1",
            "attention": "attn",
            "out": "attn.c_proj",
            "ln2": "ln_2",
            "mlp": "mlp",
            "w_in": Projection("mlp.c_fc"),
            "w_out": "mlp.c_proj",
            **differences,
        }
    )


def llama_layout(name: str, *model_types: str, **differences: Any) -> Family:
    """Return an entry laid out as Llama is, but for the differences."""
    return Family(
        **{
            "name": name,
            "model_types": model_types,
            "norm": "RMS",
            "embed": "embed_tokens",
            "blocks": "layers",
            "final_norm": "norm",
            "ln1": "input_layernorm",
            "attention": "self_attn",
            "q": Projection("self_attn.q_proj"),
            "k": Projection("self_attn.k_proj"),
            "v": Projection("self_attn.v_proj"),
            "out": "self_attn.o_proj",
            "ln2": "post_attention_layernorm",
            "mlp": "mlp",
            "w_in": Projection("mlp.up_proj"),
            "w_gate": Projection("mlp.gate_proj"),
            "w_out": "mlp.down_proj",
            "rotary": True,
            **differences,
        }
    )

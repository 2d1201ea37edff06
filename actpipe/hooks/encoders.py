"""The names of encoders (BERT) and of encoder-decoders (T5, BART), in the order in which they fire.

Source: TransformerLens 2.16 (`HookedEncoder`, `BertEmbed`, `BertBlock`, `BertMLMHead`, `BertPooler`, `BertNSPHead`;
`HookedEncoderDecoder`, `T5Block`). BART, which is not in there, has BERT's blocks in T5's places.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from actpipe.hooks.catalogue import (
    HookPoint,
    ModelShape,
    attention_points,
    block_points,
    cross_points,
    mlp_points,
    norm_points,
)

_ONE_PER_SEQUENCE = "it is one value for each sequence"
_NO_DECODER_INPUT = "a corpus gives the encoder's input and none for the decoder"


def encoder_points(shape: ModelShape) -> Iterator[HookPoint]:
    """Yield every hook point of an encoder with a head, in firing order."""
    yield from _summed_embedding(shape)
    for layer in range(shape.n_layers):
        yield from post_norm_points(shape, layer)
    if shape.masked_head:
        yield from norm_points("mlm_head.ln", None, "norm before the unembedding")
    if shape.next_sentence:
        last = f"{shape.block_name(shape.n_layers - 1)}.hook_normalized_resid_post"
        for name, axes, meaning in (
            ("pooler.hook_pooler_out", ("d_model",), "the first token's stream, once more through a layer and tanh"),
            ("nsp_head.hook_nsp_out", ("answer",), "logits of: the second segment follows, or does not"),
        ):
            yield HookPoint(name, axes, None, meaning, on_request=last, not_stored=_ONE_PER_SEQUENCE)


def encoder_decoder_points(shape: ModelShape) -> Iterator[HookPoint]:
    """Yield every hook point of an encoder-decoder, in firing order; the decoder's embedding has none."""
    if shape.embed_norm:
        yield from _summed_embedding(shape)
    else:
        yield HookPoint("hook_embed", ("d_model",), None, "token embedding, as the encoder's first block gets it")
    for layer, block in enumerate(shape.blocks):
        if layer and block.stack != shape.blocks[layer - 1].stack:
            yield from _final_norm(shape, "encoder")
        points = post_norm_points(shape, layer) if block.post_norm else block_points(shape, layer)
        yield from points if block.stack == "encoder" else map(_without_input, points)
    yield from map(_without_input, _final_norm(shape, "decoder"))


def _without_input(point: HookPoint) -> HookPoint:
    return replace(point, not_stored=_NO_DECODER_INPUT)


def _final_norm(shape: ModelShape, stack: str) -> Iterator[HookPoint]:
    if shape.final_norm:
        yield from norm_points(f"{stack}_final_ln", None, f"final norm of the {stack}")


def _summed_embedding(shape: ModelShape) -> Iterator[HookPoint]:
    yield HookPoint("embed.hook_embed", ("d_model",), None, "token embedding")
    yield HookPoint("embed.hook_pos_embed", ("d_model",), None, "position embedding")
    if shape.token_types:
        yield HookPoint("embed.hook_token_type_embed", ("d_model",), None, "embedding of the segment")
    yield from norm_points("embed.ln", None, "norm of the summed embeddings")
    yield HookPoint("hook_full_embed", ("d_model",), None, "embedding, as the first block gets it")


def post_norm_points(shape: ModelShape, layer: int) -> Iterator[HookPoint]:
    """Yield the hook points of a block whose norms stand after its sums."""
    block, prefix = shape.blocks[layer], f"{shape.block_name(layer)}."

    def point(kind: str, meaning: str, on_request: str = "") -> HookPoint:
        return HookPoint(prefix + kind, ("d_model",), layer, meaning, on_request=on_request)

    yield point("hook_resid_pre", "residual stream entering the block")
    for which in ("q", "k", "v") if block.attention else ():
        name = f"{prefix}hook_{which}_input"
        copies = "the block's input, once for each head"
        yield HookPoint(name, ("head", "d_model"), layer, copies, on_request=f"{prefix}hook_resid_pre")
    if block.attention:
        yield from attention_points(block, prefix, layer)
    yield point("hook_attn_out", "what attention adds to the residual stream")
    yield point("hook_resid_mid", "residual stream after attention, before its norm")
    if block.cross:
        yield from norm_points(f"{prefix}ln1", layer, "norm after attention")
        yield from cross_points(block, prefix, layer)
    yield point("hook_mlp_in", "residual stream that the norm before the MLP reads", prefix + block.mlp_stream)
    before, of = ("ln2", "cross-attention") if block.cross else ("ln1", "attention")
    yield from norm_points(prefix + before, layer, f"norm after {of}: what the MLP reads")
    yield from mlp_points(block, prefix, layer)
    yield point("hook_mlp_out", "what the MLP adds to the residual stream")
    yield point("hook_resid_post", "residual stream after the MLP, before its norm")
    yield from norm_points(prefix + block.mlp_norm, layer, "norm after the MLP")
    yield point("hook_normalized_resid_post", "residual stream leaving the block")

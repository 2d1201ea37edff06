"""The names of decoders, in the order in which they fire.

Source: TransformerLens 2.16 (`HookedTransformer`).
"""

from __future__ import annotations

from collections.abc import Iterator

from actpipe.hooks.catalogue import HookPoint, ModelShape, block_points, norm_points
from actpipe.hooks.encoders import post_norm_points


def decoder_points(shape: ModelShape) -> Iterator[HookPoint]:
    """Yield every hook point of a decoder of this shape, in firing order."""
    yield HookPoint("hook_tokens", (), None, "token ids", on_request="tokens/input_ids", integer=True)
    if shape.embed_norm:
        yield from norm_points("embed.ln", None, "norm of the embedding")
    yield HookPoint("hook_embed", ("d_model",), None, "token embedding, as the first block gets it")
    if shape.learned_positions:
        yield HookPoint("hook_pos_embed", ("d_model",), None, "position embedding")
    for layer in range(shape.n_layers):
        points = post_norm_points if shape.blocks[layer].post_norm else block_points
        yield from points(shape, layer)
    if shape.final_norm:
        yield from norm_points("ln_final", None, "final norm")

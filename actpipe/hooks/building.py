"""From a model's shape to its hook points."""

from __future__ import annotations

from actpipe.hooks.catalogue import HookPoint, ModelShape
from actpipe.hooks.decoders import decoder_points
from actpipe.hooks.encoders import encoder_decoder_points, encoder_points


def build_catalogue(shape: ModelShape) -> dict[str, HookPoint]:
    """Return every hook point of a model of this shape by name, in firing order."""
    if shape.encoder_decoder:
        points = encoder_decoder_points(shape)
    else:
        points = decoder_points(shape) if shape.causal else encoder_points(shape)
    return {point.name: point for point in points if point.kind not in shape.withheld}

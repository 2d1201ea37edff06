"""The settings of analyses of weights by their singular vectors."""

from __future__ import annotations

from typing import Annotated, Literal

from actpipe.schemas.base import AnalysisConfig
from actpipe.schemas.choosing import Range
from pydantic import Field, NonNegativeInt, PositiveInt

Numbers = Annotated[tuple[NonNegativeInt | Range, ...], Field(min_length=1)]


class InterpretWeightsConfig(AnalysisConfig):
    """Settings of the stage `interpret_weights`: singular vectors of weights, and the tokens that they point to."""

    stage: Literal["interpret_weights"] = "interpret_weights"
    matrices: Annotated[tuple[Literal["OV", "QK", "W_in", "W_out"], ...], Field(min_length=1)] = ("OV", "W_in", "W_out")
    """Of which matrices: `OV` and `QK` of heads, `W_in` (with the norm's weight folded in) and `W_out` of MLPs."""
    layers: Numbers | None = None
    """Of which layers, such as `[0, "2-4"]`, ends included; by default all."""
    heads: Numbers | None = None
    """Of which heads of each layer; by default all."""
    n_vectors: PositiveInt = 10
    """How many singular vectors of each matrix, those with the largest singular values."""
    n_tokens: PositiveInt = 10
    """How many tokens to list at either end of each singular vector."""
    vocabulary: Literal["W_U", "W_E"] = "W_U"
    """What singular vectors are multiplied with: the unembedding, or the transposed embedding."""
    processed: bool = True
    """Fold norms and centre weights first, as `HookedTransformer.from_pretrained` does by default."""
    shown: NonNegativeInt = 12
    """Singular vectors of each matrix that the report shows: those with a token the most standard deviations out."""

"""The settings of analyses of attention heads and of weights."""

from __future__ import annotations

from typing import Literal

from actpipe.schemas.base import AnalysisConfig
from pydantic import PositiveInt


class ScoreWeightsConfig(AnalysisConfig):
    """Settings of the stage `score_weights`: copying and composition of heads, from weights alone."""

    stage: Literal["score_weights"] = "score_weights"
    processed: bool = True
    """Fold norms and centre weights first, as `HookedTransformer.from_pretrained` does by default."""
    n_tokens: PositiveInt = 1024
    """Tokens, evenly spread over the vocabulary, whose own logit is ranked for the copying scores by rank."""

"""The settings of every analysis: a stage that reads a store and gives a result."""

from __future__ import annotations

from typing import Annotated, Literal

from actpipe.schemas.base import AnalysisConfig
from actpipe.schemas.head_analyses import ScoreWeightsConfig
from pydantic import Field


class SummarizeMetricsConfig(AnalysisConfig):
    """Settings of the stage `summarize_metrics`: stored metrics, such as the loss, by position."""

    stage: Literal["summarize_metrics"] = "summarize_metrics"


class DecomposeResidualConfig(AnalysisConfig):
    """Settings of the stage `decompose_residual`: how much each component writes to the residual stream."""

    stage: Literal["decompose_residual"] = "decompose_residual"
    layer: Annotated[int, Field(ge=0)] | None = None
    """Decompose the residual stream entering this layer; by default that leaving the last one."""


class AttributeLogitsConfig(AnalysisConfig):
    """Settings of the stage `attribute_logits`: direct attribution of the correct next token's logit."""

    stage: Literal["attribute_logits"] = "attribute_logits"
    heads: bool = True
    """Attribute to every head too; needs `attn.hook_z` of every layer."""
    keep_rows: bool = False
    """Keep the attribution of every row, not only the means by component and position."""


class ScoreHeadsConfig(AnalysisConfig):
    """Settings of the stage `score_heads`: how close each head comes to a known pattern."""

    stage: Literal["score_heads"] = "score_heads"
    patterns: tuple[Literal["previous_token_head", "duplicate_token_head", "induction_head"], ...] = (
        "previous_token_head",
        "duplicate_token_head",
        "induction_head",
    )
    """Detection patterns, by TransformerLens' names."""
    exclude_bos: bool = False
    """Leave out attention to the first position."""
    exclude_current_token: bool = False
    """Leave out attention of a token to itself."""


ANALYSES: tuple[type[AnalysisConfig], ...] = (
    SummarizeMetricsConfig,
    DecomposeResidualConfig,
    AttributeLogitsConfig,
    ScoreHeadsConfig,
    ScoreWeightsConfig,
)
"""All of them."""

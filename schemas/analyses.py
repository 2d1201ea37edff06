"""The settings of every analysis: a stage that reads a store and gives a result."""

from __future__ import annotations

from typing import Annotated, Literal

from actpipe.schemas.base import AnalysisConfig, NonEmpty
from actpipe.schemas.direction_analyses import DescribeResidualConfig, FitDirectionsConfig, TopExamplesConfig
from actpipe.schemas.eval_analyses import CompareRunsConfig
from actpipe.schemas.head_analyses import ScoreWeightsConfig
from actpipe.schemas.lens_analyses import LogitLensConfig
from actpipe.schemas.statistic_analyses import SummarizeActivationsConfig
from actpipe.schemas.weight_analyses import InterpretWeightsConfig
from pydantic import Field, PositiveInt


class SummarizeMetricsConfig(AnalysisConfig):
    """Settings of the stage `summarize_metrics`: stored metrics, such as the loss, by position and by other groups."""

    stage: Literal["summarize_metrics"] = "summarize_metrics"
    by: tuple[Literal["position", "document", "token"], ...] = ("position",)
    """What to group tokens by: their position in the sequence, their document, their own id."""
    columns: tuple[NonEmpty, ...] = ()
    """Columns of documents.parquet to group by too, such as a language or a source."""
    examples: PositiveInt = 10
    """How many of the worst and of the best documents to list, where `by` has `document`."""


class DecomposeResidualConfig(AnalysisConfig):
    """Settings of the stage `decompose_residual`: how much each component writes to the residual stream."""

    stage: Literal["decompose_residual"] = "decompose_residual"
    layer: Annotated[int, Field(ge=0)] | None = None
    """Decompose the residual stream entering this layer; by default that leaving the last one."""


class AttributeLogitsConfig(AnalysisConfig):
    """Settings of the stage `attribute_logits`: direct attribution of the correct next token's logit."""

    stage: Literal["attribute_logits"] = "attribute_logits"
    target: Annotated[int, Field(ge=0)] | NonEmpty = "next"
    """Whose logit: `next`, the token that comes next; `top`, the one that the model holds most probable; or one token
    for all rows, by id or by its text (`" the"`), which must be one token."""
    minus: Annotated[int, Field(ge=0)] | NonEmpty | None = None
    """Attribute the difference to this token's logit, by id or text, in place of the logit."""
    by: NonEmpty | None = None
    """A column of documents.parquet: means for each of its values too."""
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
    LogitLensConfig,
    CompareRunsConfig,
    ScoreWeightsConfig,
    InterpretWeightsConfig,
    SummarizeActivationsConfig,
    DescribeResidualConfig,
    TopExamplesConfig,
    FitDirectionsConfig,
)
"""All of them."""

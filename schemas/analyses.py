"""The settings of every analysis: a stage that reads a store and gives a result."""

from __future__ import annotations

from typing import Literal

from actpipe.schemas.attribution_analyses import AttributeLogitsConfig, DecomposeResidualConfig
from actpipe.schemas.base import AnalysisConfig, NonEmpty
from actpipe.schemas.direction_analyses import DescribeResidualConfig, FitDirectionsConfig, TopExamplesConfig
from actpipe.schemas.eval_analyses import CompareRunsConfig
from actpipe.schemas.head_analyses import (
    DescribeAttentionConfig,
    ScoreCopyingConfig,
    ScoreHeadsConfig,
    ScoreWeightsConfig,
)
from actpipe.schemas.lens_analyses import LogitLensConfig
from actpipe.schemas.statistic_analyses import SummarizeActivationsConfig
from actpipe.schemas.weight_analyses import InterpretWeightsConfig
from pydantic import PositiveInt


class SummarizeMetricsConfig(AnalysisConfig):
    """Settings of the stage `summarize_metrics`: stored metrics, such as the loss, by position and by other groups."""

    stage: Literal["summarize_metrics"] = "summarize_metrics"
    by: tuple[Literal["position", "document", "token"], ...] = ("position",)
    """What to group tokens by: their position in the sequence, their document, their own id."""
    columns: tuple[NonEmpty, ...] = ()
    """Columns of documents.parquet to group by too, such as a language or a source."""
    examples: PositiveInt = 10
    """How many of the worst and of the best documents to list, where `by` has `document`."""


ANALYSES: tuple[type[AnalysisConfig], ...] = (
    SummarizeMetricsConfig,
    DecomposeResidualConfig,
    AttributeLogitsConfig,
    ScoreHeadsConfig,
    DescribeAttentionConfig,
    ScoreCopyingConfig,
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

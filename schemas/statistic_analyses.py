"""The settings of statistics of stored activations."""

from __future__ import annotations

from typing import Annotated, Literal

from actpipe.schemas.base import AnalysisConfig, NonEmpty
from pydantic import Field, PositiveInt


class SummarizeActivationsConfig(AnalysisConfig):
    """Settings of the stage `summarize_activations`: statistics of stored activations, channel by channel."""

    stage: Literal["summarize_activations"] = "summarize_activations"
    hooks: Annotated[tuple[NonEmpty, ...], Field(min_length=1)] = ("blocks.*.hook_resid_post",)
    """Which stored activations; patterns as in `hooks` of extract_activations, or `derived/NAME/HOOK`."""
    covariance: bool = False
    """The covariance of every two channels too."""
    histogram: bool = False
    """A histogram and quantiles of all values too."""
    max_bytes: PositiveInt = 4 * 2**30
    """Refuse covariances that need more memory than this while they are summed."""

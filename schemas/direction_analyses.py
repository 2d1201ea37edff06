"""The settings of analyses of neurons, directions, and the geometry of activations."""

from __future__ import annotations

from typing import Literal

from actpipe.schemas.base import AnalysisConfig, NonEmpty


class DescribeResidualConfig(AnalysisConfig):
    """Settings of the stage `describe_residual`: norms, anisotropy, dimension and similarity of activations."""

    stage: Literal["describe_residual"] = "describe_residual"
    hooks: tuple[NonEmpty, ...] = ("blocks.*.hook_resid_post",)
    """Which stored activations; patterns as in `hooks` of extract_activations, or `derived/NAME/HOOK`."""
    cka: bool = True
    """Compare every two of them by linear CKA too."""

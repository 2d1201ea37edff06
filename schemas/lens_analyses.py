"""The settings of analyses that read the residual stream through the unembedding."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from actpipe.schemas.base import AnalysisConfig, NonEmpty
from pydantic import Field, model_validator


class LogitLensConfig(AnalysisConfig):
    """Settings of the stage `logit_lens`: what the model would predict from the residual stream at each layer."""

    stage: Literal["logit_lens"] = "logit_lens"
    norm: Literal["own", "final_scale"] = "own"
    """`own` puts each residual stream through the final norm; `final_scale` divides it by the scale that the final norm
    has at that token, as `accumulated_resid(apply_ln=True)` of TransformerLens does."""
    translators: Literal["fit"] | NonEmpty | None = None
    """A tuned lens: `fit` fits an affine map from each residual stream to the last one, on the training documents, and
    the numbers are those of the others; or a safetensors file, such as a fit leaves in `translators.safetensors` among
    its result's files, with `NAME.weight (d_model, d_model)` and `NAME.bias (d_model,)`, `NAME` being `0_pre`, `1_pre`,
    ... and rows being multiplied from the left: `x W + b`."""
    ridge: Annotated[float, Field(ge=0)] = 1e-6
    """Penalty of the fit, as a share of the mean variance of a channel."""
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of the documents that the fit does not see, drawn by a hash of their ids."""
    split_seed: Annotated[int, Field(ge=0)] = 0
    """Seed of that hash."""

    @model_validator(mode="after")
    def _translated_streams_have_their_own_norm(self) -> Self:
        if self.translators is not None and self.norm != "own":
            raise ValueError("`translators` bring a stream to the last one, whose norm is its own; leave out `norm`")
        return self

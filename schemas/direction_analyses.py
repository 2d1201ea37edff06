"""The settings of analyses of neurons, directions, and the geometry of activations."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from actpipe.schemas.base import AnalysisConfig, NonEmpty
from actpipe.schemas.choosing import Range, Scalar
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator


class DescribeResidualConfig(AnalysisConfig):
    """Settings of the stage `describe_residual`: norms, anisotropy, dimension and similarity of activations."""

    stage: Literal["describe_residual"] = "describe_residual"
    hooks: tuple[NonEmpty, ...] = ("blocks.*.hook_resid_post",)
    """Which stored activations; patterns as in `hooks` of extract_activations, or `derived/NAME/HOOK`."""
    cka: bool = True
    """Compare every two of them by linear CKA too."""


class TopExamplesConfig(AnalysisConfig):
    """Settings of the stage `top_examples`: where neurons, heads, latents and directions are most active."""

    stage: Literal["top_examples"] = "top_examples"
    hooks: Annotated[tuple[NonEmpty, ...], Field(min_length=1)]
    """Which stored activations; patterns as in `hooks` of extract_activations, or `derived/NAME/HOOK`. Each place of
    the last axis is a unit; of `attn.hook_z` and its like, each head is one, and its value is the norm."""
    directions: NonEmpty | None = None
    """A safetensors file with `W (d_in, n)` and, where there are, `mean (d_in,)` and `b (n,)`, as in `derive`: units
    are `(x - mean) W + b`, along the last axis where that has d_in places, else of the whole row."""
    units: Annotated[tuple[NonNegativeInt | Range, ...], Field(min_length=1)] | None = None
    """Which units, such as `[0, 3, "5-7"]`, ends included; by default all."""
    examples: PositiveInt = 10
    """Tokens to list for each unit."""
    lowest: bool = False
    """List the tokens with the smallest values too."""
    before: NonNegativeInt = 20
    """Tokens of context before each, within the model input."""
    after: NonNegativeInt = 5
    """Tokens of context after each."""
    tokens: NonNegativeInt = 10
    """For each unit, so many token ids with the highest and with the lowest mean; 0 takes no means by token."""
    min_count: PositiveInt = 5
    """How often a token id must occur to be among them."""
    keep_means: bool = False
    """Keep the means of all token ids, not only the highest and the lowest."""
    shown: NonNegativeInt = 12
    """Units that the report shows: those whose largest value is most standard deviations above their mean."""

    @model_validator(mode="after")
    def _means_are_taken(self) -> Self:
        if self.keep_means and not self.tokens:
            raise ValueError("`keep_means` needs means by token; set `tokens` above 0")
        return self


class FitDirectionsConfig(AnalysisConfig):
    """Settings of the stage `fit_directions`: directions that tell the values of a label apart."""

    stage: Literal["fit_directions"] = "fit_directions"
    hooks: Annotated[tuple[NonEmpty, ...], Field(min_length=1)] = ("blocks.*.hook_resid_post",)
    """Which stored activations; patterns as in `hooks` of extract_activations, or `derived/NAME/HOOK`."""
    label: NonEmpty
    """A column of documents.parquet that holds texts, integers or truth values; each token has its document's."""
    classes: tuple[Scalar, ...] | None = None
    """Which of its values, in this order; by default the `max_classes` with the most tokens. Tokens of documents with
    other values, or without one, are left out."""
    max_classes: Annotated[int, Field(ge=2)] = 10
    """How many values to take where `classes` does not say."""
    components: NonNegativeInt = 4
    """Principal axes to write down."""
    pool: Literal["mean", "last"] | None = None
    """Make one sample of each document, the mean of its tokens or the last of them; by default each token is one."""
    class_weights: Literal["balanced"] | None = None
    """`balanced`: in the probe's loss a sample counts by the number of samples over that of its class and of classes,
    so that all classes count the same; by default all samples count the same."""
    penalty: Annotated[float, Field(gt=0)] = 1e-3
    """Of the probe: half of this times the squares of its weights, for channels of standard deviation 1, is added to
    the mean loss in nats."""
    max_iterations: PositiveInt = 200
    """Most steps of the probe's fit, about one pass over the store each."""
    tolerance: Annotated[float, Field(gt=0)] = 1e-7
    """The fit ends where no entry of the gradient is larger."""
    control: bool = True
    """Fit and judge a second probe on labels that are shuffled among documents: what chance and the documents give."""
    bins: Annotated[int, Field(ge=2)] = 15
    """Bins of confidence in which calibration is judged."""
    exact_scores: NonNegativeInt = 2**22
    """AUC is exact where held-out samples times classes are at most so many; of more, scores are counted in bins of
    1/128. So many scores take 16 bytes each."""
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of the documents that no fit sees and on which probes are judged, drawn by a hash of their ids."""
    split_seed: Annotated[int, Field(ge=0)] = 0
    """Seed of that hash, and of the shuffling."""

    @model_validator(mode="after")
    def _two_classes_at_least(self) -> Self:
        if self.classes is not None and (len(self.classes) < 2 or len(set(map(str, self.classes))) < len(self.classes)):
            raise ValueError(f"`classes` needs two different values at least, each once; got {list(self.classes)}")
        return self

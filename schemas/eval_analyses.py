"""The settings of comparisons between runs, and of evaluations of a model."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from actpipe.schemas.base import AnalysisConfig, Contract, Name, NonEmpty, StageConfig
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator


class CompareRunsConfig(AnalysisConfig):
    """Settings of the stage `compare_runs`: what differs between two stores of the same tokens."""

    stage: Literal["compare_runs"] = "compare_runs"
    against_run: NonEmpty | None = None
    """The run folder to compare with, relative to the recipe's own folder; by default this run."""
    against_corpus: Name = "main"
    """Which corpus of that run."""
    hooks: tuple[NonEmpty, ...] = ("*",)
    """Activations to compare, among those that both stores have in the same shape; shell patterns of their names."""
    cluster: Literal["document", "sequence"] = "document"
    """What the bootstrap draws: tokens of one document, or of one model input, go together."""
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Share of intervals that should hold the true value."""
    n_resamples: PositiveInt = 1000
    """How often the bootstrap draws."""
    seed: NonNegativeInt = 0
    """Seed of the draws; the same seed gives the same intervals."""

    @model_validator(mode="after")
    def _two_stores(self) -> Self:
        if self.against_run is None and self.against_corpus == self.corpus:
            raise ValueError(
                f"compares the corpus {self.corpus!r} with itself; name another `against_run` or `against_corpus`"
            )
        return self


class InductionConfig(Contract):
    """Loss on the second copy of random tokens."""

    n_sequences: PositiveInt = 4
    """Number of sequences."""
    length: Annotated[int, Field(ge=3)] = 384
    """Tokens of one copy; the model sees two."""
    first_id: NonNegativeInt = 100
    """Lowest token id to draw."""
    stop_id: PositiveInt | None = None
    """One past the highest; by default 20,000, or the size of the vocabulary where that is smaller."""
    bos: Literal["model", "overwrite", "none"] = "model"
    """`overwrite` puts BOS over the first token of the first copy, as TransformerLens does; `model` does so where the
    family begins its texts with BOS."""
    seed: NonNegativeInt = 0
    """Seed of the tokens."""

    @model_validator(mode="after")
    def _some_ids(self) -> Self:
        if self.stop_id is not None and self.stop_id <= self.first_id:
            raise ValueError(f"stop_id ({self.stop_id}) is not above first_id ({self.first_id})")
        return self


class IndirectObjectConfig(Contract):
    """Indirect object identification: which of two names comes next."""

    n_samples: PositiveInt = 1000
    """Number of prompts."""
    symmetric: bool = False
    """Use every prompt a second time with the names exchanged; `n_samples` counts both."""
    templates: tuple[NonEmpty, ...] | None = None
    """Texts that end in `[A]`, the name to find, and have `[B]`, the other; other bracketed words are `nouns`."""
    names: tuple[NonEmpty, ...] | None = None
    """Names to draw two of."""
    nouns: dict[str, tuple[NonEmpty, ...]] | None = None
    """What may stand for each other bracketed word."""
    prepend_bos: bool | Literal["model"] = "model"
    """Begin with BOS; `model` does what TransformerLens does for this family."""
    seed: NonNegativeInt = 0
    """Seed of the draws."""

    @model_validator(mode="after")
    def _prompts_are_whole(self) -> Self:
        for template in self.templates or ():
            if not template.endswith("[A]") or "[B]" not in template:
                raise ValueError(f"the template {template!r} must have [B] and end in [A], the name to find")
        if self.names is not None and len(set(self.names)) < 2:
            raise ValueError(f"`names` needs two that differ, not {list(self.names)}")
        if self.symmetric and self.n_samples % 2:
            raise ValueError(f"n_samples ({self.n_samples}) must be even where `symmetric` is set")
        if any(not values for values in (self.nouns or {}).values()):
            raise ValueError("every entry of `nouns` needs a word")
        return self


class EvaluateModelConfig(StageConfig):
    """Settings of the stage `evaluate_model`: what the model can do, on tasks made on the spot; needs no store."""

    stage: Literal["evaluate_model"] = "evaluate_model"
    name: Name | None = None
    """Name of the result; by default that of the stage."""
    induction: InductionConfig | None = InductionConfig()
    """Repeated random tokens; null leaves the task out."""
    ioi: IndirectObjectConfig | None = IndirectObjectConfig()
    """Indirect object identification; null leaves the task out."""
    batch_tokens: PositiveInt = 4096
    """Most tokens in one forward pass; a longer sequence runs alone."""

    @model_validator(mode="after")
    def _some_task(self) -> Self:
        if self.induction is None and self.ioi is None:
            raise ValueError("no task is left: keep `induction` or `ioi`")
        return self

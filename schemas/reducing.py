"""Settings of the stage that reduces activations while the model runs."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from actpipe.schemas.base import Name, NonEmpty, StageConfig
from actpipe.schemas.choosing import DeriveConfig, KeepConfig
from pydantic import Field, PositiveInt, model_validator

Statistic = Literal[
    "mean",
    "variance",
    "extremes",
    "covariance",
    "histogram",
    "top_rows",
    "mean_by_token",
    "mean_by_position",
    "pattern_scores",
]


class ReduceActivationsConfig(StageConfig):
    """Settings of the stage `reduce_activations`: statistics of activations that are not stored."""

    stage: Literal["reduce_activations"] = "reduce_activations"
    name: Name = "reduce_activations"
    """Name of the result."""
    hooks: tuple[NonEmpty, ...] = ()
    """Of which activations; patterns as in `extract_activations`."""
    derive: tuple[DeriveConfig, ...] = ()
    """Statistics of something made of activations, as in `extract_activations`: of a SAE's latents, heads, norms."""
    statistics: Annotated[tuple[Statistic, ...], Field(min_length=1)] = ("mean", "variance")
    """What to keep of them: `mean` and `variance` (with `count`), `extremes` (smallest, largest, share above zero),
    `covariance`, `histogram` (with quantiles), `top_rows`, `mean_by_token`, `mean_by_position`, and `pattern_scores`
    of `attn.hook_pattern` (as `score_heads` gives them)."""
    k: PositiveInt = 16
    """How many rows `top_rows` keeps of each channel."""
    keep: KeepConfig | None = None
    """Which tokens count; by default all."""
    rows_per_part: PositiveInt = 65_536
    """About how many tokens are done before what was found is put on the disk; parts end with model inputs."""
    batch_tokens: PositiveInt | Literal["auto"] = 8192
    """Most tokens in one forward pass, padding included; a longer sequence runs alone. `auto` finds the number by trial
    on the device, once per run, and remembers it for runs like it. What does not fit is run in smaller batches."""
    max_bytes: PositiveInt = 4 * 2**30
    """Refuse statistics that need more memory than this."""

    @model_validator(mode="after")
    def _of_something(self) -> Self:
        if not (self.hooks or self.derive):
            raise ValueError("name activations in `hooks`, or make something of them with `derive`")
        for entry in self.derive:
            if entry.top_k is not None:
                raise ValueError(f"derive ({entry.name}): statistics are of all latents; leave out `top_k`")
        return self

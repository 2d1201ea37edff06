"""What of a corpus and of its activations is stored: some tokens, some heads or channels, projections."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal, Self

from actpipe.schemas.base import Contract, Name, NonEmpty, Regex
from pydantic import Field, NonNegativeInt, PositiveInt, StringConstraints, model_validator

Scalar = str | int | float | bool
Special = Literal["bos", "eos", "pad", "special"]


class KeepConfig(Contract):
    """Which tokens get rows in the store: those for which every condition holds. Model inputs stay whole."""

    positions: tuple[int, ...] | None = None
    """Positions in the model input, -1 for its last."""
    every: PositiveInt | None = None
    """Every so manieth row of the token table, the first included."""
    exclude: tuple[Special | NonNegativeInt, ...] = ()
    """Tokens to leave out: `bos`, `eos`, `pad`, all that the tokenizer calls `special`, or ids."""
    fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    """Keep this share of the documents, drawn by a hash of their ids."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of that hash."""
    where: dict[NonEmpty, Scalar | tuple[Scalar, ...]] = Field(default_factory=dict)
    """Only documents with these values in columns of documents.parquet."""
    match: Regex | None = None
    """A regular expression: tokens that hold a character of a match in their document's text."""
    spans: NonEmpty | None = None
    """A column of JSON lists `[[start, stop], ...]`: tokens that hold a character of these in their document's text."""

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self == type(self).model_construct(seed=self.seed):
            raise ValueError("`keep` has no condition; leave it out to store every token")
        return self


def expand_ranges(chosen: Iterable[int | str]) -> list[int]:
    """Return the numbers that a list with ranges, ends included, stands for, in its order."""
    numbers: list[int] = []
    for one in chosen:
        first, last = (one, one) if isinstance(one, int) else map(int, one.split("-"))
        numbers.extend(range(first, last + 1))
    return numbers


_WAYS = ("heads", "channels", "norms", "random", "matrix", "encoder")

Range = Annotated[str, StringConstraints(pattern=r"^\d+-\d+$")]


class DeriveConfig(Contract):
    """Something made of activations: some heads or channels, a projection, or what a SAE's encoder makes of them."""

    name: Name
    """The arrays are `derived/NAME/HOOK`."""
    hooks: Annotated[tuple[NonEmpty, ...], Field(min_length=1)]
    """Of which activations; patterns as in `hooks`."""
    heads: tuple[NonNegativeInt | Range, ...] | None = None
    """Keep these heads, such as `[0, 3, "5-7"]`, ends included."""
    channels: tuple[NonNegativeInt | Range, ...] | None = None
    """Keep these places of the last axis."""
    norms: Literal[True] | None = None
    """The length of the last axis: one number per head of `attn.hook_z`, one per row of a residual stream."""
    random: PositiveInt | None = None
    """Project the row onto so many random directions (Gaussian, of variance one over their number)."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of those directions."""
    matrix: NonEmpty | None = None
    """A safetensors file with `W (d_in, d_out)` and, where there is one, `mean (d_in,)`, which is subtracted first,
    and `b (d_out,)`; relative to the recipe's own folder."""
    encoder: NonEmpty | None = None
    """A safetensors file with a SAE's `W_enc (d_in, d_sae)`, `b_enc`, and where there are, `b_dec` and `threshold`."""
    center: bool = False
    """Subtract the SAE's `b_dec` before encoding, as some SAEs do."""
    top_k: PositiveInt | None = None
    """Of the SAE's latents store the largest so many, as `values` and `indices`; by default all of them."""

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        ways = [way for way in _WAYS if getattr(self, way) is not None]
        if len(ways) != 1:
            given = " and ".join(ways) or "none"
            raise ValueError(f"give exactly one of {', '.join(_WAYS)}; got {given}")
        if self.encoder is None and (self.top_k is not None or self.center):
            raise ValueError("`top_k` and `center` belong to `encoder`")
        return self

"""The settings of analyses of attention heads and of weights."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from actpipe.schemas.base import AnalysisConfig, Contract, Name, NonEmpty, Regex
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

NamedPattern = Literal[
    "previous_token_head", "duplicate_token_head", "induction_head", "duplicate_stripe", "induction_stripe"
]


class TokensConfig(Contract):
    """Some tokens of the vocabulary, by id or by text."""

    ids: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] | None = None
    """These token ids."""
    match: Regex | None = None
    """A regular expression: tokens whose text, decoded on its own, has a match. `^` and `$` stand for its ends."""


class AttendConfig(TokensConfig):
    """Where the tokens of a detection pattern attend to: never to what comes after them."""

    offset: Annotated[int, Field(le=0)] | None = None
    """So many tokens away: 0 is the token itself, -1 the one before; either this or `to`."""
    to: Literal["first", "bos", "same_token", "period", "tokens"] | None = None
    """`first`: the first position of the model input. `bos`: every BOS. `same_token`: earlier tokens of the same id.
    `period`: the same token one period before, where documents have a column `period`, as those of `synthetic` have.
    `tokens`: those of `ids` and `match`, the token itself included."""
    shift: NonNegativeInt = 0
    """Attend so many tokens after that: `{to: same_token, shift: 1}` is what came after earlier equal tokens."""
    which: Literal["all", "nearest", "farthest"] = "all"
    """All of them, or for each token only the nearest to it, or the farthest."""

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.offset is None) == (self.to is None):
            raise ValueError("give exactly one of `offset` and `to`")
        if self.offset is not None and (self.shift or self.which != "all"):
            raise ValueError("`offset` is one place already; leave out `shift` and `which`")
        named = self.ids is not None or self.match is not None
        if named != (self.to == "tokens"):
            raise ValueError("`to: tokens` and one of `ids` and `match` belong together")
        return self


class QueriesConfig(TokensConfig):
    """For which tokens a detection pattern says where they attend; all conditions hold together."""

    start: NonNegativeInt = 0
    """The first position, counted from 0 at the start of the model input."""
    stop: PositiveInt | None = None
    """One past the last position."""


class PatternConfig(Contract):
    """A detection pattern of your own: where a kind of head attends, as ones and zeros, or any matrix from a file."""

    name: Name
    """What it is called in results."""
    attend: AttendConfig | Annotated[tuple[AttendConfig, ...], Field(min_length=1)] | None = None
    """Where tokens attend to; of several, to any. Either this or `file`."""
    file: NonEmpty | None = None
    """A `.npy` or `.safetensors` file, relative to the recipe, with one lower triangular matrix
    (query_position, key_position) that is square and at least as long as the context."""
    queries: QueriesConfig | None = None
    """Only these tokens attend there; the rows of all others are 0. By default all tokens."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.attend is None) == (self.file is None):
            raise ValueError(f"pattern {self.name!r}: give exactly one of `attend` and `file`")
        return self

    @property
    def attends(self) -> tuple[AttendConfig, ...]:
        """The places it names, none where the pattern is a file."""
        if self.attend is None:
            return ()
        return (self.attend,) if isinstance(self.attend, AttendConfig) else self.attend


class ScoreHeadsConfig(AnalysisConfig):
    """Settings of the stage `score_heads`: how close each head comes to a known pattern."""

    stage: Literal["score_heads"] = "score_heads"
    patterns: Annotated[tuple[NamedPattern | PatternConfig, ...], Field(min_length=1)] = (
        "previous_token_head",
        "duplicate_token_head",
        "induction_head",
    )
    """Detection patterns: TransformerLens' three by name, `duplicate_stripe` and `induction_stripe` of tokens
    repeated with a period, or your own."""
    exclude_bos: bool = False
    """Leave out attention to the first position."""
    exclude_current_token: bool = False
    """Leave out attention of a token to itself."""

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = self.pattern_names
        if len(set(names)) < len(names):
            raise ValueError(f"`patterns` has two of one name among {list(names)}")
        return self

    @property
    def pattern_names(self) -> tuple[str, ...]:
        """What the patterns are called, in their order."""
        return tuple(one if isinstance(one, str) else one.name for one in self.patterns)


class DescribeAttentionConfig(AnalysisConfig):
    """Settings of the stage `describe_attention`: how spread attention is, and how far it reaches, head by head."""

    stage: Literal["describe_attention"] = "describe_attention"
    hooks: Annotated[tuple[NonEmpty, ...], Field(min_length=1)] = ("blocks.*.attn.hook_pattern",)
    """Whose patterns; names and patterns as in `hooks` of extract_activations."""
    by_position: bool = False
    """Means for each query position too."""


class ScoreCopyingConfig(AnalysisConfig):
    """Settings of the stage `score_copying`: how far each head raises the logits of the tokens it attends to."""

    stage: Literal["score_copying"] = "score_copying"
    exclude_bos: bool = False
    """Leave out attention to the first position."""
    exclude_current_token: bool = False
    """Leave out attention of a token to itself."""


class ScoreWeightsConfig(AnalysisConfig):
    """Settings of the stage `score_weights`: copying and composition of heads, from weights alone."""

    stage: Literal["score_weights"] = "score_weights"
    processed: bool = True
    """Fold norms and centre weights first, as `HookedTransformer.from_pretrained` does by default."""
    n_tokens: PositiveInt = 1024
    """Tokens, evenly spread over the vocabulary, whose own logit is ranked for the copying scores by rank."""

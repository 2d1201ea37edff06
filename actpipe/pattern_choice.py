"""From what a recipe says of detection patterns to the patterns themselves."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from actpipe.compute.patterns import NAMED_PATTERNS, Attended, DetectionPattern, Queries
from actpipe.errors import RecipeError
from actpipe.label_choice import require_labels
from actpipe.model_inputs import inputs_of, special_token_ids
from actpipe.schemas.head_analyses import AttendConfig, PatternConfig, ScoreHeadsConfig, TokensConfig
from actpipe.schemas.recipe import TokenizeTextConfig
from actpipe.stage import RunContext
from actpipe.stores.layout import RunFolder, sha256_of
from actpipe.stores.patterns import read_pattern
from actpipe.stores.token_table import TokenTable
from actpipe.text.decoding import decode_ids


def check_patterns(context: RunContext, config: ScoreHeadsConfig) -> None:
    """Refuse patterns that the corpus or the model does not have what it takes for, and files that are no patterns.

    Raises:
        RecipeError: Says which pattern, and the way out.
    """
    for pattern in config.patterns:
        if isinstance(pattern, str):
            needs_period = NAMED_PATTERNS[pattern].needs_period
        else:
            needs_period = any(attend.to == "period" for attend in pattern.attends)
            _check_ids(pattern, context.spec.shape.d_vocab)
            _matrix_of(context, config, pattern)
        if needs_period:
            _require_period(context, config)


def choose_patterns(context: RunContext, config: ScoreHeadsConfig) -> tuple[DetectionPattern, ...]:
    """Return the patterns, their texts looked up in the corpus's tokenizer and their files read.

    Raises:
        RecipeError: A regular expression matches no token, there is no BOS, or a file is no pattern.
    """
    return tuple(
        NAMED_PATTERNS[pattern] if isinstance(pattern, str) else _pattern_of(context, config, pattern)
        for pattern in config.patterns
    )


def pattern_hashes(context: RunContext, config: ScoreHeadsConfig) -> Mapping[str, str]:
    """Return the SHA-256 of every file among the patterns, by the pattern's name."""
    files = {pattern.name: pattern.file for pattern in config.patterns if isinstance(pattern, PatternConfig)}
    return {name: sha256_of(_path(context, file)) for name, file in files.items() if file is not None}


def _require_period(context: RunContext, config: ScoreHeadsConfig) -> None:
    tokenizing = context.settings_of(TokenizeTextConfig, config.corpus)
    if tokenizing is None or tokenizing.synthetic is None:
        require_labels(context, config, ["period"], "patterns with a period")


def _check_ids(pattern: PatternConfig, d_vocab: int) -> None:
    for tokens in (*pattern.attends, *([] if pattern.queries is None else [pattern.queries])):
        wrong = [token for token in tokens.ids or () if token >= d_vocab]
        if wrong:
            raise RecipeError(
                f"score_heads: the pattern {pattern.name!r} names token {wrong[0]}, outside the vocabulary of {d_vocab}"
            )


def _pattern_of(context: RunContext, config: ScoreHeadsConfig, pattern: PatternConfig) -> DetectionPattern:
    folder = context.corpus(config)
    wanted, queries = pattern.queries, Queries()
    if wanted is not None:
        named = wanted.ids is not None or wanted.match is not None
        tokens = _tokens_of(context, folder, pattern.name, wanted) if named else None
        queries = Queries(wanted.start, wanted.stop, tokens)
    attended = tuple(_attended_of(context, folder, pattern.name, attend) for attend in pattern.attends)
    return DetectionPattern(pattern.name, attended, _matrix_of(context, config, pattern), queries)


def _matrix_of(context: RunContext, config: ScoreHeadsConfig, pattern: PatternConfig) -> npt.NDArray[np.float64] | None:
    if pattern.file is None:
        return None
    length = inputs_of(context, config.corpus).context_length
    return read_pattern(_path(context, pattern.file), length, f"score_heads, pattern {pattern.name!r}")


def _attended_of(context: RunContext, folder: RunFolder, name: str, attend: AttendConfig) -> Attended:
    if attend.to is None:
        return Attended("offset", offset=attend.offset or 0)
    if attend.to == "bos":
        tokens = special_token_ids(context, TokenTable(folder).manifest)["bos"]
        if not tokens:
            raise RecipeError(f"score_heads: the pattern {name!r} is of BOS, which this corpus and tokenizer lack")
        return Attended("tokens", tokens=tokens, shift=attend.shift, which=attend.which)
    tokens = _tokens_of(context, folder, name, attend) if attend.to == "tokens" else frozenset()
    return Attended(attend.to, tokens=tokens, shift=attend.shift, which=attend.which)


def _tokens_of(context: RunContext, folder: RunFolder, name: str, wanted: TokensConfig) -> frozenset[int]:
    """Return the ids that are named, and those whose text has a match."""
    named = frozenset(wanted.ids or ())
    if wanted.match is None:
        return named
    text = re.compile(wanted.match)
    matched = [i for i in range(context.spec.shape.d_vocab) if text.search(decode_ids(folder.tokenizer, [i]))]
    if not matched:
        raise RecipeError(
            f"score_heads: no token of the vocabulary matches {wanted.match!r} of the pattern {name!r}; each is "
            "decoded on its own, a leading space included"
        )
    return named.union(matched)


def _path(context: RunContext, file: str) -> Path:
    return context.base / Path(file).expanduser()

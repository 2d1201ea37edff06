"""How close attention heads come to known patterns.

Source:
    TransformerLens 2.16, `head_detector`. The measures `mul` and `abs` are its own, rounding included;
    it averages the scores of several prompts unweighted, and so does this.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

PATTERNS = ("previous_token_head", "duplicate_token_head", "induction_head")
MEASURES = ("mul", "abs", "matched")


def detection_pattern(name: str, ids: Int[np.ndarray, " position"]) -> Float[np.ndarray, "query_position key_position"]:
    """Return where a head of a known kind would attend in a sequence, as ones and zeros.

    Args:
        name: `previous_token_head` (the token before), `duplicate_token_head` (earlier tokens equal to this
            one) or `induction_head` (tokens that came after earlier ones equal to this one).
        ids: Token ids of the whole sequence.
    """
    length = len(ids)
    if name == "previous_token_head":
        return np.eye(length, k=-1, dtype=np.float32)
    if name not in PATTERNS:
        raise ValueError(f"unknown pattern {name!r}; there are {PATTERNS}")
    duplicates = np.tril(ids[:, None] == ids[None, :], k=-1).astype(np.float32)
    if name == "duplicate_token_head":
        return duplicates
    shifted = np.zeros_like(duplicates)
    shifted[:, 1:] = duplicates[:, :-1]
    return shifted


@dataclass(frozen=True)
class HeadScoreSums:
    """Sums of scores over sequences, in float64; they add up."""

    n_sequences: int
    scores: Float[np.ndarray, "head measure"]
    """Sum of each sequence's `mul` and `abs` (the column of `matched` is unused)."""
    n_matched: float
    """Queries that have somewhere to attend to under the pattern."""
    matched: Float[np.ndarray, " head"]
    """Sum over those queries of the attention that goes there."""

    def __add__(self, other: HeadScoreSums) -> HeadScoreSums:
        return HeadScoreSums(
            n_sequences=self.n_sequences + other.n_sequences,
            scores=self.scores + other.scores,
            n_matched=self.n_matched + other.n_matched,
            matched=self.matched + other.matched,
        )

    @property
    def means(self) -> Float[np.ndarray, "head measure"]:
        """Return the scores: `mul`, `abs` and `matched`; NaN where nothing was measured."""
        with np.errstate(invalid="ignore", divide="ignore"):
            means = self.scores / self.n_sequences
            means[:, 2] = self.matched / self.n_matched
        return means


def score_heads(
    attention: Float[np.ndarray, "query_position head key_position"],
    pattern: Float[np.ndarray, "query_position key_position"],
    *,
    exclude_bos: bool = False,
    exclude_current_token: bool = False,
) -> HeadScoreSums:
    """Compare the attention of one sequence with a detection pattern, for all heads of a layer.

    `mul` is the share of all attention that lies on the pattern. `abs` is one minus the mean absolute
    difference times the length, rounded to three decimals. `matched` is the share of attention on the
    pattern for those queries only that have something to attend to.

    Args:
        attention: What each query attends to; the last rows of a sequence where some are missing.
        pattern: Detection pattern of the same queries.
        exclude_bos: Leave out attention to the first position.
        exclude_current_token: Leave out attention of a token to itself.

    Returns:
        The scores of one sequence, ready to be added up.
    """
    n_queries, n_keys = pattern.shape
    counted = np.ones((n_queries, n_keys), np.float32)
    if exclude_bos:
        counted[:, 0] = 0.0
    if exclude_current_token:
        counted[np.arange(n_queries), np.arange(n_keys - n_queries, n_keys)] = 0.0
    seen = attention * counted[:, None]
    on_pattern = (seen * pattern[:, None]).sum(-1, dtype=np.float64)
    total = seen.sum((0, 2), dtype=np.float64)
    difference = (np.abs(attention - pattern[:, None]) * counted[:, None]).sum((0, 2), dtype=np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        mul = on_pattern.sum(0) / total
    measured = np.stack([mul, 1 - np.round(difference / n_queries, 3), np.zeros_like(mul)], axis=-1)
    has_match = (pattern * counted).any(-1)
    return HeadScoreSums(1, measured, float(has_match.sum()), on_pattern[has_match].sum(0))

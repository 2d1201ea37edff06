"""How close attention heads come to detection patterns.

Source:
    TransformerLens 2.16, `head_detector`. The measures `mul` and `abs` are its own, rounding included;
    it averages the scores of several prompts unweighted, and so does this.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Shaped

MEASURES = ("mul", "abs", "matched")


@dataclass(frozen=True)
class HeadScoreSums:
    """Sums of scores over sequences, in float64; they add up."""

    n_sequences: int
    n_mul: Float[np.ndarray, " head"]
    """Sequences in which the head attends to anything that counts; in others `mul` is not defined."""
    scores: Float[np.ndarray, "head measure"]
    """Sum of each sequence's `mul` and `abs`."""
    n_matched: float
    """Queries that have somewhere to attend to under the pattern."""
    matched: Float[np.ndarray, " head"]
    """Sum over those queries of the attention that goes there."""
    uniform: float
    """The same sum for a head that spreads its attention evenly."""

    def __add__(self, other: HeadScoreSums) -> HeadScoreSums:
        return HeadScoreSums(
            n_sequences=self.n_sequences + other.n_sequences,
            n_mul=self.n_mul + other.n_mul,
            scores=self.scores + other.scores,
            n_matched=self.n_matched + other.n_matched,
            matched=self.matched + other.matched,
            uniform=self.uniform + other.uniform,
        )

    @property
    def means(self) -> Float[np.ndarray, "head measure"]:
        """Return the scores: `mul`, `abs` and `matched`; NaN where nothing was measured."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.stack(
                [self.scores[:, 0] / self.n_mul, self.scores[:, 1] / self.n_sequences, self.matched / self.n_matched],
                axis=-1,
            )

    @property
    def uniform_matched(self) -> float:
        """Return `matched` of a head that spreads its attention evenly; NaN where nothing was measured."""
        return self.uniform / self.n_matched if self.n_matched else float("nan")


def counted_pairs(
    n_queries: int, n_keys: int, *, exclude_bos: bool, exclude_current_token: bool
) -> Bool[np.ndarray, "query_position key_position"]:
    """Return which pairs of a decoder's last queries and its keys count: no key after the query, and none left out.

    Args:
        n_queries: The last positions of a sequence.
        n_keys: All of them.
        exclude_bos: Leave out the first position.
        exclude_current_token: Leave out each token itself.
    """
    counted = np.tri(n_queries, n_keys, n_keys - n_queries - exclude_current_token, dtype=np.bool_)
    if exclude_bos:
        counted[:, 0] = False
    return counted


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
        attention: What each query attends to, from 0 to 1; the last rows of a sequence where some are missing.
        pattern: Detection pattern of the same queries.
        exclude_bos: Leave out attention to the first position.
        exclude_current_token: Leave out attention of a token to itself.

    Returns:
        The scores of one sequence, ready to be added up.
    """
    n_queries, n_keys = pattern.shape
    counted = counted_pairs(n_queries, n_keys, exclude_bos=exclude_bos, exclude_current_token=exclude_current_token)
    wanted = pattern * counted
    on_pattern = _shares(attention, wanted)
    total = _shares(attention, counted).sum(0)
    if ((wanted == 0) | (wanted == 1)).all():
        difference = total + wanted.sum(dtype=np.float64) - 2 * on_pattern.sum(0)  # as attention is from 0 to 1
    else:
        difference = np.abs(attention * counted[:, None] - wanted[:, None]).sum((0, 2), dtype=np.float64)
    attends = total != 0  # what is not a number must stay one
    mul = np.divide(on_pattern.sum(0), total, out=np.zeros_like(total), where=attends)
    has_match = wanted.any(-1)
    evenly = wanted[has_match].sum(-1, dtype=np.float64) / counted[has_match].sum(-1)
    return HeadScoreSums(
        n_sequences=1,
        n_mul=attends.astype(np.float64),
        scores=np.stack([mul, 1 - np.round(difference / n_queries, 3)], axis=-1),
        n_matched=float(has_match.sum()),
        matched=on_pattern[has_match].sum(0),
        uniform=float(evenly.sum()),
    )


def _shares(
    attention: Float[np.ndarray, "query_position head key_position"],
    weights: Shaped[np.ndarray, "query_position key_position"],
) -> Float[np.ndarray, "query_position head"]:
    """Sum each query's attention over keys with weights, without a copy of it."""
    return np.matmul(attention, weights.astype(np.float32)[:, :, None])[..., 0].astype(np.float64)

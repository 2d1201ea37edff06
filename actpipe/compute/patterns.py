"""Detection patterns: where a kind of head attends, as a lower triangular matrix.

Source:
    TransformerLens 2.16, `head_detector`: `previous_token_head`, `duplicate_token_head` and `induction_head`
    are its own, and so is what a pattern of the user's may be. The stripes are the diagonals of its demo
    notebook (`Exploratory_Analysis_Demo`, offsets of one period, and of one less).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int

Place = Literal["offset", "first", "same_token", "period", "tokens"]
Which = Literal["all", "nearest", "farthest"]


@dataclass(frozen=True)
class Attended:
    """One kind of place that tokens attend to; never one after them."""

    to: Place
    offset: int = 0
    """Of `offset`: how far away, 0 or less."""
    tokens: frozenset[int] = frozenset()
    """Of `tokens`: which ids."""
    shift: int = 0
    """So many tokens after that place."""
    which: Which = "all"

    def __call__(
        self, ids: Int[np.ndarray, " position"], period: int
    ) -> Bool[np.ndarray, "query_position key_position"]:
        """Return which keys each query of a sequence attends to.

        Args:
            ids: Token ids of the whole sequence.
            period: With which its tokens are repeated; 0 for none.
        """
        n_tokens = len(ids)
        query, key = np.indices((n_tokens, n_tokens), sparse=True)
        there = np.zeros((n_tokens, n_tokens), np.bool_)
        there[:, self.shift :] = self._places(ids, period, query, key)[:, : max(0, n_tokens - self.shift)]
        there &= key <= query
        if self.which == "all":
            return there
        chosen = (n_tokens - 1 - there[:, ::-1].argmax(-1)) if self.which == "nearest" else there.argmax(-1)
        return there & (key == chosen[:, None])

    def _places(
        self,
        ids: Int[np.ndarray, " position"],
        period: int,
        query: Int[np.ndarray, "query_position 1"],
        key: Int[np.ndarray, "1 key_position"],
    ) -> Bool[np.ndarray, "query_position key_position"]:
        if self.to == "offset":
            return key == query + self.offset
        if self.to == "first":
            return np.broadcast_to(key == 0, (len(ids), len(ids)))
        if self.to == "tokens":
            return np.broadcast_to(np.isin(ids, list(self.tokens)), (len(ids), len(ids)))
        same = ids[:, None] == ids[None, :]
        return same & ((key < query) if self.to == "same_token" else ((key == query - period) & (period > 0)))


@dataclass(frozen=True)
class Queries:
    """For which tokens a pattern says where they attend."""

    start: int = 0
    stop: int | None = None
    tokens: frozenset[int] | None = None

    def __call__(self, ids: Int[np.ndarray, " position"]) -> Bool[np.ndarray, " query_position"]:
        """Return which tokens of a sequence are meant."""
        meant = np.zeros(len(ids), np.bool_)
        meant[self.start : self.stop] = True
        return meant if self.tokens is None else meant & np.isin(ids, list(self.tokens))


@dataclass(frozen=True, eq=False)
class DetectionPattern:
    """Where a kind of head attends: places, or a matrix."""

    name: str
    attended: tuple[Attended, ...] = ()
    """Places; of several, tokens attend to any."""
    matrix: Float[np.ndarray, "query_position key_position"] | None = None
    """In place of them: at least as long as every sequence, lower triangular."""
    queries: Queries = Queries()

    def of(
        self, ids: Int[np.ndarray, " position"], period: int = 0
    ) -> Float[np.ndarray, "query_position key_position"]:
        """Return the pattern for one sequence, in float32.

        Args:
            ids: Token ids of the whole sequence.
            period: With which its tokens are repeated; 0 for none.
        """
        if self.matrix is None:
            wanted = np.zeros((len(ids), len(ids)), np.bool_)
            for attended in self.attended:
                wanted |= attended(ids, period)
            pattern = wanted.astype(np.float32)
        else:
            pattern = self.matrix[: len(ids), : len(ids)].astype(np.float32)
        pattern[~self.queries(ids)] = 0.0
        return pattern

    @property
    def needs_period(self) -> bool:
        """Whether it looks at the period with which tokens are repeated."""
        return any(attended.to == "period" for attended in self.attended)


PREVIOUS_TOKEN = DetectionPattern("previous_token_head", (Attended("offset", offset=-1),))
DUPLICATE_TOKEN = DetectionPattern("duplicate_token_head", (Attended("same_token"),))
INDUCTION = DetectionPattern("induction_head", (Attended("same_token", shift=1),))
DUPLICATE_STRIPE = DetectionPattern("duplicate_stripe", (Attended("period"),))
INDUCTION_STRIPE = DetectionPattern("induction_stripe", (Attended("period", shift=1),))

TRANSFORMERLENS_PATTERNS = (PREVIOUS_TOKEN, DUPLICATE_TOKEN, INDUCTION)
NAMED_PATTERNS = {pattern.name: pattern for pattern in (*TRANSFORMERLENS_PATTERNS, DUPLICATE_STRIPE, INDUCTION_STRIPE)}
"""Those that have a name of their own in recipes."""


def check_matrix(matrix: Float[np.ndarray, "..."], context_length: int) -> None:
    """Refuse a matrix that is no detection pattern.

    Args:
        matrix: What is to be one.
        context_length: Tokens of the longest sequence.

    Raises:
        ValueError: It is not square, shorter than the context, not finite, or not lower triangular.
    """
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"it has the shape {matrix.shape}; a pattern is square, (query_position, key_position)")
    if len(matrix) < context_length:
        raise ValueError(
            f"it is {len(matrix)} tokens long and the context {context_length}; make it at least as long as the context"
        )
    if not np.isfinite(matrix).all():
        raise ValueError("it holds values that are not finite; put 0 where a head does not attend")
    above = np.argwhere(np.triu(matrix, 1))
    if len(above):
        query, key = above[0]
        raise ValueError(
            f"query {query} attends to key {key}, which comes after it; queries are rows, so transpose the matrix, or "
            "take numpy.tril of it"
        )

"""Sums by group that add up: the same result however the rows were cut into blocks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int


@dataclass(frozen=True)
class GroupSums:
    """Count, sum and sum of squares of some columns by group, in float64."""

    count: Float[np.ndarray, "group column"]
    total: Float[np.ndarray, "group column"]
    squares: Float[np.ndarray, "group column"]

    def __add__(self, other: GroupSums) -> GroupSums:
        n_groups = max(len(self.count), len(other.count))
        return GroupSums(
            *(
                _padded(mine, n_groups) + _padded(theirs, n_groups)
                for mine, theirs in (
                    (self.count, other.count),
                    (self.total, other.total),
                    (self.squares, other.squares),
                )
            )
        )

    @property
    def mean(self) -> Float[np.ndarray, "group column"]:
        """Mean by group; NaN where a group is empty."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return self.total / self.count

    @property
    def std(self) -> Float[np.ndarray, "group column"]:
        """Standard deviation by group (of the rows, not of the mean)."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.sqrt(np.maximum(self.squares / self.count - self.mean**2, 0.0))

    def over_all(self) -> GroupSums:
        """Put all groups together into one."""
        return GroupSums(*(part.sum(0, keepdims=True) for part in (self.count, self.total, self.squares)))


def _padded(sums: Float[np.ndarray, "group column"], n_groups: int) -> Float[np.ndarray, "more_groups column"]:
    return np.pad(sums, ((0, n_groups - len(sums)), (0, 0)))


def sum_by_group(
    values: Float[np.ndarray, "row column"], group: Int[np.ndarray, " row"], n_groups: int | None = None
) -> GroupSums:
    """Sum columns by group, leaving NaN out.

    Args:
        values: One row per token.
        group: Number of each row's group, from 0.
        n_groups: Groups to have; by default up to the largest that occurs.
    """
    n_groups = int(group.max(initial=-1)) + 1 if n_groups is None else n_groups
    there = ~np.isnan(values)
    wide = np.where(there, values, 0.0).astype(np.float64)

    def summed(columns: Float[np.ndarray, "row column"]) -> Float[np.ndarray, "group column"]:
        sums = [np.bincount(group, column, minlength=n_groups) for column in columns.T]
        return np.stack(sums, axis=-1).astype(np.float64) if sums else np.zeros((n_groups, 0))

    return GroupSums(summed(there.astype(np.float64)), summed(wide), summed(wide**2))

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

    @property
    def standard_error(self) -> Float[np.ndarray, "group column"]:
        """Standard error of each mean, rows taken as independent; NaN where fewer than two are there."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(self.count > 1, self.std / np.sqrt(self.count - 1), np.nan)

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


@dataclass(frozen=True)
class RangeSums:
    """Sums of consecutive groups from `start` on; they add up, and take the room of the groups between them only."""

    start: int
    sums: GroupSums

    def __add__(self, other: RangeSums) -> RangeSums:
        if not len(self.sums.count) or not len(other.sums.count):
            return self if len(self.sums.count) else other
        start = min(self.start, other.start)
        stop = max(one.start + len(one.sums.count) for one in (self, other))
        mine, theirs = self.over(start, stop), other.over(start, stop)
        return RangeSums(start, mine + theirs)

    def over(self, start: int, stop: int) -> GroupSums:
        """Return the sums of the groups `[start, stop)`, which these lie in."""
        around = ((self.start - start, stop - self.start - len(self.sums.count)), (0, 0))
        return GroupSums(*(np.pad(part, around) for part in (self.sums.count, self.sums.total, self.sums.squares)))


def sum_by_range(values: Float[np.ndarray, "row column"], group: Int[np.ndarray, " row"]) -> RangeSums:
    """Sum columns by group where neighbouring rows have neighbouring groups, leaving NaN out.

    Args:
        values: One row per token.
        group: Number of each row's group.
    """
    start = int(group.min(initial=np.iinfo(np.int64).max)) if len(group) else 0
    return RangeSums(start, sum_by_group(values, group - start))

"""Several stores as one: how many rows an epoch takes of each, and which."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from actpipe.feed.permutation import Indices


class Mixture:
    """The rows of an epoch over several sources, one source after the other.

    Without weights an epoch has every row of every source once. With weights it has the most rows whose shares
    are the weights and of which none comes twice: the scarcest source goes in whole, of any other a stretch,
    and the next epoch goes on where that stretch ended.

    Args:
        sizes: Rows of each source.
        weights: Share of each source in an epoch, in any unit.
        seed: Where the first stretch begins; None for the beginning.

    Raises:
        ValueError: The weights do not fit the sources, or give a source no row.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float] | None, seed: int | None) -> None:
        self._sizes = np.array(sizes, np.int64)
        if not self._sizes.all():
            raise ValueError(f"source {int(np.argmin(self._sizes))} has no rows left; loosen what selects them")
        self.counts = self._sizes if weights is None else _shares(self._sizes, weights)
        self._ends = np.cumsum(self.counts)
        first = np.zeros(len(sizes), np.int64)
        self._first = first if seed is None else np.random.default_rng(seed).integers(self._sizes)

    @property
    def n_rows(self) -> int:
        """Rows of an epoch."""
        return int(self._ends[-1])

    def locate(self, indices: Indices, epoch: int) -> tuple[Indices, Indices]:
        """Return, for each index, its source and its place among the rows of that source."""
        start = (self._first + epoch * self.counts) % self._sizes
        if len(self._sizes) == 1:
            places, size = start[0] + indices, self._sizes[0]
            return np.zeros_like(indices), np.where(places < size, places, places - size)
        source = np.searchsorted(self._ends, indices, side="right")
        within = indices - (self._ends - self.counts)[source]
        return source, (start[source] + within) % self._sizes[source]


def _shares(sizes: Indices, weights: Sequence[float]) -> Indices:
    shares = np.array(weights, np.float64)
    if shares.shape != sizes.shape or not (np.isfinite(shares) & (shares > 0)).all():
        raise ValueError(f"weights must be {len(sizes)} numbers above zero, one for each run, got {list(weights)}")
    counts = np.floor((sizes / shares).min() * shares * (1 + 1e-12)).astype(np.int64)
    if not counts.all():
        raise ValueError(f"weights {list(weights)} leave run {int(np.argmin(counts))} without a row")
    return np.minimum(counts, sizes)

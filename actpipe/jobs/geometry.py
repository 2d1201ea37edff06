"""Norms, directions and covariances of stored activations, in as few passes over the store as memory allows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt

from actpipe.compute.geometry import CrossMoments, UnitSums, cross_moments, linear_cka, row_norms, unit_sums
from actpipe.compute.grouping import GroupSums, sum_by_group
from actpipe.errors import DtypeOverflowError
from actpipe.jobs.blocks import Done, RowBlock, even_blocks, map_and_sum
from actpipe.stores.reading import ActivationStore

_POSITION = "tokens/position"
_ROOM = 4
"""A row takes the room of so many copies in float32: as it is read, twice in float64 less what is freed."""
_STATES = 8
"""So many answers of blocks may wait to be added up."""

Pair = tuple[str, str]


@dataclass(frozen=True)
class _Described:
    norms: GroupSums
    units: Mapping[str, UnitSums]

    def __add__(self, other: _Described) -> _Described:
        return _Described(
            self.norms + other.norms, {name: sums + other.units[name] for name, sums in self.units.items()}
        )


@dataclass(frozen=True)
class _Moments:
    by: Mapping[Pair, CrossMoments]

    def __add__(self, other: _Moments) -> _Moments:
        return _Moments({pair: sums + other.by[pair] for pair, sums in self.by.items()})


def flat_rows(block: RowBlock, name: str) -> npt.NDArray[np.float32]:
    """Return a block's rows of one array, `(row, channel)`, whatever the axes.

    Raises:
        DtypeOverflowError: A value is not finite.
    """
    return finite_rows(block.read(name), name, block.start, block.stop)


def finite_rows(values: npt.NDArray[np.float32], name: str, start: int, stop: int) -> npt.NDArray[np.float32]:
    """Return values as `(row, channel)`, whatever their axes.

    Args:
        values: Some rows of an array.
        name: Its name.
        start: The first row that they may be.
        stop: One past the last.

    Raises:
        DtypeOverflowError: A value is not finite.
    """
    rows = values.reshape(len(values), int(np.prod(values.shape[1:], dtype=np.int64)))
    n_wrong = rows.size - int(np.isfinite(rows).sum())
    if n_wrong:
        raise DtypeOverflowError(
            f"{n_wrong:,} values of {name} in rows {start:,} to {stop:,} are not finite, and would spoil "
            "every mean; store it as bfloat16 or float32, or leave it out"
        )
    return rows


def sum_norms(
    store: ActivationStore, names: Sequence[str], *, block_bytes: int, done: Done = lambda _: None
) -> tuple[GroupSums, Mapping[str, UnitSums]]:
    """Sum the norms of each activation by position, one column each, and its rows scaled to length 1."""

    def described(block: RowBlock) -> _Described:
        norms, units = [], {}
        for name in names:
            rows = flat_rows(block, name)
            norms.append(row_norms(rows))
            units[name] = unit_sums(rows, norms[-1])
        return _Described(sum_by_group(np.stack(norms, -1), block.read_integers(_POSITION)), units)

    found = map_and_sum(described, even_blocks(store, [*names, *names, _POSITION], block_bytes), done)
    return found.norms, found.units


def compare_all(
    store: ActivationStore, sizes: Mapping[str, int], *, pairs: bool, block_bytes: int, done: Done = lambda _: None
) -> tuple[dict[str, npt.NDArray[np.float64]], npt.NDArray[np.float64]]:
    """Return the covariance of each activation, and the linear CKA of every two.

    Args:
        store: The activations.
        sizes: Values of a row, by name.
        pairs: Whether to compare; without it the CKA is NaN off the diagonal.
        block_bytes: Memory of a block, and of what is summed in one pass, in bytes.
        done: Called with 1 after each block.
    """
    names = list(sizes)
    covariances = {
        one: sums.covariance
        for (one, _), sums in _in_passes(store, [(name, name) for name in names], sizes, block_bytes, done)
    }
    lengths = {name: float(np.linalg.norm(covariance)) for name, covariance in covariances.items()}
    similar = np.full((len(names), len(names)), np.nan)
    for place, name in enumerate(names):
        similar[place, place] = 1.0 if lengths[name] else np.nan
    wanted = list(combinations(names, 2)) if pairs else []
    for (one, other), sums in _in_passes(store, wanted, sizes, block_bytes, done):
        i, j = names.index(one), names.index(other)
        similar[i, j] = similar[j, i] = linear_cka(sums.covariance, lengths[one], lengths[other])
    return covariances, similar


def _in_passes(
    store: ActivationStore, pairs: Sequence[Pair], sizes: Mapping[str, int], block_bytes: int, done: Done
) -> Iterator[tuple[Pair, CrossMoments]]:
    """Yield the moments of pairs, so many of them in one pass as memory allows."""
    pending: list[Pair] = []
    room = block_bytes / _STATES
    for pair in pairs:
        needed = 8 * sizes[pair[0]] * sizes[pair[1]]
        if pending and needed > room:
            yield from _one_pass(store, pending, block_bytes, done)
            pending, room = [], block_bytes / _STATES
        pending.append(pair)
        room -= needed
    if pending:
        yield from _one_pass(store, pending, block_bytes, done)


def _one_pass(
    store: ActivationStore, pairs: Sequence[Pair], block_bytes: int, done: Done
) -> Iterator[tuple[Pair, CrossMoments]]:
    names = list(dict.fromkeys(name for pair in pairs for name in pair))

    def summed(block: RowBlock) -> _Moments:
        rows = {name: flat_rows(block, name) for name in names}
        return _Moments(
            {(one, other): cross_moments(rows[one], None if one == other else rows[other]) for one, other in pairs}
        )

    found = map_and_sum(summed, even_blocks(store, names * _ROOM, block_bytes), done, fan_in=2)
    yield from found.by.items()

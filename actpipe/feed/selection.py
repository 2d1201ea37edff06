"""Which rows of a store a feed gives."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
import numpy.typing as npt

from actpipe.feed.documents import Split, in_split
from actpipe.feed.permutation import Indices
from actpipe.schemas.manifest import TokenTableManifest
from actpipe.stores.documents import RowDocuments
from actpipe.stores.token_table import TokenTable

Mask = npt.NDArray[np.bool_]
Filter = Callable[[int, int], Mask]
"""Takes a range of rows `[start, stop)` and says of each whether it is wanted."""
ReadIds = Callable[[int, int], npt.NDArray[np.int32]]
"""Takes a range of rows and returns their token ids."""


class RowSet:
    """Some rows of a store, kept as runs: 16 bytes for each run, however long."""

    def __init__(self, starts: Indices, stops: Indices) -> None:
        joined = np.flatnonzero(starts[1:] == stops[:-1])
        self._starts = np.delete(starts, joined + 1)
        lengths = np.delete(stops, joined) - self._starts
        self._ends: Indices = np.cumsum(lengths)
        self._first_rows = self._starts - (self._ends - lengths)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __call__(self, indices: Indices) -> Indices:
        """Return the rows that stand at these places among those of the set, which ascend."""
        if len(self._ends) == 1:
            return self._first_rows[0] + indices
        return self._first_rows[np.searchsorted(self._ends, indices, side="right")] + indices

    def count_before(self, rows: Indices) -> Indices:
        """Return how many rows of the set come before each of these."""
        run = np.searchsorted(self._starts, rows, side="right") - 1
        within = np.minimum(rows - self._first_rows[run], self._ends[run]) if len(self._ends) else 0 * rows
        return np.where(run < 0, 0, within)

    @property
    def checksum(self) -> int:
        """A number that another set of rows has only by chance."""
        return zlib.crc32(self._ends.tobytes(), zlib.crc32(self._starts.tobytes()))


def select_rows(ranges: Iterable[tuple[int, int]], filters: Sequence[Filter]) -> RowSet:
    """Return the rows of some ranges that every filter wants, going through one range at a time."""
    starts, stops = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for start, stop in ranges:
        wanted = reduce(np.logical_and, (keep(start, stop) for keep in filters), np.ones(stop - start, np.bool_))
        edges = np.flatnonzero(np.diff(wanted, prepend=False, append=False)) + start
        starts.append(edges[::2])
        stops.append(edges[1::2])
    return RowSet(np.concatenate(starts), np.concatenate(stops))


@dataclass(frozen=True)
class Selection:
    """Which tokens of a corpus are wanted; see `ActivationLoader`."""

    drop_special: bool | Iterable[int]
    split: Split | None
    validation_fraction: float
    split_seed: int

    def __post_init__(self) -> None:
        if self.split not in ("train", "validation", None):
            raise ValueError(f"split must be 'train', 'validation' or None, got {self.split!r}")
        if self.split is not None and not 0 < self.validation_fraction < 1:
            raise ValueError(f"validation_fraction must be between 0 and 1, got {self.validation_fraction}")

    def filters(
        self, open_tokens: Callable[[], TokenTable], open_documents: Callable[[], RowDocuments], read_ids: ReadIds
    ) -> list[Filter]:
        """Return what to ask of the rows of a corpus, whose token table is opened only where it is needed."""
        filters = []
        if self.drop_special:
            dropped = _special_ids(open_tokens().manifest) if self.drop_special is True else self.drop_special
            filters.append(_without_ids(dropped, read_ids))
        if self.split is not None:
            filters.append(_of_split(open_documents(), self.split, self.validation_fraction, self.split_seed))
        return filters


def _without_ids(unwanted: Iterable[int], read_ids: ReadIds) -> Filter:
    """Want the tokens that have none of these ids."""
    ids = np.array(sorted(set(unwanted)), np.int32)
    return lambda start, stop: ~np.isin(read_ids(start, stop), ids)


def _special_ids(tokens: TokenTableManifest) -> set[int]:
    """Return the ids of the tokens that tokenizing added: BOS, separator, padding."""
    return {token for token in (tokens.bos_id, tokens.separator_id, tokens.pad_id) if token is not None}


def _of_split(documents: RowDocuments, split: Split, fraction: float, seed: int) -> Filter:
    """Want the tokens of the documents in a split."""
    chosen = in_split(documents, split, fraction, seed)
    return lambda start, stop: chosen[documents.of_rows(np.arange(start, stop))]

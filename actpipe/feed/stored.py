"""Rows of opened stores as tensors: the arrays asked for, and the labels of their documents."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from operator import attrgetter
from typing import Any

import numpy as np
import torch

from actpipe.errors import StoreMismatchError
from actpipe.feed.documents import Labels
from actpipe.feed.feeding import Fill, Rows, as_numpy, empty_rows
from actpipe.feed.mixing import Mixture
from actpipe.feed.order import Order, Stretch
from actpipe.feed.permutation import Indices
from actpipe.feed.selection import RowSet
from actpipe.stores.arrays import StoredArray
from actpipe.stores.fetching import Chunk, FetchAhead
from actpipe.stores.mapping import MAPPED_FILES
from actpipe.stores.memory import room_for_files
from actpipe.stores.reading import ActivationStore
from actpipe.stores.uncached import UncachedReader

_ROWS_AT_ONCE = 16_384
_SHARE_OF_MEMORY = 0.8
"""Of what memory has room for, what files may take that are read again and again; the rest is for batches."""
_TIMES_MEMORY = 1.5
"""How much more than memory has room for files must take to be read past the page cache: of less, much would be in it
when it is read again."""
_ROW_BITS = 48
"""A source and a row in one number, to sort by both: 2^48 rows, 2^15 sources."""


@dataclass(frozen=True)
class Source:
    """One store: its arrays by the name they have in a batch, and the rows that are wanted."""

    store: ActivationStore
    arrays: Mapping[str, StoredArray]
    rows: RowSet


@dataclass(frozen=True)
class _Piece:
    """Rows that are read together, by source and row, and where in their stretch they go."""

    source: Indices
    rows: Indices
    here: slice
    is_last: bool


class StoredRows:
    """Reads rows of an epoch of a mixture of stores.

    Raises:
        StoreMismatchError: An array has another shape or element type in another store.
    """

    def __init__(self, sources: Sequence[Source], mixture: Mixture, labels: Mapping[str, Labels]) -> None:
        self._sources = sources
        self._mixture = mixture
        self._labels = labels
        for source in sources[1:]:
            for name, array in source.arrays.items():
                _check_same(name, sources[0].arrays[name], array, source.store)

    @property
    def n_rows(self) -> int:
        """Rows of an epoch."""
        return self._mixture.n_rows

    @property
    def activation_names(self) -> tuple[str, ...]:
        """Names of the activations that are not integers."""
        arrays = self._sources[0].arrays.items()
        return tuple(
            name for name, array in arrays if array.manifest.path.startswith("activations/") and array.dtype.kind != "i"
        )

    @property
    def identity(self) -> dict[str, Any]:
        """What must be equal for the same place of an epoch to hold the same row."""
        return {
            "arrays": list(self._sources[0].arrays),
            "labels": list(self._labels),
            "models": [source.store.manifest.model.fingerprint for source in self._sources],
            "rows": [source.rows.checksum for source in self._sources],
            "rows_by_run": self._mixture.counts.tolist(),
        }

    def allocate(self, n_rows: int, *, pinned: bool) -> Rows:
        """Return tensors for as many rows."""
        arrays = self._sources[0].arrays.items()
        shapes = {name: (array.manifest.row_shape, _torch_dtype(array)) for name, array in arrays}
        shapes |= {name: ((), label.dtype) for name, label in self._labels.items()} | {"row": ((), torch.int64)}
        if len(self._sources) > 1:
            shapes["source"] = ((), torch.int64)
        return empty_rows(n_rows, shapes, pinned=pinned)

    @contextmanager
    def reading(self, order: Order, stretches: Iterable[Stretch]) -> Iterator[Fill]:
        """Read stretches of an epoch, each in the order of the stores, while chunks to come are fetched."""

        @lru_cache(maxsize=1)
        def rows_of(start: int, stop: int) -> tuple[Indices, Indices]:
            return self._sorted(order, order(np.arange(start, stop)))

        def pieces() -> Iterator[_Piece]:
            for some in _some_at_once(stretches):
                if (chosen := some[0].chosen) is not None:
                    source, rows = rows_of(some[0].start, some[0].stop)
                    yield from _pieces(source[chosen], rows[chosen])
                    continue
                indices = order(np.concatenate([np.arange(stretch.start, stretch.stop) for stretch in some]))
                for here in np.split(indices, np.cumsum([stretch.n_rows for stretch in some])[:-1]):
                    yield from _pieces(*self._sorted(order, here))

        with (
            FetchAhead(pieces(), self._chunks) as coming,
            UncachedReader() if self._is_larger_than_memory else nullcontext() as uncached,
        ):

            def fill(into: Rows) -> Iterator[None]:
                for piece in coming:
                    self._read(piece, {name: tensor[piece.here] for name, tensor in into.items()}, uncached)
                    yield
                    if piece.is_last:
                        return

            yield fill

    @property
    def at_random(self) -> bool:
        """Whether all arrays are files of this machine that hold rows as they are, and can stay in memory together."""
        arrays = self._arrays
        if not all(array.is_mapped for array in arrays) or sum(array.n_parts for array in arrays) > MAPPED_FILES:
            return False
        return self._n_bytes <= _SHARE_OF_MEMORY * room_for_files()

    @property
    def _arrays(self) -> list[StoredArray]:
        return [array for source in self._sources for array in source.arrays.values()]

    @property
    def _n_bytes(self) -> int:
        return sum(array.n_rows * array.row_bytes for array in self._arrays)

    @property
    def _is_larger_than_memory(self) -> bool:
        """Whether files of this machine hold so much that it would be gone from memory before it is read again."""
        is_here = not any(array.is_far for array in self._arrays)
        return is_here and self._n_bytes > _TIMES_MEMORY * room_for_files() > 0

    def announce(self, order: Order, stretch: Stretch) -> None:
        """Let the operating system begin to read a whole stretch; only a hint."""
        source, rows = self._sorted(order, order(np.arange(stretch.start, stretch.stop)))
        for number, here in self._of_sources(source):
            for array in self._sources[number].arrays.values():
                array.announce(rows[here])

    def _sorted(self, order: Order, indices: Indices) -> tuple[Indices, Indices]:
        """Return source and row of these indices of an epoch, sorted by both."""
        source, within = self._mixture.locate(indices, order.epoch)
        if len(self._sources) == 1:
            return source, np.sort(self._sources[0].rows(within))
        rows = np.empty_like(within)
        for number in range(len(self._sources)):
            here = np.flatnonzero(source == number)
            rows[here] = self._sources[number].rows(within[here])
        both = np.sort(source << _ROW_BITS | rows)
        return both >> _ROW_BITS, both & (1 << _ROW_BITS) - 1

    def _chunks(self, piece: _Piece) -> Iterator[Chunk]:
        """Yield the chunks of object stores that a piece reads, in order."""
        for number, here in self._of_sources(piece.source):
            for array in filter(attrgetter("is_far"), self._sources[number].arrays.values()):
                yield from array.chunks(np.unique(piece.rows[here] // array.rows_per_part).tolist())

    def _of_sources(self, source: Indices) -> Iterator[tuple[int, slice]]:
        """Yield the sources that rows sorted by source come from, each with where its rows stand."""
        bounds = np.searchsorted(source, np.arange(len(self._sources) + 1)).tolist()
        for number, (start, stop) in enumerate(pairwise(bounds)):
            if start < stop:
                yield number, slice(start, stop)

    def _read(self, piece: _Piece, into: Rows, uncached: UncachedReader | None) -> None:
        source, rows = piece.source, piece.rows
        for number, here in self._of_sources(source):
            for name, array in self._sources[number].arrays.items():
                array.gather(rows[here], as_numpy(into[name])[here], uncached)
            for name, label in self._labels.items():
                into[name][here] = label.of_rows(number, rows[here])
        into["row"][:] = torch.from_numpy(rows)
        if "source" in into:
            into["source"][:] = torch.from_numpy(source)


def _some_at_once(stretches: Iterable[Stretch]) -> Iterator[list[Stretch]]:
    """Yield stretches, short ones together: computing where rows stand takes half as long for many as for few."""
    some: list[Stretch] = []
    n_rows = 0
    for stretch in stretches:
        n_rows += stretch.n_rows
        if some and (stretch.chosen is not None or n_rows > _ROWS_AT_ONCE):
            yield some
            some, n_rows = [], stretch.n_rows
        some.append(stretch)
    if some:
        yield some


def _pieces(source: Indices, rows: Indices) -> Iterator[_Piece]:
    """Yield what these rows are read in, some at a time."""
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        here = slice(start, min(start + _ROWS_AT_ONCE, len(rows)))
        yield _Piece(source[here], rows[here], here, is_last=here.stop == len(rows))


def _check_same(name: str, first: StoredArray, other: StoredArray, store: ActivationStore) -> None:
    wanted, found = [(array.manifest.dtype, array.manifest.row_shape) for array in (first, other)]
    if wanted != found:
        raise StoreMismatchError(
            f"cannot mix {name}: rows are {wanted[0]} {wanted[1]} in the first run and {found[0]} {found[1]} in "
            f"{store.folder.root}; mix runs of one shape and element type"
        )


def _torch_dtype(array: StoredArray) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, array.dtype.name)
    return dtype

"""The labelled samples of one activation, a block at a time: its rows, or one of each document."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from actpipe.jobs.blocks import Done, RowBlock, even_blocks
from actpipe.jobs.geometry import finite_rows, flat_rows
from actpipe.jobs.labels import ClassLabels, Numbers
from actpipe.stores.dtypes import as_float32
from actpipe.stores.reading import ActivationStore

_ROOM = 5
"""A sample takes the room of so many copies in float32: as it is, and twice in float64."""

Values = npt.NDArray[Any]
"""`(sample, channel)`, in float32 or float64."""


class Samples(Protocol):
    """What directions are fitted on and judged by."""

    @property
    def store(self) -> ActivationStore:
        """The activations."""

    @property
    def name(self) -> str:
        """Which of them."""

    @property
    def labels(self) -> ClassLabels:
        """Their classes."""

    @property
    def done(self) -> Done:
        """Called with 1 after each block."""

    @property
    def width(self) -> int:
        """Values of a sample."""

    def blocks(self) -> list[Any]:
        """Return what is read at a time."""

    def read(self, block: Any, *, held_out: bool) -> tuple[Values, Numbers]:
        """Return the labelled samples of one side, and their classes."""


@dataclass(frozen=True)
class Rows:
    """Every labelled row is a sample."""

    store: ActivationStore
    name: str
    labels: ClassLabels
    block_bytes: int
    done: Done = lambda _: None

    def blocks(self) -> list[RowBlock]:
        """Return the blocks of rows."""
        return even_blocks(self.store, [self.name] * _ROOM, self.block_bytes)

    def read(self, block: RowBlock, *, held_out: bool) -> tuple[Values, Numbers]:
        """Return labelled rows of one side, and their classes."""
        wanted, number = self.labels.rows_of(block, held_out=held_out)
        if not len(wanted):
            return np.empty((0, self.width), np.float32), number
        return flat_rows(block, self.name)[wanted], number

    @property
    def width(self) -> int:
        """Values of a row."""
        return int(np.prod(self.store.array(self.name).manifest.row_shape, dtype=np.int64))


Span = tuple[int, int]
"""Some consecutive documents, of those with rows."""


@dataclass(frozen=True)
class PooledRows(Rows):
    """Every labelled document is a sample: the mean of its rows in float64, or its last row.

    Pooled samples are kept from one pass to the next where all of them fit into `block_bytes`.
    """

    how: Literal["mean", "last"] = "mean"
    kept: dict[tuple[Span, bool], Values] = field(default_factory=dict)

    def blocks(self) -> list[Any]:
        """Return the blocks of documents: of about so many rows as fit into memory, or so many documents."""
        stops = self.labels.documents.row_stops
        read_before = np.arange(len(stops)) if self.how == "last" else np.maximum(stops - 1, 0)
        edges = np.flatnonzero(np.diff(read_before // self._rows_at_once, prepend=-1, append=-1))
        return [(int(first), int(last)) for first, last in pairwise(edges)]

    def read(self, block: Any, *, held_out: bool) -> tuple[Values, Numbers]:
        """Return labelled documents of one side, and their classes."""
        wanted = self.labels.documents_of(*block, held_out=held_out)
        found = self.kept.get((block, held_out))
        if found is None:
            found = self._last(wanted) if self.how == "last" else self._means(wanted)
            if self._keeps:
                self.kept[block, held_out] = found
        return found, self.labels.number[wanted]

    @property
    def _rows_at_once(self) -> int:
        return max(1, self.block_bytes // (4 * _ROOM * max(1, self.width)))

    @property
    def _keeps(self) -> bool:
        n_samples = sum(int(self.labels.count_samples(held_out=side).sum()) for side in (False, True))
        return 8 * n_samples * self.width <= self.block_bytes

    def _last(self, wanted: Numbers) -> Values:
        rows = self.labels.documents.row_stops[wanted] - 1
        found = as_float32(self.store.array(self.name).take(rows))
        return finite_rows(found, self.name, int(rows.min(initial=0)), int(rows.max(initial=-1)) + 1)

    def _means(self, wanted: Numbers) -> Values:
        """Return the means of documents; a long one is read in pieces."""
        documents = self.labels.documents
        total = np.zeros((len(wanted), self.width))
        if not len(wanted):
            return total
        stops = documents.row_stops
        starts = np.append(0, stops)[wanted]
        place = np.full(wanted[-1] - wanted[0] + 1, -1)
        place[wanted - wanted[0]] = np.arange(len(wanted))
        arrays = {self.name: self.store.array(self.name)}
        for start in range(int(starts[0]), int(stops[wanted[-1]]), self._rows_at_once):
            piece = RowBlock(start, min(start + self._rows_at_once, int(stops[wanted[-1]])), arrays)
            of_row = place[documents.of_rows(np.arange(piece.start, piece.stop)) - wanted[0]]
            there = np.flatnonzero(of_row >= 0)
            if len(there):
                firsts = np.flatnonzero(np.diff(of_row[there], prepend=-1))
                rows = flat_rows(piece, self.name)[there].astype(np.float64)
                total[of_row[there[firsts]]] += np.add.reduceat(rows, firsts)
        return total / (stops[wanted] - starts)[:, None]

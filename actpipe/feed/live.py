"""Batches of activations computed on the fly, for tokens that are tokenized and activations that are not stored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from actpipe.feed.documents import Labels
from actpipe.feed.feeding import Fill, Rows, empty_rows
from actpipe.feed.order import Order, Stretch
from actpipe.feed.permutation import Indices, Permutation
from actpipe.feed.selection import RowSet
from actpipe.records import Sequence
from actpipe.stores.token_table import TokenTable

RunSequences = Callable[[list[Sequence]], Iterator[list[tuple[Sequence, Rows]]]]
"""Runs a model over sequences in batches; yields, for each batch, its sequences with their `(position, ...)`."""
_SEQUENCES = 4
_SEQUENCES_AT_ONCE = 4096


@dataclass(frozen=True)
class LiveArray:
    """One activation that a model computes."""

    row_shape: tuple[int, ...]
    dtype: torch.dtype


class TokenRows:
    """Every sequence of a token table in memory: 4 bytes a token, and the row of the store that each would have."""

    def __init__(self, tokens: TokenTable) -> None:
        sequences = list(tokens.read_sequences())
        self._ids = np.concatenate([sequence.ids for sequence in sequences] or [np.empty(0, np.int32)])
        self._id_ends = np.cumsum([len(sequence.ids) for sequence in sequences], dtype=np.int64)
        self._n_context = np.array([sequence.n_context for sequence in sequences], np.int32)
        self._document = np.array([sequence.document for sequence in sequences], np.int64)
        self._start = np.array([sequence.start for sequence in sequences], np.int64)
        self.first_rows = np.array([sequence.first_row for sequence in sequences], np.int64)

        self._n_rows = tokens.manifest.n_rows

    def __len__(self) -> int:
        return len(self.first_rows)

    def sequence(self, number: int) -> Sequence:
        """Return one sequence."""
        start = int(self._id_ends[number - 1]) if number else 0
        return Sequence(
            sequence=number,
            document=int(self._document[number]),
            start=int(self._start[number]),
            n_context=int(self._n_context[number]),
            first_row=int(self.first_rows[number]),
            ids=self._ids[start : self._id_ends[number]],
        )

    def ranges(self) -> list[tuple[int, int]]:
        """Return ranges of rows that together are all, a bounded number of sequences each."""
        stops = np.append(self.first_rows, self._n_rows)
        numbers = [*range(0, len(self), _SEQUENCES_AT_ONCE), len(self)]
        return [(int(stops[first]), int(stops[last])) for first, last in pairwise(numbers)]

    def read_ids(self, start: int, stop: int) -> Any:
        """Return the token ids of rows `[start, stop)`."""
        first = int(np.searchsorted(self.first_rows, start, side="right")) - 1
        last = int(np.searchsorted(self.first_rows, stop, side="left"))
        own = [sequence.ids[sequence.n_context :] for sequence in map(self.sequence, range(first, last))]
        offset = start - int(self.first_rows[first])
        return np.concatenate(own)[offset : offset + stop - start]


class LiveRows:
    """Computes rows of an epoch: its sequences in random order, a stretch of them for each group of batches.

    A sequence that straddles two groups is run for both.

    Args:
        tokens: The sequences.
        rows: The rows that are wanted, numbered as a store would.
        arrays: What the model gives.
        run: Runs it.
        labels: Labels by column.
        identity: What of the model must be equal for equal rows.
    """

    def __init__(
        self,
        tokens: TokenRows,
        rows: RowSet,
        arrays: Mapping[str, LiveArray],
        run: RunSequences,
        *,
        labels: Mapping[str, Labels],
        identity: dict[str, Any],
    ) -> None:
        self._tokens, self._rows, self._arrays, self._run, self._labels = tokens, rows, arrays, run, labels
        self.identity = identity | {"arrays": list(arrays), "labels": list(labels), "rows": rows.checksum}
        self._places = rows.count_before(np.append(tokens.first_rows, np.iinfo(np.int64).max))

    @property
    def n_rows(self) -> int:
        """Rows of an epoch."""
        return len(self._rows)

    @property
    def activation_names(self) -> tuple[str, ...]:
        """Names of the activations that are not integers."""
        return tuple(name for name, array in self._arrays.items() if array.dtype.is_floating_point)

    @property
    def at_random(self) -> bool:
        """False: a sequence is run as a whole."""
        return False

    def announce(self, order: Order, stretch: Stretch) -> None:
        """Nothing is read."""

    def allocate(self, n_rows: int, *, pinned: bool) -> Rows:
        """Return tensors for as many rows."""
        shapes = {name: (array.row_shape, array.dtype) for name, array in self._arrays.items()}
        shapes |= {name: ((), label.dtype) for name, label in self._labels.items()} | {"row": ((), torch.int64)}
        return empty_rows(n_rows, shapes, pinned=pinned)

    @contextmanager
    def reading(self, order: Order, stretches: Iterable[Stretch]) -> Iterator[Fill]:
        """Compute stretches of an epoch, with a yield after each forward pass."""
        coming = iter(stretches)
        yield lambda into: self._compute(order, next(coming), into)

    def _compute(self, order: Order, stretch: Stretch, into: Rows) -> Iterator[None]:
        wanted = dict(self._stretch(order, stretch.start, stretch.n_rows))
        for batch in self._run([self._tokens.sequence(number) for number in wanted]):
            for sequence, activations in batch:
                self._put(sequence, activations, wanted[sequence.sequence], into)
            yield

    def _stretch(self, order: Order, start: int, n_rows: int) -> Iterator[tuple[int, _Piece]]:
        """Yield the sequences that hold these rows of the epoch, and which rows of each go where."""
        counts = np.diff(self._places)
        numbers = np.flatnonzero(counts)
        if order.shuffle is not None:
            numbers = numbers[Permutation(len(numbers), order.seed, order.epoch, _SEQUENCES)(np.arange(len(numbers)))]
        ends = np.cumsum(counts[numbers])
        first, last = np.searchsorted(ends, [start, start + n_rows - 1], side="right")
        for number, end in zip(numbers[first : last + 1].tolist(), ends[first : last + 1].tolist(), strict=True):
            begin = end - int(counts[number])
            skip, stop = max(0, start - begin), min(end, start + n_rows) - begin
            indices = np.arange(self._places[number] + skip, self._places[number] + stop)
            yield number, _Piece(self._rows(indices), begin + skip - start)

    def _put(self, sequence: Sequence, activations: Rows, piece: _Piece, into: Rows) -> None:
        here = slice(piece.start, piece.start + len(piece.rows))
        positions = torch.from_numpy(piece.rows - sequence.first_row + sequence.n_context)
        for name, values in activations.items():
            into[name][here] = values[positions.to(values.device)].to("cpu", into[name].dtype)
        for name, label in self._labels.items():
            into[name][here] = label.of_rows(0, piece.rows)
        into["row"][here] = torch.from_numpy(piece.rows)


@dataclass(frozen=True)
class _Piece:
    """Rows of one sequence that are wanted, and where they go."""

    rows: Indices
    start: int

"""Which rows of a store come from which model inputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from actpipe.records import Part, Sequence
from actpipe.stores.kept_rows import KeptRows
from actpipe.stores.token_table import TokenTable


@dataclass(frozen=True)
class WantedRows:
    """Rows of the store that one model input gives; they follow one another."""

    sequence: Sequence
    positions: npt.NDArray[np.int64]
    """Positions in the sequence, ascending."""
    first_row: int
    """Row of the store that the first of them is."""

    def within(self, columns: range) -> WantedRows:
        """Return those at some positions."""
        start, stop = np.searchsorted(self.positions, [columns.start, columns.stop]).tolist()
        return WantedRows(self.sequence, self.positions[start:stop], self.first_row + start)


def rows_of_part(tokens: TokenTable, kept: KeptRows | None, part: Part) -> Iterator[WantedRows]:
    """Yield the sequences that have a row in a part of the store, in order.

    Args:
        tokens: The token table.
        kept: The tokens that have rows, where these are not all.
        part: Rows of the store.
    """
    if kept is None:
        for sequence in tokens.read_sequences(part.row_start, part.row_stop):
            start, stop = max(sequence.first_row, part.row_start), min(sequence.row_stop, part.row_stop)
            offset = sequence.n_context - sequence.first_row
            yield WantedRows(sequence, np.arange(start + offset, stop + offset), start)
        return
    rows, sequences = kept.read(part.row_start, part.row_stop)
    wanted = set(sequences.tolist())
    for sequence in tokens.read_sequences(int(rows[0]), int(rows[-1]) + 1):
        if sequence.sequence in wanted:
            start, stop = np.searchsorted(sequences, [sequence.sequence, sequence.sequence + 1]).tolist()
            positions = rows[start:stop] - sequence.first_row + sequence.n_context
            yield WantedRows(sequence, positions, part.row_start + start)

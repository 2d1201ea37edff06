"""The row table: which tokens have rows in a store that keeps only some of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from actpipe.schemas.manifest import KeptRowsManifest
from actpipe.stores.layout import RunFolder, crc32c_of, extend_crc32c, move, sync, write_whole

Numbers = npt.NDArray[np.int64]

_ROWS_PER_GROUP = 65_536
_SCHEMA = pa.schema([pa.field("row", pa.int64(), nullable=False), pa.field("sequence", pa.int64(), nullable=False)])


class KeptRows:
    """Tokens with rows in a store, by their rows in the token table, in ascending order."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.manifest = KeptRowsManifest.from_json(folder.rows_commit.read_bytes())

    def read(self, start: int, stop: int) -> tuple[Numbers, Numbers]:
        """Return, for rows `[start, stop)` of the store, their rows in the token table and their sequences."""
        groups = range(start // _ROWS_PER_GROUP, -(-stop // _ROWS_PER_GROUP))
        file = pq.ParquetFile(self.folder.rows, metadata=self._metadata)
        table = file.read_row_groups(list(groups)).slice(start - groups.start * _ROWS_PER_GROUP, stop - start)
        return table["row"].to_numpy(), table["sequence"].to_numpy()

    def count_before(self, rows: Numbers) -> Numbers:
        """Return how many kept tokens come before each of these rows of the token table; group by group."""
        counts = np.zeros(len(rows), np.int64)
        for start in range(0, self.manifest.n_rows, _ROWS_PER_GROUP):
            kept, _ = self.read(start, min(start + _ROWS_PER_GROUP, self.manifest.n_rows))
            counts += np.searchsorted(kept, rows)
        return counts

    def sequence_rows(self) -> tuple[Numbers, Numbers]:
        """Return, for every sequence with a row, its first row in the store, and one past its last."""
        sequences = pq.read_table(self.folder.rows, columns=["sequence"])["sequence"].to_numpy()
        first = np.flatnonzero(np.diff(sequences, prepend=-1)).astype(np.int64)
        return first, np.append(first[1:], len(sequences))

    @cached_property
    def _metadata(self) -> Any:
        return pq.read_metadata(self.folder.rows)


def read_kept_rows(folder: RunFolder) -> KeptRowsManifest | None:
    """Return the record of the row table, if there is one."""
    return KeptRowsManifest.from_json(folder.rows_commit.read_bytes()) if folder.rows_commit.is_file() else None


def write_kept_rows(
    folder: RunFolder, pieces: Iterable[tuple[Numbers, Numbers]], *, keep: dict[str, object], tokens: dict[str, str]
) -> KeptRowsManifest:
    """Write the row table, and its record last.

    Args:
        folder: The corpus.
        pieces: Rows in the token table, ascending, and the sequences that they are of.
        keep: The settings by which they were chosen.
        tokens: Checksums of the token table.
    """
    partial = folder.new_partial("rows")
    path, checksum, n_rows = partial / folder.rows.name, 0, 0
    with pq.ParquetWriter(path, _SCHEMA, compression="zstd") as writer:
        for rows, sequences in _regrouped(pieces):
            checksum = extend_crc32c(checksum, rows.astype("<i8").view(np.uint8).data)
            n_rows += len(rows)
            writer.write_table(pa.table([rows, sequences], schema=_SCHEMA), row_group_size=_ROWS_PER_GROUP)
    manifest = KeptRowsManifest(
        keep=keep, tokens=tokens, n_rows=n_rows, rows_crc32c=f"{checksum:08x}", file_crc32c=crc32c_of(path)
    )
    sync(path)
    move(path, folder.rows)
    partial.rmdir()
    write_whole(folder.rows_commit, manifest.to_json().encode())
    return manifest


def _regrouped(pieces: Iterable[tuple[Numbers, Numbers]]) -> Iterator[tuple[Numbers, Numbers]]:
    """Yield the same rows in groups of one size, the last excepted."""
    waiting: list[tuple[Numbers, Numbers]] = []
    n_waiting = 0
    for piece in pieces:
        waiting.append(piece)
        n_waiting += len(piece[0])
        if n_waiting >= _ROWS_PER_GROUP:
            rows, sequences = (np.concatenate(column) for column in zip(*waiting, strict=True))
            whole = n_waiting - n_waiting % _ROWS_PER_GROUP
            for start in range(0, whole, _ROWS_PER_GROUP):
                yield rows[start : start + _ROWS_PER_GROUP], sequences[start : start + _ROWS_PER_GROUP]
            waiting, n_waiting = [(rows[whole:], sequences[whole:])], n_waiting - whole
    if n_waiting:
        rows, sequences = (np.concatenate(column) for column in zip(*waiting, strict=True))
        yield rows, sequences

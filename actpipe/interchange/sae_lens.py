"""SAELens' cached activations: Arrow, a row per sequence, `(context_length, d_in)` per hook, and `token_ids`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from actpipe.errors import InterchangeError
from actpipe.interchange.arrow import ArrowReader, ArrowWriter
from actpipe.interchange.formats import IDS, Column, Format, Values, path_of, public_name
from actpipe.schemas.interchange import ExportRecord

_IDS = "token_ids"


class SaeLensWriter:
    """Joins the rows of each sequence, and the axes of each row into `d_in`."""

    def __init__(self, folder: Path, columns: Mapping[str, Column], record: ExportRecord) -> None:
        self._identity = record.to_json()
        self._length = record.store.context_length
        widths = {_name(path): (*_flat(column.row_shape),) for path, column in columns.items()}
        dtypes = {_name(path): column.dtype for path, column in columns.items()}
        self._writer = ArrowWriter(folder, {n: Column(dtypes[n], (self._length, *w)) for n, w in widths.items()})
        self._widths = widths

    def write(self, rows: Mapping[str, Values]) -> None:
        """Append whole sequences."""
        named = {_name(path): values for path, values in rows.items()}
        self._writer.write({n: v.reshape(-1, self._length, *self._widths[n]) for n, v in named.items()})

    def close(self) -> None:
        """Finish the dataset."""
        self._writer.close(self._identity)


def _name(path: str) -> str:
    return _IDS if path == IDS else public_name(path)


def _flat(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return `(d_in,)` for what a hook has of one token, `()` for a token's id."""
    return (math.prod(shape),) if shape else ()


class SaeLensReader:
    """Cuts sequences into rows.

    Raises:
        InterchangeError: Columns are not of sequences of one length.
    """

    def __init__(self, source: Path) -> None:
        self._reader = ArrowReader(source)
        columns = {name: column for name, column in self._reader.columns.items() if column.row_shape}
        lengths = {column.row_shape[0] for column in columns.values()}
        if len(lengths) != 1:
            raise InterchangeError(
                f"{source} is no cache of SAELens: its columns hold sequences of {sorted(lengths) or 'no'} tokens"
            )
        self._length: int = lengths.pop()
        self.context_length = self._length
        self.n_rows = self._reader.n_rows * self._length
        self._names = {path_of(name): name for name in columns}
        self.columns = {p: Column(columns[n].dtype, columns[n].row_shape[1:]) for p, n in self._names.items()}

    def read(self, path: str, start: int, stop: int) -> Values:
        """Return rows of one array."""
        first, last = start // self._length, -(-stop // self._length)
        values = self._reader.read(self._names[path], first, last)
        rows = values.reshape(-1, *values.shape[2:])
        return rows[start - first * self._length : stop - first * self._length]


FORMAT = Format(SaeLensWriter, SaeLensReader, whole_sequences=True)

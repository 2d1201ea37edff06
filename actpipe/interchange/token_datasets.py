"""Hugging Face `datasets`: Arrow on the disk, a row per token, a column per array."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from actpipe.interchange.arrow import ArrowReader, ArrowWriter
from actpipe.interchange.formats import Column, Format, Values, path_of, public_name
from actpipe.schemas.interchange import ExportRecord


class TokenDatasetWriter:
    """Names columns as others know them."""

    def __init__(self, folder: Path, columns: Mapping[str, Column], record: ExportRecord) -> None:
        self._identity = record.to_json()
        self._writer = ArrowWriter(folder, {public_name(path): column for path, column in columns.items()})

    def write(self, rows: Mapping[str, Values]) -> None:
        """Append rows."""
        self._writer.write({public_name(path): values for path, values in rows.items()})

    def close(self) -> None:
        """Finish the dataset."""
        self._writer.close(self._identity)


class TokenDatasetReader:
    """Names columns as a store does."""

    context_length = None

    def __init__(self, source: Path) -> None:
        self._reader = ArrowReader(source)
        self._names = {path_of(name): name for name in self._reader.columns}
        self.columns = {path: self._reader.columns[name] for path, name in self._names.items()}
        self.n_rows = self._reader.n_rows

    def read(self, path: str, start: int, stop: int) -> Values:
        """Return rows of one array."""
        return self._reader.read(self._names[path], start, stop)


FORMAT = Format(TokenDatasetWriter, TokenDatasetReader)

"""Documents of a dataset, one after another, in its order and by its names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from actpipe.errors import DatasetError, did_you_mean
from actpipe.records import SourceDocument
from actpipe.schemas.recipe import DatasetConfig
from actpipe.text.sources import Source, open_source

ColumnType = Literal["text", "messages", "token_ids"]
Keep = Literal["all", "none"] | tuple[str, ...]

_SIMPLE = (pa.types.is_boolean, pa.types.is_integer, pa.types.is_floating, pa.types.is_string, pa.types.is_large_string)
_SHARD_DOCUMENTS = 1024
"""Documents that are read and tokenized together, where they are shared out over workers."""
RESERVED_COLUMNS = frozenset({"document", "id", "status", "n_tokens", "n_truncated", "row_start", "row_stop"})


@dataclass(frozen=True)
class Corpus:
    """A dataset whose columns are settled: which holds the document, which the id, which are kept."""

    source: Source
    column: str
    column_type: ColumnType
    id_column: str | None
    kept: Mapping[str, pa.DataType]
    """Columns of documents.parquet that come from the dataset, by the name they have there."""
    kept_from: Mapping[str, str]
    """The same names, to the columns of the dataset."""

    def shards(self, limit: int | None = None) -> Iterator[range] | None:
        """Return the numbers of all documents, some together, where each shard can be read by itself."""
        if self.source.length is None or self.source.among(range(0)) is None:
            return None
        n_documents = self.source.length if limit is None else min(limit, self.source.length)
        starts = range(0, n_documents, _SHARD_DOCUMENTS)
        return (range(start, min(n_documents, start + _SHARD_DOCUMENTS)) for start in starts)

    def shard(self, documents: range) -> Iterator[SourceDocument]:
        """Yield the documents of a shard, numbered as in the whole."""
        source = self.source.among(documents)
        assert source is not None, "shards are of sources that can be cut"
        return replace(self, source=source).documents(first=documents.start)

    def documents(self, limit: int | None = None, *, first: int = 0) -> Iterator[SourceDocument]:
        """Yield the documents, numbered from `first`; at most `limit`."""
        index = first
        for batch in self.source.batches():
            length = max(map(len, batch.values()))
            missing = [None] * length
            columns = {ours: batch.get(theirs, missing) for ours, theirs in self.kept_from.items()}
            ids = batch.get(self.id_column, missing) if self.id_column else missing
            for i, value in enumerate(batch.get(self.column, missing)):
                if limit is not None and index >= limit:
                    return
                name = index if ids[i] is None else ids[i]
                kept = {ours: _fit(values[i], self.kept[ours]) for ours, values in columns.items()}
                yield SourceDocument(index, _utf8(str(name)), value, kept)
                index += 1


def _fit(value: Any, kind: pa.DataType) -> Any:
    """Make a value fit its column: mixed columns become text, and text becomes valid Unicode."""
    if value is not None and (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        return _utf8(value if isinstance(value, str) else str(value))
    return value


def _utf8(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def open_corpus(config: DatasetConfig, keep: Keep, base: Path) -> Corpus:
    """Open a dataset and settle its columns before anything is read for good.

    Args:
        config: What to read.
        keep: Columns to copy beside each document.
        base: Folder that relative paths start from.

    Raises:
        DatasetError: It cannot be opened, or has no such column; names what there is.
    """
    source = open_source(config, base)
    schema = source.schema or _peek_schema(source)
    names = schema.names
    for wanted in (config.column, config.id_column, *(() if isinstance(keep, str) else keep)):
        if wanted is not None and wanted not in names:
            raise DatasetError(
                f"{source.title} has no column {wanted!r}, it has {', '.join(names)}{did_you_mean(wanted, names)}"
            )
    id_column = config.id_column or ("id" if "id" in names else None)
    kept = _kept_columns(schema, keep, leave_out={config.column, id_column})
    column_type = config.column_type
    return Corpus(
        source=source,
        column=config.column,
        column_type=_column_type(schema.field(config.column).type) if column_type == "auto" else column_type,
        id_column=id_column,
        kept={ours: schema.field(theirs).type for ours, theirs in kept.items()},
        kept_from=kept,
    )


def _peek_schema(source: Source) -> pa.Schema:
    """Infer columns and types from the first batch."""
    first = next(source.batches(), None)
    if first is None:
        raise DatasetError(f"{source.title} holds no documents")
    return pa.schema([pa.field(name, _infer_type(values)) for name, values in first.items()])


def _infer_type(values: list[Any]) -> pa.DataType:
    """Return the Arrow type of some Python values; text where they are mixed or not valid Unicode."""
    try:
        found = pa.array(values).type
    except (pa.ArrowException, UnicodeError, OverflowError):
        return pa.string()
    return pa.string() if pa.types.is_null(found) else found


def _column_type(kind: pa.DataType) -> ColumnType:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return "token_ids" if pa.types.is_integer(kind.value_type) else "messages"
    return "text"


def _kept_columns(schema: pa.Schema, keep: Keep, leave_out: Iterable[str | None]) -> dict[str, str]:
    if keep == "none":
        return {}
    if keep == "all":
        simple = [field.name for field in schema if any(is_kind(field.type) for is_kind in _SIMPLE)]
        wanted = [name for name in simple if name not in leave_out]
    else:
        wanted = list(keep)
    return {f"source_{name}" if name in RESERVED_COLUMNS else name: name for name in wanted}

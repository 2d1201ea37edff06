"""The token table: documents.parquet and sequences.parquet, written once and whole, read part by part."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from actpipe.errors import IncompleteStoreError, StoreMismatchError
from actpipe.records import DocumentRow, Sequence
from actpipe.schemas.manifest import TokenTableManifest
from actpipe.stores.layout import RunFolder, crc32c_of, move, sync, write_whole

_DOCUMENTS_PER_GROUP = 65_536
_TOKENS_PER_GROUP = 262_144

DOCUMENT_FIELDS = (
    pa.field("document", pa.int64(), nullable=False),
    pa.field("id", pa.string(), nullable=False),
    pa.field("status", pa.string(), nullable=False),
    pa.field("n_tokens", pa.int64(), nullable=False),
    pa.field("n_truncated", pa.int64(), nullable=False),
    pa.field("row_start", pa.int64()),
    pa.field("row_stop", pa.int64()),
)
OWN_COLUMNS = frozenset(field.name for field in DOCUMENT_FIELDS)
"""Names that no column of the dataset may have."""
SEQUENCE_SCHEMA = pa.schema(
    [
        pa.field("sequence", pa.int64(), nullable=False),
        pa.field("document", pa.int64(), nullable=False),
        pa.field("start", pa.int64(), nullable=False),
        pa.field("n_tokens", pa.int32(), nullable=False),
        pa.field("n_context", pa.int32(), nullable=False),
        pa.field("first_row", pa.int64(), nullable=False),
        pa.field("n_prompt", pa.int32()),
        pa.field("input_ids", pa.list_(pa.int32()), nullable=False),
    ]
)


class TokenTableWriter:
    """Takes documents and sequences in order, in bounded memory; nothing shows before `commit`."""

    def __init__(self, folder: RunFolder, columns: Mapping[str, pa.DataType]) -> None:
        self._folder = folder
        self._columns = dict(columns)
        self._partial = folder.new_partial("tokens")
        self._documents = pq.ParquetWriter(
            self._partial / "documents.parquet",
            pa.schema([*DOCUMENT_FIELDS, *(pa.field(name, kind) for name, kind in columns.items())]),
            compression="zstd",
        )
        self._sequences = pq.ParquetWriter(
            self._partial / "sequences.parquet", SEQUENCE_SCHEMA, compression="zstd", use_dictionary=False
        )
        self._pending_documents: list[DocumentRow] = []
        self._pending_sequences: list[Sequence] = []
        self._pending_tokens = 0
        self.n_sequences = 0
        self.n_rows = 0
        self.n_truncated = 0
        self.status_counts: Counter[str] = Counter()

    def add(self, record: DocumentRow | Sequence) -> None:
        """Take the next document or sequence."""
        if isinstance(record, DocumentRow):
            self._pending_documents.append(record)
            self.status_counts[str(record.status)] += 1
            self.n_truncated += record.n_truncated
            if len(self._pending_documents) >= _DOCUMENTS_PER_GROUP:
                self._flush_documents()
            return
        assert record.first_row == self.n_rows, "sequences must follow one another without a gap"
        self._pending_sequences.append(record)
        self._pending_tokens += len(record.ids)
        self.n_sequences += 1
        self.n_rows += record.n_tokens
        if self._pending_tokens >= _TOKENS_PER_GROUP:
            self._flush_sequences()

    def commit(self, manifest: TokenTableManifest) -> None:
        """Put the finished files in their places, then the record that makes them count."""
        self._flush_documents()
        self._flush_sequences()
        self._documents.close()
        self._sequences.close()
        files = (self._folder.documents, self._folder.sequences)
        checksums = {path.name: crc32c_of(self._partial / path.name) for path in files}
        manifest = manifest.model_copy(update={"checksums": checksums})
        _refuse_another(self._folder, manifest)
        for path in files:
            sync(self._partial / path.name)
            move(self._partial / path.name, path)
        self._partial.rmdir()
        write_whole(self._folder.token_commit, manifest.to_json().encode())
        self._folder.withdrawn_tokens.unlink(missing_ok=True)

    def _flush_documents(self) -> None:
        rows, self._pending_documents = self._pending_documents, []
        if not rows:
            return
        arrays: list[Any] = [
            pa.array([getattr(row, field.name) for row in rows], field.type) for field in DOCUMENT_FIELDS
        ]
        arrays += [pa.array([row.columns.get(n) for row in rows], kind) for n, kind in self._columns.items()]
        self._documents.write_table(pa.table(arrays, schema=self._documents.schema))

    def _flush_sequences(self) -> None:
        rows, self._pending_sequences, self._pending_tokens = self._pending_sequences, [], 0
        if not rows:
            return
        offsets = np.concatenate([[0], np.cumsum([len(row.ids) for row in rows])]).astype(np.int32)
        flat = np.concatenate([row.ids for row in rows])
        arrays: list[Any] = [
            pa.array([getattr(row, field.name) for row in rows], field.type) for field in list(SEQUENCE_SCHEMA)[:-1]
        ]
        arrays.append(pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat, pa.int32())))
        self._sequences.write_table(pa.table(arrays, schema=SEQUENCE_SCHEMA))


def _refuse_another(folder: RunFolder, made: TokenTableManifest) -> None:
    """Refuse a table in the place of a withdrawn one that it does not equal: the store belongs to that.

    Raises:
        StoreMismatchError: Says what differs.
    """
    if not folder.withdrawn_tokens.is_file():
        return
    try:
        before = TokenTableManifest.from_json(folder.withdrawn_tokens.read_bytes())
    except ValidationError:  # it was withdrawn because it could not be read
        return
    different = [key for key, value in made.model_dump().items() if value != getattr(before, key)]
    if different:
        key = different[0]
        raise StoreMismatchError(
            f"cannot repair the token table of {folder.root}: made anew its {key} is {getattr(made, key)!r}, it was "
            f"{getattr(before, key)!r}; the dataset or a library has changed, so run the recipe in another folder"
        )


class TokenTable:
    """A finished token table; reads the rows that are asked for and no more.

    Raises:
        IncompleteStoreError: There is none in the folder.
    """

    def __init__(self, folder: RunFolder) -> None:
        if not folder.token_commit.is_file():
            raise IncompleteStoreError(f"{folder.root} holds no token table; run a recipe with `tokenize_text` first")
        self.folder = folder
        self.manifest = TokenTableManifest.from_json(folder.token_commit.read_bytes())

    @staticmethod
    def exists(folder: RunFolder) -> bool:
        """Whether the folder holds a finished token table."""
        return folder.token_commit.is_file()

    def read_sequences(self, row_start: int = 0, row_stop: int | None = None) -> Iterator[Sequence]:
        """Yield, in order, the sequences that have a row in `[row_start, row_stop)`."""
        stop = self.manifest.n_rows if row_stop is None else row_stop
        file = pq.ParquetFile(self.folder.sequences, metadata=self._metadata)  # one each: threads may not share it
        first = max(0, bisect_right(self._group_first_rows, row_start) - 1)
        for group in range(first, file.num_row_groups):
            if self._group_first_rows[group] >= stop:
                return
            for sequence in _sequences_of(file.read_row_group(group)):
                if sequence.row_stop > row_start and sequence.first_row < stop:
                    yield sequence

    def sequence_blocks(self, max_rows: int) -> list[tuple[int, int]]:
        """Cut the rows into blocks of whole sequences, of at most `max_rows` where one sequence allows it."""
        blocks: list[tuple[int, int]] = []
        start = stop = 0
        for row_stop in self.sequence_rows()[1].tolist():
            if row_stop - start > max_rows and stop > start:
                blocks.append((start, stop))
                start = stop
            stop = row_stop
        if stop > start:
            blocks.append((start, stop))
        return blocks

    @property
    def stores_prefix(self) -> bool:
        """Whether the last sequence is the prefix itself, which then has rows there."""
        if not self.manifest.prefix_ids:
            return False
        return next(self.read_sequences(self.manifest.n_rows - 1)).n_context == 0

    def sequence_rows(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return the first row of every sequence, and one past its last."""
        table = pq.read_table(self.folder.sequences, columns=["first_row", "n_tokens"])
        first, count = (table[name].to_numpy() for name in ("first_row", "n_tokens"))
        return first, first + count

    def read_documents(self, columns: Iterable[str] | None = None) -> pa.Table:
        """Return documents.parquet, or some columns of it, as an Arrow table."""
        return pq.read_table(self.folder.documents, columns=None if columns is None else list(columns))

    @property
    def document_columns(self) -> tuple[str, ...]:
        """Names of the columns of documents.parquet."""
        return tuple(pq.read_schema(self.folder.documents).names)

    def read_document(self, document: int) -> dict[str, Any]:
        """Return one row of documents.parquet.

        Raises:
            IndexError: There is no such document.
        """
        if not 0 <= document < self.manifest.n_documents:
            raise IndexError(f"document {document} is not one of the {self.manifest.n_documents} of this corpus")
        file = pq.ParquetFile(self.folder.documents)
        group, offset = divmod(document, _DOCUMENTS_PER_GROUP)
        row: dict[str, Any] = file.read_row_group(group).slice(offset, 1).to_pylist()[0]
        return row

    @cached_property
    def _metadata(self) -> Any:
        return pq.read_metadata(self.folder.sequences)

    @cached_property
    def _group_first_rows(self) -> list[int]:
        column = SEQUENCE_SCHEMA.get_field_index("first_row")
        groups = map(self._metadata.row_group, range(self._metadata.num_row_groups))
        return [group.column(column).statistics.min for group in groups]


def _sequences_of(table: pa.Table) -> Iterator[Sequence]:
    numbers = {name: table[name].to_numpy() for name in ("sequence", "document", "start", "n_context", "first_row")}
    prompts = table["n_prompt"].to_pylist() if "n_prompt" in table.column_names else [None] * len(table)
    lists = table["input_ids"].combine_chunks()
    offsets, flat = lists.offsets.to_numpy(), np.array(lists.values.to_numpy())  # a copy: Arrow's cannot be written
    for i in range(len(table)):
        yield Sequence(
            sequence=int(numbers["sequence"][i]),
            document=int(numbers["document"][i]),
            start=int(numbers["start"][i]),
            n_context=int(numbers["n_context"][i]),
            first_row=int(numbers["first_row"][i]),
            ids=flat[offsets[i] : offsets[i + 1]],
            n_prompt=prompts[i],
        )

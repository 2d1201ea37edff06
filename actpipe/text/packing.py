"""From tokenized documents to model inputs: whole documents joined, or each document its own.

Both are generators that yield, in order, every sequence and every document's row of the table,
and that hold one document and one unfinished sequence at a time. No token is lost or doubled:
a token is in exactly one row, or it is counted as truncated.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from actpipe.records import DocumentRow, DocumentStatus, Sequence, TokenIds, TokenizedDocument

PREFIX_ID = "(prefix)"
"""Id of the document that holds the prefix's own rows."""


@dataclass(frozen=True)
class Packing:
    """How documents become sequences."""

    context_length: int
    bos_id: int | None = None
    """Stands at position 0 of every sequence, if any."""
    separator_id: int | None = None
    """Stands after every document (packed layout only), if any."""
    stride: int | None = None
    """Distance of windows in tokens of the document; None cuts a document after one sequence."""
    max_rows: int | None = None
    """Stop after this many rows."""
    closing_id: int | None = None
    """Stands at the end of every sequence (documents layout only), if any."""
    prefix: tuple[int, ...] = ()
    """Stands before everything in every sequence, as context that has no rows there."""

    def __post_init__(self) -> None:
        if self.room < 1:
            raise ValueError(
                f"context_length ({self.context_length}) leaves no room beside special tokens"
                + (f" and a prefix of {len(self.prefix)}" if self.prefix else "")
            )

    @property
    def room(self) -> int:
        """Tokens of documents that fit into one sequence."""
        return self.context_length - len(self.prefix) - (self.bos_id is not None) - (self.closing_id is not None)

    def with_windows(self, stride: int | None) -> Packing:
        """Return the same, with windows so far apart, or as far as they may be."""
        return replace(self, stride=min(self.room, stride or self.room))

    @property
    def first_ids(self) -> TokenIds:
        """What every sequence begins with: the prefix and BOS."""
        return np.concatenate([np.array(self.prefix, np.int32), one_or_none(self.bos_id)])


def one_or_none(token_id: int | None) -> TokenIds:
    """Return an id as a piece to join, empty where there is none."""
    return np.array([] if token_id is None else [token_id], np.int32)


def pack(documents: Iterable[TokenizedDocument], settings: Packing) -> Iterator[DocumentRow | Sequence]:
    """Join documents, each followed by the separator, and cut at exactly the context length.

    The last sequence may be shorter. A document's rows are those from its first token to its
    separator; BOS rows of sequences that begin inside it lie between them and are not its own.
    """
    assembler = _Assembler(settings)
    separator = one_or_none(settings.separator_id)
    for document in documents:
        if assembler.is_full:
            break
        if document.status is not DocumentStatus.OK:
            yield _without_rows(document)
            continue
        yield from assembler.append(document, np.concatenate([document.ids, separator]))
    yield from assembler.finish()


class _Assembler:
    """The unfinished sequence, and how many rows there are so far."""

    def __init__(self, settings: Packing) -> None:
        self._settings = settings
        self._pieces: list[TokenIds] = []
        self._length = 0
        self._sequence = 0
        self._first_row = 0
        self._first_token = (0, 0)

    @property
    def _row(self) -> int:
        return self._first_row + self._length - (len(self._settings.prefix) if self._length else 0)

    @property
    def is_full(self) -> bool:
        """Whether no further row may be added."""
        limit = self._settings.max_rows
        return limit is not None and self._row + (self._length == 0 and self._settings.bos_id is not None) >= limit

    def append(self, document: TokenizedDocument, ids: TokenIds) -> Iterator[DocumentRow | Sequence]:
        """Add one document's tokens, yielding sequences as they fill up and then the document's own row."""
        taken, row_start = 0, None
        while taken < len(ids) and not self.is_full:
            if self._length == 0:
                self._open(document.index, taken)
            if row_start is None:
                row_start = self._row
            piece = ids[taken : taken + self._space()]
            self._pieces.append(piece)
            self._length += len(piece)
            taken += len(piece)
            if self._length == self._settings.context_length:
                yield self._close()
        own = min(taken, len(document.ids))
        row_stop = row_start if row_start is None else self._row
        yield _with_rows(document, own, row_start, row_stop)

    def _space(self) -> int:
        free = self._settings.context_length - self._length
        limit = self._settings.max_rows
        return free if limit is None else min(free, limit - self._row)

    def _open(self, document: int, start: int) -> None:
        self._first_token = (document, start)
        first = self._settings.first_ids
        if len(first):
            self._pieces.append(first)
            self._length = len(first)

    def _close(self) -> Sequence:
        document, start = self._first_token
        sequence = Sequence(
            sequence=self._sequence,
            document=document,
            start=start,
            n_context=len(self._settings.prefix),
            first_row=self._first_row,
            ids=np.concatenate(self._pieces),
        )
        self._sequence += 1
        self._first_row, self._pieces, self._length = sequence.row_stop, [], 0
        return sequence

    def finish(self) -> Iterator[Sequence]:
        """Yield what is left as a shorter sequence."""
        if self._length:
            yield self._close()


def split(documents: Iterable[TokenizedDocument], settings: Packing) -> Iterator[DocumentRow | Sequence]:
    """Make each document its own sequences: one, cut at the context length, or windows over all of it.

    Windows start `stride` tokens apart. What two windows share is context of the second and has its
    rows in the first, so every token is stored once, with at least `room - stride` tokens before it.
    """
    n_sequences, row = 0, 0
    for document in documents:
        if settings.max_rows is not None and row >= settings.max_rows:
            return
        if document.status is not DocumentStatus.OK:
            yield _without_rows(document)
            continue
        row_start, stored = row, 0
        for start, n_context, ids in _windows(document.ids, settings):
            room = len(ids) - n_context
            if settings.max_rows is not None:
                room = min(room, settings.max_rows - row)
            n_special = (settings.bos_id is not None and n_context == len(settings.prefix)) + (
                settings.closing_id is not None
            )
            if room <= n_special:
                break
            sequence = Sequence(
                sequence=n_sequences,
                document=document.index,
                start=start,
                n_context=n_context,
                first_row=row,
                ids=_cut(ids, n_context + room, settings),
            )
            yield sequence
            n_sequences, row = n_sequences + 1, sequence.row_stop
            stored += room - n_special
        if stored == 0:
            return
        yield _with_rows(document, stored, row_start, row)


def _cut(ids: TokenIds, length: int, settings: Packing) -> TokenIds:
    """Return a model input of at most this length, which ends as all do."""
    closing = one_or_none(settings.closing_id)
    return ids if len(ids) <= length else np.concatenate([ids[: length - len(closing)], closing])


def _windows(ids: TokenIds, settings: Packing) -> Iterator[tuple[int, int, TokenIds]]:
    """Yield (start of the new tokens in the document, tokens of context, ids of the whole input)."""
    before, closing = settings.first_ids, one_or_none(settings.closing_id)
    room, n_prefix = settings.room, len(settings.prefix)
    yield 0, n_prefix, np.concatenate([before, ids[:room], closing])
    if settings.stride is None:
        return
    stored = min(room, len(ids))
    first = 0
    while stored < len(ids):
        first += settings.stride
        stop = min(first + room, len(ids))
        if stop > stored:
            yield stored, len(before) + stored - first, np.concatenate([before, ids[first:stop], closing])
            stored = stop


def then_the_prefix(
    records: Iterable[DocumentRow | Sequence], prefix: tuple[int, ...]
) -> Iterator[DocumentRow | Sequence]:
    """Yield everything, and at the end the prefix as a document of its own, so that it has rows once."""
    n_documents = n_sequences = n_rows = 0
    for record in records:
        if isinstance(record, DocumentRow):
            n_documents += 1
        else:
            n_sequences, n_rows = n_sequences + 1, record.row_stop
        yield record
    ids = np.array(prefix, np.int32)
    yield Sequence(sequence=n_sequences, document=n_documents, start=0, n_context=0, first_row=n_rows, ids=ids)
    row_stop = n_rows + len(prefix)
    yield DocumentRow(n_documents, PREFIX_ID, DocumentStatus.OK, len(prefix), 0, n_rows, row_stop)


def _without_rows(document: TokenizedDocument) -> DocumentRow:
    return DocumentRow(document.index, document.id, document.status, 0, 0, None, None, document.columns)


def _with_rows(document: TokenizedDocument, n_tokens: int, row_start: int | None, row_stop: int | None) -> DocumentRow:
    return DocumentRow(
        document=document.index,
        id=document.id,
        status=document.status,
        n_tokens=n_tokens,
        n_truncated=len(document.ids) - n_tokens,
        row_start=row_start,
        row_stop=row_stop,
        columns=document.columns,
    )

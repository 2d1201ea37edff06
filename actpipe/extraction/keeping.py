"""Choose the tokens that a store keeps, before any is run."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from actpipe.compute.choosing import is_drawn
from actpipe.errors import DatasetError, RecipeError
from actpipe.records import Sequence
from actpipe.schemas.choosing import KeepConfig
from actpipe.schemas.manifest import KeptRowsManifest
from actpipe.stores.documents import RowDocuments
from actpipe.stores.kept_rows import Numbers, read_kept_rows, write_kept_rows
from actpipe.stores.layout import RunFolder
from actpipe.stores.token_table import TokenTable
from actpipe.text.decoding import token_spans

Mask = npt.NDArray[np.bool_]
Condition = Callable[[Sequence], Mask]
"""Says of each token that a sequence stores whether it is wanted."""
Spans = Iterable[tuple[int, int]]
"""Characters `[start, stop)`."""


def settle_rows(
    folder: RunFolder, tokens: TokenTable, keep: KeepConfig, special: Mapping[str, frozenset[int]]
) -> KeptRowsManifest:
    """Return the record of the rows to keep: the one that is there, else after choosing them and writing them down.

    Args:
        folder: Where they are written down: that of the store.
        tokens: The token table.
        keep: The conditions.
        special: The ids that `bos`, `eos`, `pad` and `special` mean.

    Raises:
        RecipeError: No token is left.
        DatasetError: A column is not there, or holds something else.
    """
    settings = keep.model_dump(mode="json")
    found = read_kept_rows(folder)
    if found is not None and (found.keep, found.tokens) == (settings, tokens.manifest.checksums):
        return found
    made = write_kept_rows(
        folder, _chosen(tokens, _conditions(keep, tokens, special)), keep=settings, tokens=tokens.manifest.checksums
    )
    if made.n_rows == 0:
        raise RecipeError(f"keep: none of the {tokens.manifest.n_rows:,} tokens meets every condition; loosen them")
    return made


def most_rows(keep: KeepConfig, n_rows: int) -> int:
    """Return about how many of `n_rows` tokens are kept at most, before they are chosen."""
    return max(1, round(n_rows * (keep.fraction or 1.0) / (keep.every or 1)))


def _chosen(tokens: TokenTable, conditions: list[Condition]) -> Iterator[tuple[Numbers, Numbers]]:
    for sequence in tokens.read_sequences():
        wanted = np.ones(sequence.n_tokens, np.bool_)
        for condition in conditions:
            wanted &= condition(sequence)
        rows = np.flatnonzero(wanted) + sequence.first_row
        if len(rows):
            yield rows, np.full(len(rows), sequence.sequence, np.int64)


def _conditions(keep: KeepConfig, tokens: TokenTable, special: Mapping[str, frozenset[int]]) -> list[Condition]:
    conditions: list[Condition] = []
    if keep.positions is not None:
        conditions.append(_at_positions(np.array(keep.positions)))
    if (every := keep.every) is not None:
        conditions.append(lambda sequence: _rows(sequence) % every == 0)
    conditions += [_without(one, special, tokens.manifest.bos_id) for one in keep.exclude]
    if keep.fraction is not None or keep.where:
        conditions.append(_of_documents(keep, RowDocuments(tokens)))
    if (match := keep.match) is not None:
        pattern = re.compile(match)
        conditions.append(_RowRuns(_rows_with(tokens, lambda _, text: (m.span() for m in pattern.finditer(text)))))
    if keep.spans is not None:
        labelled = _labelled_spans(keep.spans, RowDocuments(tokens))
        conditions.append(_RowRuns(_rows_with(tokens, lambda document, _: labelled(document))))
    return conditions


def _rows(sequence: Sequence) -> Numbers:
    return np.arange(sequence.first_row, sequence.row_stop)


def _stored_positions(sequence: Sequence) -> Numbers:
    return np.arange(sequence.n_context, len(sequence.ids))


def _at_positions(positions: Numbers) -> Condition:
    def condition(sequence: Sequence) -> Mask:
        return np.isin(_stored_positions(sequence), np.where(positions < 0, positions + len(sequence.ids), positions))

    return condition


def _without(unwanted: str | int, special: Mapping[str, frozenset[int]], bos_id: int | None) -> Condition:
    """Want all other tokens. BOS is what stands first: in some models the separator has the same id."""
    ids = np.array([unwanted] if isinstance(unwanted, int) else sorted(special[unwanted]))

    def condition(sequence: Sequence) -> Mask:
        own = sequence.ids[sequence.n_context :]
        found = np.isin(own, ids)
        first = _stored_positions(sequence) == 0
        if unwanted == "bos":
            return ~(found & first)
        if unwanted == "eos":
            return ~(found & ~(first & (own == (-1 if bos_id is None else bos_id))))
        return ~found

    return condition


def _of_documents(keep: KeepConfig, documents: RowDocuments) -> Condition:
    """Want the tokens of documents that are drawn and have the wanted values."""
    chosen = np.ones(len(documents), np.bool_)
    if (fraction := keep.fraction) is not None:
        ids = chain.from_iterable(chunk.to_pylist() for chunk in documents.column("id").chunks)
        drawn = (is_drawn(f"keep {keep.seed}:{document}", fraction) for document in ids)
        chosen &= np.fromiter(drawn, np.bool_, len(documents))
    for name, value in keep.where.items():
        column = documents.column(name)
        values = list(value) if isinstance(value, tuple) else [value]
        try:
            wanted = pa.array(values, column.type)
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise DatasetError(f"keep.where: the column {name!r} holds {column.type}, got {values}") from error
        chosen &= pc.is_in(column, value_set=wanted).to_numpy()
    return lambda sequence: chosen[documents.of_rows(_rows(sequence))]


class _RowRuns:
    """Wants the rows of some runs, which come in the order of the rows, as the sequences do."""

    def __init__(self, runs: Iterator[tuple[int, int]]) -> None:
        self._runs = runs
        self._waiting = next(runs, None)

    def __call__(self, sequence: Sequence) -> Mask:
        wanted = np.zeros(sequence.n_tokens, np.bool_)
        while self._waiting is not None and self._waiting[0] < sequence.row_stop:
            start, stop = self._waiting
            wanted[max(0, start - sequence.first_row) : max(0, stop - sequence.first_row)] = True
            if stop > sequence.row_stop:
                break
            self._waiting = next(self._runs, None)
        return wanted


def _rows_with(tokens: TokenTable, spans_of: Callable[[int, str], Spans]) -> Iterator[tuple[int, int]]:
    """Yield runs of the rows whose tokens hold a character of a document's spans."""
    for document, rows, ids in _document_tokens(tokens):
        text, starts, stops = token_spans(tokens.folder.tokenizer, ids.tolist())
        inside = np.zeros(len(text) + 1, np.int64)
        for start, stop in spans_of(document, text):
            inside[start:stop] = 1
        before = np.concatenate([[0], np.cumsum(inside)])
        wanted = rows[before[stops] > before[starts]]
        if len(wanted):
            edges = np.flatnonzero(np.diff(wanted) != 1) + 1
            for run in np.split(wanted, edges):
                yield int(run[0]), int(run[-1]) + 1


def _document_tokens(tokens: TokenTable) -> Iterator[tuple[int, Numbers, npt.NDArray[np.int32]]]:
    """Yield, for each document with rows, its number among those, and rows and ids of its own tokens."""
    table = tokens.read_documents(["row_start", "row_stop", "n_tokens"])
    bounds = table.filter(pc.is_valid(table["row_start"])).to_pydict()
    sequences, read = tokens.read_sequences(), 0
    rows, ids = np.empty(0, np.int64), np.empty(0, np.int32)
    for document, (start, stop, n_tokens) in enumerate(zip(*bounds.values(), strict=True)):
        pieces = [(rows, ids)]
        while read < stop:
            sequence = next(sequences)
            skipped = int(tokens.manifest.bos_id is not None and sequence.n_context == 0)
            pieces.append((_rows(sequence)[skipped:], sequence.ids[sequence.n_context + skipped :]))
            read = sequence.row_stop
        rows, ids = np.concatenate([piece[0] for piece in pieces]), np.concatenate([piece[1] for piece in pieces])
        first, last = np.searchsorted(rows, [start, stop]).tolist()
        yield document, rows[first:last][:n_tokens], ids[first:last][:n_tokens]
        rows, ids = rows[last:], ids[last:]


def _labelled_spans(column: str, documents: RowDocuments) -> Callable[[int], Spans]:
    """Return a function from the number of a document to the spans that its column lists."""
    values = documents.column(column)

    def spans(document: int) -> Spans:
        value = values[document].as_py()
        try:
            found = json.loads(value) if isinstance(value, str) else value or ()
            return [(int(start), int(stop)) for start, stop in found]
        except (ValueError, TypeError) as error:
            raise DatasetError(
                f"keep.spans: the column {column!r} of document {document} holds {value!r}, which is no JSON list "
                "[[start, stop], ...]"
            ) from error

    return spans

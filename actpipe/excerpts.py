"""Rows of a store with the text around them, as the model saw it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from actpipe.errors import IncompleteStoreError
from actpipe.stores.reading import ActivationStore
from actpipe.stores.results import labels
from actpipe.text.decoding import decode_ids, token_spans

Numbers = npt.NDArray[np.int64]
_KEPT_AT_ONCE = 65_536


@dataclass(frozen=True)
class Excerpt:
    """One token with what stands around it."""

    row: int
    """Row of the store."""
    position: int
    """Position in the model input."""
    token_id: int
    before: str
    token: str
    after: str
    document: int | None
    """Its document in documents.parquet; None where the corpus keeps no track of documents."""


def read_excerpts(store: ActivationStore, rows: Numbers, *, before: int, after: int) -> dict[int, Excerpt]:
    """Return excerpts by row of the store; the token table is read once, from the first of them to the last.

    Args:
        store: The activations.
        rows: Rows of the store, in any order.
        before: Tokens before each, within its model input.
        after: Tokens after each.
    """
    unique = np.unique(rows)
    if not len(unique):
        return {}
    numbers = _documents_of(store, unique)
    has_text = (store.folder.tokenizer / "tokenizer.json").is_file()
    found = {}
    for place, position, ids in _inputs(store, unique):
        first, row = max(0, position - before), int(unique[place])
        window = ids[first : position + after + 1].tolist()
        texts = _cut(store, window, position - first) if has_text else ("", "", "")
        found[row] = Excerpt(row, position, int(ids[position]), *texts, numbers[place])
    return found


def texts_of_ids(store: ActivationStore, ids: Numbers) -> npt.NDArray[Any]:
    """Return the text of each id alone, in the same shape; empty without a tokenizer."""
    unique, places = np.unique(ids, return_inverse=True)
    there = (store.folder.tokenizer / "tokenizer.json").is_file()
    texts = [decode_ids(store.folder.tokenizer, [token]) if there else "" for token in unique.tolist()]
    found: npt.NDArray[Any] = labels(texts)[places.reshape(ids.shape)]
    return found


def _cut(store: ActivationStore, window: list[int], place: int) -> tuple[str, str, str]:
    text, starts, stops = token_spans(store.folder.tokenizer, window)
    start, stop = int(starts[place]), int(stops[place])
    return text[:start], text[start:stop], text[stop:]


def _documents_of(store: ActivationStore, rows: Numbers) -> list[int | None]:
    try:
        documents = store.documents
    except IncompleteStoreError:
        return [None] * len(rows)
    numbers = documents.column("document").to_numpy()
    return [int(number) for number in numbers[documents.of_rows(rows)]]


def _inputs(store: ActivationStore, rows: Numbers) -> Iterator[tuple[int, int, npt.NDArray[np.int32]]]:
    """Yield, for ascending rows, its place among them, its position in its model input, and that input."""
    places = _table_rows(store, rows)
    at = 0
    for sequence in store.tokens.read_sequences(int(places[0]), int(places[-1]) + 1):
        while at < len(places) and places[at] < sequence.row_stop:
            yield at, int(places[at]) - sequence.first_row + sequence.n_context, sequence.ids
            at += 1


def _table_rows(store: ActivationStore, rows: Numbers) -> Numbers:
    """Return the rows of the token table that ascending rows of the store are."""
    kept = store.kept_rows
    if kept is None:
        return rows
    found = np.empty_like(rows)
    for start in range(0, store.n_rows, _KEPT_AT_ONCE):
        stop = min(store.n_rows, start + _KEPT_AT_ONCE)
        first, last = np.searchsorted(rows, [start, stop])
        if last > first:
            found[first:last] = kept.read(start, stop)[0][rows[first:last] - start]
    return found

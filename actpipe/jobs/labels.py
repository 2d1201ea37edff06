"""Which class each row of a store is of, by a label of its document, and which rows are held out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actpipe.errors import DatasetError, did_you_mean
from actpipe.jobs.blocks import RowBlock
from actpipe.stores.documents import RowDocuments

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ClassLabels:
    """The class of each document that has rows."""

    documents: RowDocuments
    classes: tuple[str, ...]
    number: Numbers
    """Place among the classes, by document; -1 where it is of none."""
    held_out: npt.NDArray[np.bool_]
    """By document."""
    is_pooled: bool = False
    """Whether a document is one sample, in place of each of its rows."""

    def documents_of(self, first: int, last: int, *, held_out: bool) -> Numbers:
        """Return which of the documents `[first, last)` are of a class, have rows, and are on one side."""
        these = slice(first, last)
        n_rows = np.diff(self.documents.row_stops, prepend=0)[these]
        return first + np.flatnonzero((self.number[these] >= 0) & (n_rows > 0) & (self.held_out[these] == held_out))

    def rows_of(self, block: RowBlock, *, held_out: bool) -> tuple[Numbers, Numbers]:
        """Return which rows of a block are of a class and on one side, and their classes."""
        document = self.documents.of_rows(np.arange(block.start, block.stop))
        wanted = np.flatnonzero((self.number[document] >= 0) & (self.held_out[document] == held_out))
        return wanted, self.number[document[wanted]]

    def count_samples(self, *, held_out: bool) -> Numbers:
        """Return how many samples each class has on one side: rows, or documents with rows."""
        n_samples = _samples(self.documents, is_pooled=self.is_pooled)
        these = (self.number >= 0) & (self.held_out == held_out)
        return np.bincount(self.number[these], n_samples[these], minlength=len(self.classes)).astype(np.int64)

    def shuffled(self, seed: int) -> ClassLabels:
        """Return the same classes, dealt out anew among the documents of each side by a hash of their ids."""
        ids = [str(document) for document in self.documents.column("id").to_pylist()]
        number = self.number.copy()
        for side in (False, True):
            these = np.flatnonzero((self.number >= 0) & (self.held_out == side)).tolist()
            dealt = sorted(these, key=lambda document: (_hash(f"{seed}:control:{ids[document]}"), ids[document]))
            number[sorted(these, key=ids.__getitem__)] = self.number[dealt]
        return replace(self, number=number)


def _samples(documents: RowDocuments, *, is_pooled: bool) -> Numbers:
    """Return how many samples each document gives."""
    n_rows: Numbers = np.diff(documents.row_stops, prepend=0)
    return np.minimum(n_rows, 1) if is_pooled else n_rows


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def label_rows(
    documents: RowDocuments,
    column: str,
    *,
    classes: Sequence[object] | None,
    max_classes: int,
    fraction: float,
    seed: int,
    is_pooled: bool = False,
) -> ClassLabels:
    """Return the classes of rows by a column of documents.parquet, some documents held out.

    Args:
        documents: The documents with rows.
        column: The label.
        classes: Which of its values; by default those with the most samples, in their own order.
        max_classes: How many there are then.
        fraction: Share of the documents to hold out, drawn by a hash of their ids.
        seed: Seed of that hash.
        is_pooled: Whether a document is one sample, in place of each of its rows.

    Raises:
        DatasetError: The column is not there or holds no labels, a value does not occur, or a class has no rows on one
            side of the split.
    """
    values = _values(documents, column)
    names = _choose(values, _samples(documents, is_pooled=is_pooled), max_classes) if classes is None else [*classes]
    place = {str(name): number for number, name in enumerate(names)}
    known = {str(value) for value in values if value is not None}
    for name in place:
        if name not in known:
            raise DatasetError(f"no document with tokens has {name!r} in column {column!r}{did_you_mean(name, known)}")
    if len(place) < 2:
        raise DatasetError(f"column {column!r} has {len(place)} values; directions tell at least two apart")
    number = np.array([-1 if value is None else place.get(str(value), -1) for value in values], np.int64)
    labels = ClassLabels(documents, tuple(place), number, documents.held_out(fraction, seed), is_pooled)
    for side, what in ((False, "to fit on"), (True, "to judge on")):
        for name, n_samples in zip(labels.classes, labels.count_samples(held_out=side), strict=True):
            if not n_samples:
                raise DatasetError(
                    f"no document with {name!r} in column {column!r} is left {what}; take other `classes`, fewer "
                    "`max_classes`, or another `validation_fraction` or `split_seed`"
                )
    return labels


def _values(documents: RowDocuments, column: str) -> list[Any]:
    values = documents.column(column)
    kind = values.type
    if not (
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_integer(kind) or kind == pa.bool_()
    ):
        raise DatasetError(f"column {column!r} holds {kind}; classes are texts, integers or truth values")
    found: list[Any] = values.to_pylist()
    return found


def _choose(values: Sequence[Any], n_samples: Numbers, most: int) -> list[Any]:
    """Return the values with the most samples, in their own order."""
    totals: dict[Any, int] = {}
    for value, count in zip(values, n_samples.tolist(), strict=True):
        if value is not None:
            totals[value] = totals.get(value, 0) + count
    chosen = sorted(totals, key=lambda value: (-totals[value], value))[:most]
    return sorted(chosen)

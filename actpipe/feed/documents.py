"""From rows to their documents: which split they are in, and what their labels are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch

from actpipe.errors import DatasetError
from actpipe.feed.permutation import Indices
from actpipe.stores.documents import RowDocuments

Split = Literal["train", "validation"]


def in_split(documents: RowDocuments, split: Split, fraction: float, seed: int) -> npt.NDArray[np.bool_]:
    """Return which of the documents with rows are in a split; see `RowDocuments.held_out`."""
    held_out = documents.held_out(fraction, seed)
    return held_out if split == "validation" else ~held_out


class Labels:
    """One column of documents.parquet as numbers, the same for every store of a feed.

    Texts become class numbers, in the order of `classes`, and -1 where there is none. Numbers and truth values
    keep their type; where some are missing they become float64, with NaN in those places.

    Args:
        name: The column.
        documents: The documents of each store.

    Raises:
        DatasetError: There is no such column, or it holds neither texts nor numbers.
    """

    def __init__(self, name: str, documents: Iterable[RowDocuments]) -> None:
        self._documents = tuple(documents)
        columns = [document.column(name) for document in self._documents]
        self.classes: tuple[str, ...] | None = None
        kind = columns[0].type
        if any(column.type != kind for column in columns):
            raise DatasetError(f"the runs hold {name!r} as {', '.join(str(column.type) for column in columns)}")
        if pa.types.is_string(kind) or pa.types.is_large_string(kind):
            self.classes = tuple(sorted({text for column in columns for text in column.unique().to_pylist()} - {None}))
            columns = [_class_numbers(column, self.classes) for column in columns]
        elif not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
            raise DatasetError(f"column {name!r} holds {kind}; labels are texts, numbers or truth values")
        elif any(column.null_count for column in columns):
            columns = [column.cast(pa.float64()).fill_null(float("nan")) for column in columns]
        self._values = [torch.from_numpy(np.array(column.to_numpy())) for column in columns]

    @property
    def dtype(self) -> torch.dtype:
        """Element type of the labels."""
        return self._values[0].dtype

    def of_rows(self, source: int, rows: Indices) -> torch.Tensor:
        """Return the labels of rows of one store."""
        return self._values[source][torch.from_numpy(self._documents[source].of_rows(rows))]


def join_labels(names: Iterable[str], corpora: Iterable[RowDocuments]) -> dict[str, Labels]:
    """Return labels by the column that they are of, for the corpora of a feed in turn."""
    documents = tuple(corpora)
    labels = {name: Labels(name, documents) for name in names}
    for taken in {"row", "source"} & set(labels):
        raise DatasetError(f"the label {taken!r} has the name of a tensor that every batch holds; rename the column")
    return labels


def class_names(labels: Mapping[str, Labels]) -> dict[str, tuple[str, ...]]:
    """Return, for each label that is a text, the texts that its numbers stand for."""
    return {name: label.classes for name, label in labels.items() if label.classes is not None}


def _class_numbers(column: pa.ChunkedArray, classes: tuple[str, ...]) -> Any:
    return pc.index_in(column, value_set=pa.array(classes, column.type)).cast(pa.int64()).fill_null(-1)

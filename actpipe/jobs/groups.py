"""Which group each row of a block belongs to: by position, token, document, or a document's label."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from actpipe.errors import DatasetError
from actpipe.jobs.blocks import RowBlock
from actpipe.stores.reading import ActivationStore

_POSITION, _IDS = "tokens/position", "tokens/input_ids"
GROUPED_BY = (_POSITION, _IDS)
"""Arrays that groupings read."""

Groups = Callable[[RowBlock], npt.NDArray[np.int64]]
"""Numbers the group of each row of a block."""


def by_position(block: RowBlock) -> npt.NDArray[np.int64]:
    """Group rows by their position in the sequence."""
    return block.read_integers(_POSITION)


def by_token(block: RowBlock) -> npt.NDArray[np.int64]:
    """Group rows by their own token."""
    return block.read_integers(_IDS)


def by_document(store: ActivationStore) -> Groups:
    """Group rows by their document, of those that have rows.

    Raises:
        IncompleteStoreError: The corpus keeps no track of documents.
    """
    documents = store.documents
    return lambda block: documents.of_rows(np.arange(block.start, block.stop))


def by_column(store: ActivationStore, column: str) -> tuple[Groups, list[str]]:
    """Group rows by what a column of documents.parquet says of their document.

    Returns:
        The grouping, and the groups' labels, sorted; documents without a value are the last, `(none)`.

    Raises:
        DatasetError: There is no such column, or its values are lists or structs.
        IncompleteStoreError: The corpus keeps no track of documents.
    """
    documents = store.documents
    values = documents.column(column).to_pylist()
    if any(isinstance(value, list | dict) for value in values[:1000]):
        raise DatasetError(f"the column {column!r} holds lists or structs, which are no labels; choose another")
    known = sorted({str(value) for value in values if value is not None})
    number = {label: index for index, label in enumerate(known)}
    of_document = np.array([len(known) if value is None else number[str(value)] for value in values], np.int64)
    labels = [*known, "(none)"] if None in values else known
    return lambda block: of_document[documents.of_rows(np.arange(block.start, block.stop))], labels

"""Loss and its companions over a whole store."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from actpipe.compute.grouping import GroupSums, RangeSums, sum_by_range
from actpipe.errors import DatasetError
from actpipe.jobs.blocks import Done, RowBlock, even_blocks, map_and_sum, require_arrays
from actpipe.stores.reading import ActivationStore

_POSITION, _IDS = "tokens/position", "tokens/input_ids"
_SPARE_ARRAYS = 6
"""Room for the values in float64, twice, and for what is counted, in arrays of a metric each."""

Groups = Callable[[RowBlock], npt.NDArray[np.int64]]
"""Numbers the group of each row of a block."""


@dataclass(frozen=True)
class MetricSums:
    """Sums by each grouping; they add up."""

    by: Mapping[str, RangeSums]

    def __add__(self, other: MetricSums) -> MetricSums:
        return MetricSums({name: sums + other.by[name] for name, sums in self.by.items()})


def stored_metrics(store: ActivationStore) -> list[str]:
    """Name the metrics that a store holds."""
    return [name.removeprefix("metrics/") for name in store.array_names if name.startswith("metrics/")]


def metrics_by_position(
    store: ActivationStore, metrics: list[str], *, block_bytes: int, done: Done = lambda _: None
) -> GroupSums:
    """Sum each metric by position in the sequence, rows without a value left out."""
    return sum_metrics(store, metrics, {"position": by_position}, block_bytes=block_bytes, done=done)["position"]


def sum_metrics(
    store: ActivationStore,
    metrics: list[str],
    groupings: Mapping[str, Groups],
    *,
    block_bytes: int,
    done: Done = lambda _: None,
) -> dict[str, GroupSums]:
    """Sum each metric by several groupings in one pass, rows without a value left out.

    Returns:
        By grouping, one row per group from 0 on, one column per metric.
    """
    names = [f"metrics/{metric}" for metric in metrics]
    require_arrays(store, names, "summarize_metrics")

    def summed(block: RowBlock) -> MetricSums:
        values = np.stack([block.read(name) for name in names], axis=-1)
        return MetricSums({name: sum_by_range(values, groups(block)) for name, groups in groupings.items()})

    # a row takes the room of `_SPARE_ARRAYS` copies of its metrics beside the tokens
    blocks = even_blocks(store, [*names, _POSITION, _IDS], max(1, block_bytes // _SPARE_ARRAYS))
    found = map_and_sum(summed, blocks, done)
    return {name: sums.over(0, sums.start + len(sums.sums.count)) for name, sums in found.by.items()}


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

"""Loss and its companions over a whole store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from actpipe.compute.grouping import GroupSums, RangeSums, sum_by_range
from actpipe.jobs.blocks import Done, RowBlock, even_blocks, map_and_sum, require_arrays
from actpipe.jobs.groups import GROUPED_BY, Groups, by_position
from actpipe.stores.reading import ActivationStore

_SPARE_ARRAYS = 6
"""Room for the values in float64, twice, and for what is counted, in arrays of a metric each."""


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
    blocks = even_blocks(store, [*names, *GROUPED_BY], max(1, block_bytes // _SPARE_ARRAYS))
    found = map_and_sum(summed, blocks, done)
    return {name: sums.over(0, sums.start + len(sums.sums.count)) for name, sums in found.by.items()}

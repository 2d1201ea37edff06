"""Loss and its companions over a whole store."""

from __future__ import annotations

import numpy as np

from actpipe.compute.grouping import GroupSums, sum_by_group
from actpipe.jobs.blocks import Done, RowBlock, even_blocks, map_and_sum, require_arrays
from actpipe.stores.reading import ActivationStore

_POSITION = "tokens/position"


def stored_metrics(store: ActivationStore) -> list[str]:
    """Name the metrics that a store holds."""
    return [name.removeprefix("metrics/") for name in store.array_names if name.startswith("metrics/")]


def metrics_by_position(
    store: ActivationStore, metrics: list[str], *, block_bytes: int, done: Done = lambda _: None
) -> GroupSums:
    """Sum each metric by position in the sequence, rows without a value left out."""
    names = [f"metrics/{metric}" for metric in metrics]
    require_arrays(store, names, "summarize_metrics")

    def summed(block: RowBlock) -> GroupSums:
        values = np.stack([block.read(name) for name in names], axis=-1)
        return sum_by_group(values, block.read_integers(_POSITION))

    return map_and_sum(summed, even_blocks(store, [*names, *names, _POSITION], block_bytes), done)

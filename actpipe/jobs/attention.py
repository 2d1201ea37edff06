"""Statistics of attention over a whole store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from actpipe.compute.attention import describe_rows
from actpipe.compute.grouping import GroupSums, sum_by_group
from actpipe.jobs.blocks import Done, RowBlock, even_blocks, map_and_sum, require_arrays
from actpipe.jobs.geometry import flat_rows
from actpipe.stores.reading import ActivationStore

_POSITION = "tokens/position"
_ROOM = 6
"""A row takes the room of so many copies in float32: as read, its logarithms, and products of both."""


def describe_store_attention(
    store: ActivationStore,
    names: Sequence[str],
    *,
    by_position: bool,
    block_bytes: int,
    done: Done = lambda _: None,
) -> Mapping[str, GroupSums]:
    """Sum `STATISTICS` of the stored attention patterns, over all rows or by query position, a layer at a time.

    Args:
        store: The activations.
        names: Which patterns.
        by_position: Whether there is a group for each query position.
        block_bytes: Memory of one block, in bytes.
        done: Called with 1 after each block.

    Returns:
        Of each pattern its sums by group, one column per head and statistic, statistics running faster.
    """
    require_arrays(store, names, "describe_attention")

    return {
        name: _describe_one(store, name, by_position=by_position, block_bytes=block_bytes, done=done) for name in names
    }


def _describe_one(store: ActivationStore, name: str, *, by_position: bool, block_bytes: int, done: Done) -> GroupSums:
    shape = store.array(name).manifest.row_shape

    def described(block: RowBlock) -> GroupSums:
        position = block.read_integers(_POSITION)
        attention = flat_rows(block, name).reshape(block.n_rows, *shape)
        statistics = describe_rows(attention, position).reshape(block.n_rows, -1)
        return sum_by_group(statistics, position if by_position else np.zeros_like(position))

    return map_and_sum(described, even_blocks(store, [*[name] * _ROOM, _POSITION], block_bytes), done, fan_in=2)

"""Statistics of attention over a whole store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from actpipe.compute.attention import describe_rows
from actpipe.compute.grouping import GroupSums, sum_by_group
from actpipe.jobs.blocks import Done, RowBlock, even_blocks, map_and_sum, require_arrays
from actpipe.jobs.geometry import flat_rows
from actpipe.jobs.sequences import KeyedSums
from actpipe.stores.reading import ActivationStore

_POSITION = "tokens/position"
_ROOM = 6
"""A row of one layer takes the room of so many copies in float32: as read, its logarithms, and products of both."""


def describe_store_attention(
    store: ActivationStore,
    names: Sequence[str],
    *,
    by_position: bool,
    block_bytes: int,
    done: Done = lambda _: None,
) -> Mapping[str, GroupSums]:
    """Sum `STATISTICS` of the stored attention patterns, over all rows or by query position.

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

    arrays = {name: store.array(name) for name in (*names, _POSITION)}

    def described(block: RowBlock) -> KeyedSums[str, GroupSums]:
        position = block.read_integers(_POSITION)
        group = position if by_position else np.zeros_like(position)

        def summed(name: str) -> GroupSums:
            attention = flat_rows(block, name).reshape(block.n_rows, *arrays[name].manifest.row_shape)
            return sum_by_group(describe_rows(attention, position).reshape(block.n_rows, -1), group)

        return KeyedSums({name: summed(name) for name in names})

    widest = max(names, key=lambda name: int(np.prod(arrays[name].manifest.row_shape)))
    blocks = even_blocks(store, [widest] * _ROOM, block_bytes)
    return map_and_sum(described, [replace(block, arrays=arrays) for block in blocks], done).by

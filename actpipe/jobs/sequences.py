"""Run a function over the model inputs of a store, one whole at a time, and add the answers up."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from actpipe.jobs.blocks import Done, RowBlock, Summable, map_and_sum
from actpipe.records import Sequence as ModelInput
from actpipe.stores.reading import ActivationStore

KeyT = TypeVar("KeyT", bound=Hashable)
SumT = TypeVar("SumT", bound=Summable)
_ROOM = 4
"""The widest row of a model input takes the room of so many copies in float32."""


@dataclass(frozen=True)
class KeyedSums(Generic[KeyT, SumT]):
    """Sums by key; they add up, and one that lacks a key adds nothing to it."""

    by: Mapping[KeyT, SumT]

    def __add__(self, other: KeyedSums[KeyT, SumT]) -> KeyedSums[KeyT, SumT]:
        both = dict(self.by)
        for key, theirs in other.by.items():
            both[key] = both[key] + theirs if key in both else theirs
        return KeyedSums(both)


def sum_over_sequences(
    store: ActivationStore,
    names: Sequence[str],
    function: Callable[[ModelInput, RowBlock], Mapping[KeyT, SumT]],
    *,
    block_bytes: int,
    done: Done = lambda _: None,
) -> Mapping[KeyT, SumT]:
    """Apply a function to every model input of more than one token, in blocks of whole ones.

    Args:
        store: Activations of every token.
        names: The arrays that the function reads.
        function: From a model input, and the block of its rows, to sums by key.
        block_bytes: Memory of one block, in bytes.
        done: Called with 1 after each block.

    Returns:
        The sums; empty where every model input is of one token.
    """
    arrays = {name: store.array(name) for name in names}
    row_bytes = 4 * _ROOM * max(int(np.prod(array.manifest.row_shape)) for array in arrays.values())

    def summed(rows: tuple[int, int]) -> KeyedSums[KeyT, SumT]:
        total: KeyedSums[KeyT, SumT] = KeyedSums({})
        for sequence in store.tokens.read_sequences(*rows):
            if len(sequence.ids) > 1:
                total = total + KeyedSums(function(sequence, RowBlock(sequence.first_row, sequence.row_stop, arrays)))
        return total

    return map_and_sum(summed, store.tokens.sequence_blocks(max(1, block_bytes // row_bytes)), done).by

"""Statistics of rows of a store: accumulators fed block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from actpipe.compute.accumulators import Accumulator, Arrays, RowTokens, State
from actpipe.jobs.blocks import FAN_IN, Done, RowBlock, map_and_sum

TOKEN = "tokens/input_ids"
"""What blocks must hold beside what is read from them."""


@dataclass(frozen=True)
class _States:
    by: Mapping[str, State]
    accumulators: Mapping[str, Accumulator]

    def __add__(self, other: _States) -> _States:
        merged = {name: one.merge(self.by[name], other.by[name]) for name, one in self.accumulators.items()}
        return _States(merged, self.accumulators)


def accumulate(
    blocks: Iterable[RowBlock],
    read: Callable[[RowBlock], npt.NDArray[np.float32]],
    accumulators: Mapping[str, Accumulator],
    done: Done = lambda _: None,
    *,
    fan_in: int = FAN_IN,
) -> dict[str, Arrays]:
    """Return statistics of the rows of all blocks.

    Args:
        blocks: Of a store, with `TOKEN`.
        read: From a block to its rows `(row, channel)`.
        accumulators: What to know, by a name of its own; none that looks at positions.
        done: Called with 1 after each block.
        fan_in: As for `map_and_sum`.

    Returns:
        What each accumulator gives, by its name.
    """

    def summed(block: RowBlock) -> _States:
        rows = torch.from_numpy(np.require(read(block), requirements=["W"]))  # torch takes no memory that is read-only
        row = torch.arange(block.start, block.stop)
        tokens = RowTokens(row=row, position=row, token=torch.from_numpy(block.read_integers(TOKEN)))
        return _States({name: one.of(rows, tokens) for name, one in accumulators.items()}, accumulators)

    total = map_and_sum(summed, blocks, done, fan_in=fan_in)
    return {name: one.finish(total.by[name]) for name, one in accumulators.items()}

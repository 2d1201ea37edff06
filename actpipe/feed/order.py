"""The order of an epoch, and how its batches are dealt out to ranks and workers. Arithmetic only."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from actpipe.feed.permutation import Indices, Permutation

Shuffle = Literal["rows", "blocks"] | None
_ROWS, _BLOCKS, _SHIFT = range(3)


@dataclass(frozen=True)
class Order:
    """Which index stands at which place of an epoch, before blocks are mixed with one another.

    `rows`: a random permutation. `blocks`: runs of `block_rows` indices that follow one another, in random
    order; the runs begin elsewhere in each epoch, and the indices that fill no whole run come last. None: in order.
    """

    shuffle: Shuffle
    n_rows: int
    block_rows: int
    seed: int
    epoch: int

    def __call__(self, places: Indices) -> Indices:
        """Return the indices at these places."""
        if self.shuffle is None:
            return places
        if self.shuffle == "rows":
            return self._of_rows(places)
        block, offset = np.divmod(places, self.block_rows)
        return (self._block(block) * self.block_rows + offset + self._shift) % self.n_rows

    @cached_property
    def _of_rows(self) -> Permutation:
        return Permutation(self.n_rows, self.seed, self.epoch, _ROWS)

    @cached_property
    def _of_blocks(self) -> Permutation:
        return Permutation(self.n_rows // self.block_rows, self.seed, self.epoch, _BLOCKS)

    @cached_property
    def _shift(self) -> int:
        return int(np.random.default_rng((self.seed, self.epoch, _SHIFT)).integers(self.n_rows))

    def _block(self, numbers: Indices) -> Indices:
        """Return which blocks come at these numbers; the last, which is not whole, stays where it is."""
        first = int(numbers.min(initial=self.n_rows))
        close = int(numbers.max(initial=-1)) - first < len(numbers)
        blocks = np.arange(first, int(numbers.max(initial=-1)) + 1) if close else numbers.copy()
        whole = np.flatnonzero(blocks < self.n_rows // self.block_rows)
        blocks[whole] = self._of_blocks(blocks[whole])
        return blocks[numbers - first] if close else blocks


@dataclass(frozen=True)
class Group:
    """Batches that are read together: the rows at places `[start, stop)`."""

    first_batch: int
    n_batches: int
    start: int
    stop: int

    @property
    def n_rows(self) -> int:
        """Rows of the group."""
        return self.stop - self.start


@dataclass(frozen=True)
class Stretch:
    """What is read at once: the rows at places `[start, stop)`, or those of them that are `chosen`.

    A reader gives the rows of a range of places in an order of its own; `chosen` are numbers in that order, and ascend.
    """

    start: int
    stop: int
    chosen: Indices | None = None

    @property
    def n_rows(self) -> int:
        """Rows that are read."""
        return self.stop - self.start if self.chosen is None else len(self.chosen)


@dataclass(frozen=True)
class Deal:
    """Deals the batches of an epoch out in groups, to streams: one per worker of each rank.

    Batch `b` is places `[b * batch_size, (b + 1) * batch_size)` of the order, the last one shorter. All groups
    have at most `group_batches` batches and differ by one at most. Group `g` goes to stream `g % n_streams`,
    and stream `worker * world_size + rank` belongs to that worker of that rank.

    With `drop_last`, the short batch and the last few batches that would give some ranks one more than others
    are left out; otherwise every row is in exactly one batch of one stream.
    """

    n_rows: int
    batch_size: int
    group_batches: int
    world_size: int
    n_workers: int
    drop_last: bool

    @property
    def n_batches(self) -> int:
        """Batches of all ranks together."""
        if self.drop_last:
            return self.n_rows // self.batch_size // self.world_size * self.world_size
        return math.ceil(self.n_rows / self.batch_size)

    @property
    def n_streams(self) -> int:
        """Workers of all ranks together."""
        return self.world_size * self.n_workers

    def batches_of(self, rank: int) -> int:
        """Return how many batches a rank gets."""
        return self.n_batches // self.world_size + (rank < self.n_batches % self.world_size)

    def groups(self, rank: int, worker: int) -> Iterator[Group]:
        """Yield the groups of one stream in order."""
        n_groups = math.ceil(self.n_batches / (self.n_streams * self.group_batches)) * self.n_streams
        for number in range(worker * self.world_size + rank, n_groups, self.n_streams):
            base, more = divmod(self.n_batches, n_groups)
            first, n_batches = number * base + min(number, more), base + (number < more)
            start, stop = first * self.batch_size, (first + n_batches) * self.batch_size
            if n_batches:
                yield Group(first, n_batches, start, min(stop, self.n_rows))

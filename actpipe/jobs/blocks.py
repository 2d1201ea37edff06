"""Run a function over blocks of rows of a store with Dask, and put the answers together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol, Self, TypeVar

import dask
import numpy as np
import numpy.typing as npt

from actpipe.errors import IncompleteStoreError
from actpipe.stores.arrays import StoredArray
from actpipe.stores.dtypes import as_float32
from actpipe.stores.fetching import Chunk, FetchAhead
from actpipe.stores.reading import ActivationStore

FAN_IN = 16
"""How many answers of blocks are added up at a time."""
_WORTH_A_BLOCK = 16 * 2**20
"""Bytes of a block from which on what Dask adds to it does not count."""


class Computing(Protocol):
    """Where graphs are computed."""

    def counted(
        self, function: Callable[[Any], Any], blocks: list[Any], done: Callable[[int], None]
    ) -> AbstractContextManager[Callable[[Any], Any]]:
        """Give the function for use on these blocks within, telling `done` after each call."""

    def compute(self, graph: Any) -> Any:
        """Return what a graph of delayed calls gives."""


class ByThreads:
    """Compute by Dask's threads in this process, or as Dask is configured."""

    @contextmanager
    def counted(
        self, function: Callable[[Any], Any], blocks: list[Any], done: Callable[[int], None]
    ) -> Iterator[Callable[[Any], Any]]:
        """Give the function for use on these blocks within; chunks of object stores are fetched ahead of it."""
        coming = FetchAhead(blocks, _chunks)

        def counted(block: Any) -> Any:
            next(coming)  # Dask begins the blocks in their order
            answer = function(block)
            done(1)
            return answer

        with coming:
            yield counted

    def compute(self, graph: Any) -> Any:
        """Return what a graph of delayed calls gives."""
        return dask.compute(graph)[0]


_COMPUTING: ContextVar[Computing] = ContextVar("computing", default=ByThreads())  # noqa: B039 - it holds nothing


@contextmanager
def computed_by(computing: Computing) -> Iterator[None]:
    """Within, graphs are computed there."""
    before = _COMPUTING.set(computing)
    try:
        yield
    finally:
        _COMPUTING.reset(before)


class Summable(Protocol):
    """Something whose parts add up, in any grouping."""

    def __add__(self, other: Self) -> Any:
        """Return both together."""


BlockT = TypeVar("BlockT")
SumT = TypeVar("SumT", bound=Summable)
Done = Callable[[int], None]


@dataclass(frozen=True)
class RowBlock:
    """Some consecutive rows of a store; reads what it is asked for, when it is asked."""

    start: int
    stop: int
    arrays: dict[str, StoredArray]

    @property
    def n_rows(self) -> int:
        """Rows of the block."""
        return self.stop - self.start

    def chunks(self) -> Iterator[Chunk]:
        """Yield the chunks of an object store that hold the block."""
        for array in self.arrays.values():
            first, last = self.start // array.rows_per_part, (self.stop - 1) // array.rows_per_part
            yield from array.chunks(range(first, last + 1))

    def read(self, name: str) -> npt.NDArray[np.float32]:
        """Return the block's rows of one array, in float32."""
        return as_float32(self.arrays[name].read(self.start, self.stop))

    def read_integers(self, name: str, *, beyond: int = 0) -> npt.NDArray[np.int64]:
        """Return the block's rows of an array of integers, and up to `beyond` rows after them."""
        array = self.arrays[name]
        return array.read(self.start, min(array.n_rows, self.stop + beyond)).astype(np.int64)


def require_arrays(store: ActivationStore, names: Iterable[str], what: str) -> None:
    """Refuse an analysis whose input is not stored.

    Raises:
        IncompleteStoreError: Names what is missing.
    """
    store.require_complete()
    missing = [name for name in names if name not in store]
    if missing:
        raise IncompleteStoreError(
            f"{what} needs {', '.join(missing[:4])}{' and more' if len(missing) > 4 else ''}, which "
            f"{store.folder.store} does not hold; add them to `hooks` or `metrics` of extract_activations"
        )


def even_blocks(
    store: ActivationStore, names: Sequence[str], block_bytes: int, *, more_row_bytes: int = 0
) -> list[RowBlock]:
    """Cut a store into blocks whose arrays `names`, in float32, and what else a row takes, fit into `block_bytes`.

    An array that is named twice counts twice: as it is read, and once more for what is made of it.

    Where a part makes a block worth its while, none reaches over a part's end: it is then read without a copy.
    """
    arrays = {name: store.array(name) for name in names}
    values = sum(int(np.prod(arrays[name].manifest.row_shape, dtype=np.int64)) for name in names)
    row_bytes = 4 * values + more_row_bytes
    size = max(1, block_bytes // max(1, row_bytes))
    part = store.manifest.rows_per_part
    span = part if size < part or part * row_bytes >= _WORTH_A_BLOCK else store.n_rows
    return [
        RowBlock(start, min(store.n_rows, first + span, start + size), arrays)
        for first in range(0, store.n_rows, max(1, span))
        for start in range(first, min(store.n_rows, first + span), size)
    ]


def map_and_sum(
    function: Callable[[BlockT], SumT],
    blocks: Iterable[BlockT],
    done: Done = lambda _: None,
    *,
    fan_in: int = FAN_IN,
) -> SumT:
    """Apply a function to every block and add the answers up, some at a time.

    Memory is that of as many blocks as Dask runs together; of a run in an object store, the chunks of the next
    blocks are fetched meanwhile. The grouping depends on the blocks alone, so the same blocks give the same bits
    whatever the number of workers.

    Args:
        function: From a block to something that adds up.
        blocks: Rows to work on.
        done: Called with 1 after each block.
        fan_in: How many are added up at a time; take 2 where an answer is large.
    """
    blocks = list(blocks)
    computing = _COMPUTING.get()
    with computing.counted(function, blocks, done) as counted:
        level = [dask.delayed(counted, pure=False)(block) for block in blocks]
        if not level:
            raise IncompleteStoreError("the store has no rows to analyse")
        add = dask.delayed(_add_all, pure=False)
        while len(level) > 1:
            level = [add(level[i : i + fan_in]) for i in range(0, len(level), fan_in)]
        result: SumT = computing.compute(level[0])
    return result


def _chunks(block: object) -> Iterator[Chunk]:
    """Yield what a block of one store, or one of each of several, reads from object stores."""
    for side in block if isinstance(block, tuple) else (block,):
        if isinstance(side, RowBlock):
            yield from side.chunks()


def _add_all(parts: list[SumT]) -> SumT:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total

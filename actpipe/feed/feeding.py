"""What every feed does: epochs, batches, ranks and workers, resuming, reading ahead."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, closing
from dataclasses import asdict
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import IterableDataset, get_worker_info

from actpipe.compute.casting import cast_rows
from actpipe.errors import DtypeOverflowError, StoreMismatchError
from actpipe.feed.ahead import ReadAhead
from actpipe.feed.normalizing import Normalizer, Statistics, estimate_statistics
from actpipe.feed.order import Deal, Group, Order, Stretch
from actpipe.feed.permutation import Permutation
from actpipe.feed.settings import Delivery, FeedSettings
from actpipe.stores.dtypes import numpy_dtype

Rows = dict[str, torch.Tensor]
"""Tensors by name; row `i` of each is the same token."""
Fill = Callable[[Rows], Iterator[None]]
"""Reads the rows of the next stretch; may be left at each yield."""
_STATE_VERSION = 1
_MIX = 3
_SAMPLE_EPOCH = 2**31
"""Epoch whose order the sample for statistics follows; no training gets there."""
_SAMPLE_BLOCK_ROWS = 64
_SAMPLE_AT_ONCE = 8_192


class RowReader(Protocol):
    """Where the rows of an epoch come from."""

    @property
    def n_rows(self) -> int:
        """Rows of an epoch."""

    @property
    def activation_names(self) -> tuple[str, ...]:
        """Names of the activations that are not integers."""

    @property
    def identity(self) -> dict[str, Any]:
        """What must be equal for the same place of an epoch to hold the same row; JSON values."""

    @property
    def at_random(self) -> bool:
        """Whether rows may be read where they stand, far apart and in many turns: nothing is unpacked or read again."""

    def announce(self, order: Order, stretch: Stretch) -> None:
        """Let the operating system begin to read a stretch of an epoch; only a hint."""

    def allocate(self, n_rows: int, *, pinned: bool) -> Rows:
        """Return tensors for as many rows."""

    def reading(self, order: Order, stretches: Iterable[Stretch]) -> AbstractContextManager[Fill]:
        """Read stretches of an epoch, those that come later ahead of time where that helps."""


class Feed(IterableDataset[Rows]):
    """Batches of rows, one epoch at each iteration; works in torch's `DataLoader` with `batch_size=None`.

    `epoch` is the number of the current epoch; it goes up when an epoch has been iterated to its end. Breaking
    off and iterating again starts the same epoch from its beginning, unless a state was loaded in between.
    """

    def __init__(
        self,
        reader: RowReader,
        settings: FeedSettings,
        delivery: Delivery,
        *,
        statistics: Statistics | None,
        statistics_rows: int,
    ) -> None:
        super().__init__()
        self._reader, self._settings, self._delivery = reader, settings, delivery
        self._normalizer = Normalizer({})
        self._epoch = self._batch = self._resume_at = 0
        self._resume_workers: int | None = None
        self._wait_seconds = self._feed_seconds = 0.0
        self._spare: list[Rows] = []
        """Buffers that no epoch is using; new memory costs as much time as what is read into it."""
        if delivery.normalize is not None:
            self._normalizer = Normalizer(self._estimate(statistics_rows) if statistics is None else statistics)
            _check_statistics(self._normalizer.statistics, reader.activation_names)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the buffers, which each process has for itself."""
        return self.__dict__ | {"_spare": []}

    def __len__(self) -> int:
        """Batches of an epoch on this rank, whatever has been taken of it."""
        return self._deal(n_workers=1).batches_of(self._settings.rank)

    @property
    def n_rows(self) -> int:
        """Rows of an epoch, all ranks together, before `drop_last`."""
        return self._reader.n_rows

    @property
    def epoch(self) -> int:
        """Number of the current epoch, from 0 on."""
        return self._epoch

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch; needed before each one with DataLoader workers, which count for themselves.

        A state that was loaded for this very epoch stays in force.
        """
        if epoch != self._epoch:
            self._epoch, self._batch, self._resume_at, self._resume_workers = epoch, 0, 0, None

    @property
    def statistics(self) -> Statistics:
        """What rows are normalized by; give it to the feed of the other split."""
        return self._normalizer.statistics

    def denormalize(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Undo `normalize` for rows of one array, in float32."""
        return self._normalizer.denormalize(name, rows)

    @property
    def wait_seconds(self) -> float:
        """Time that this process has waited for batches, filling at the start included."""
        return self._wait_seconds

    @property
    def wait_fraction(self) -> float:
        """That time as a share of the time spent iterating; 0 before the first batch."""
        return self._wait_seconds / self._feed_seconds if self._feed_seconds else 0.0

    def __iter__(self) -> Iterator[Rows]:
        """Give the batches of one epoch, or of what a loaded state leaves of it."""
        return self.epochs(1)

    def epochs(self, number: int) -> Iterator[Rows]:
        """Give the batches of several epochs; those of the next are read while the last ones of an epoch go out.

        The first epoch is the current one, or what a loaded state leaves of it; `epoch` goes up with the first batch
        of the next.
        """
        worker, n_workers = _this_worker()
        self._check_place(n_workers)
        self._batch, self._resume_at, self._resume_workers = self._resume_at, 0, None
        numbers = range(self._epoch, self._epoch + number)
        in_thread = self._delivery.device.type == "cpu"
        started, before = time.perf_counter(), (self._wait_seconds, self._feed_seconds)
        with (
            closing(self._batches_of(numbers, self._batch, worker, n_workers)) as batches,
            ReadAhead(
                ((epoch, self._deliver(rows)) for epoch, rows in batches) if in_thread else batches,
                self._delivery.read_ahead if n_workers == 1 else 0,
            ) as items,
        ):
            for epoch, rows in items:
                if epoch != self._epoch:
                    self._epoch, self._batch = epoch, 0
                self._batch += 1
                self._wait_seconds = before[0] + items.wait_seconds
                self._feed_seconds = before[1] + time.perf_counter() - started
                yield rows if in_thread else self._deliver(rows)
        self._feed_seconds = before[1] + time.perf_counter() - started
        self._epoch, self._batch = numbers.stop, 0

    def state_dict(self, *, batch: int | None = None, num_workers: int = 1) -> dict[str, Any]:
        """Return where the feed stands, with what must stay equal for that to mean anything.

        Args:
            batch: Batches of this epoch that this rank has taken. Known without DataLoader workers; with them,
                whoever takes the batches counts them and says so here.
            num_workers: DataLoader workers, where there are any.
        """
        return {
            "version": _STATE_VERSION,
            "epoch": self._epoch,
            "batch": self._batch if batch is None else batch,
            "num_workers": max(1, num_workers),
            "identity": self._identity,
            "normalize": self._delivery.normalize,
            "statistics": self.statistics,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to where a state was taken: the next iteration gives the batches that followed then.

        Raises:
            StoreMismatchError: The feed has other rows or settings than the one that gave the state.
        """
        ours = {"version": _STATE_VERSION, "normalize": self._delivery.normalize, **self._identity}
        theirs = {"version": state["version"], "normalize": state["normalize"], **state["identity"]}
        for name in ours | theirs:
            if ours.get(name) != theirs.get(name):
                raise StoreMismatchError(
                    f"cannot resume: {name} was {theirs.get(name)!r} when the state was taken and is "
                    f"{ours.get(name)!r} now; open the feed as it was then"
                )
        self._epoch, self._resume_at, self._resume_workers = state["epoch"], state["batch"], state["num_workers"]
        self._batch = self._resume_at
        self._normalizer = Normalizer(state["statistics"])

    @property
    def _identity(self) -> dict[str, Any]:
        settings = asdict(self._settings)
        del settings["rank"]
        return settings | self._reader.identity

    def _deal(self, n_workers: int) -> Deal:
        return self._settings.deal(self._reader.n_rows, n_workers)

    def _check_place(self, n_workers: int) -> None:
        if n_workers > 1 and self._delivery.device.type != "cpu":
            raise ValueError(
                f"DataLoader workers cannot put batches on {self._delivery.device}; give the loader device='cpu' and "
                "move batches in the training loop, or leave out num_workers: the loader reads ahead by itself"
            )
        if self._resume_at and self._settings.shuffle == "blocks" and self._resume_workers != n_workers:
            raise StoreMismatchError(
                f"cannot resume: the state was taken with {self._resume_workers} workers, here are {n_workers}, and "
                "shuffle='blocks' deals blocks out to workers; use as many as then"
            )

    def _batches_of(self, epochs: range, taken: int, worker: int, n_workers: int) -> Generator[tuple[int, Rows]]:
        """Yield one worker's batches of several epochs, each with the number of its epoch."""
        for epoch in epochs:
            with closing(self._batches(epoch, taken if epoch == epochs.start else 0, worker, n_workers)) as batches:
                yield from ((epoch, rows) for rows in batches)

    def _batches(self, epoch: int, taken: int, worker: int, n_workers: int) -> Generator[Rows]:
        """Yield one worker's batches of an epoch after the first `taken` of its rank, which workers took in turn."""
        worker = (worker + taken) % n_workers  # whose turn it is comes first
        skip = (taken + n_workers - 1 - worker) // n_workers
        order = self._settings.order(self._reader.n_rows, epoch)
        groups, coming = (_after(self._deal(n_workers).groups(self._settings.rank, worker), skip) for _ in range(2))
        if self._settings.shuffle == "blocks" and not self._reader.at_random:
            with self._reader.reading(order, (Stretch(group.start, group.stop) for group, _ in coming)) as fill:
                yield from self._buffered(order, groups, fill)
            return
        depth = 1 if self._settings.shuffle == "blocks" else 0
        with (
            ReadAhead(self._announced(order, groups), depth) as announced,
            self._reader.reading(order, self._stretches(order, coming)) as fill,
        ):
            for stretch in self._stretches(order, announced):
                yield _filled(self._allocate(stretch.n_rows), fill)

    def _stretches(self, order: Order, groups: Iterator[tuple[Group, int]]) -> Iterator[Stretch]:
        """Yield what each batch holds: the rows of a group, or some that are drawn from those of a group of blocks."""
        size = self._settings.batch_size
        for group, first in groups:
            if order.shuffle != "blocks":
                yield Stretch(group.start, group.stop)
                continue
            mixed = Permutation(group.n_rows, order.seed, order.epoch, _MIX, group.first_batch)
            for number in range(first, group.n_batches):
                drawn = mixed(np.arange(number * size, min((number + 1) * size, group.n_rows)))
                yield Stretch(group.start, group.stop, np.sort(drawn))

    def _announced(self, order: Order, groups: Iterator[tuple[Group, int]]) -> Iterator[tuple[Group, int]]:
        """Yield groups; those of blocks after the system has been asked to read them."""
        for group, first in groups:
            if order.shuffle == "blocks":
                self._reader.announce(order, Stretch(group.start, group.stop))
            yield group, first

    def _buffered(self, order: Order, groups: Iterator[tuple[Group, int]], fill: Fill) -> Iterator[Rows]:
        """Yield batches of rows drawn from a whole group; while one group goes out, a thread reads the next."""

        def read() -> Iterator[tuple[Group, int, Rows]]:
            for group, first in groups:
                rows = self._spare.pop() if self._spare else self._buffer()
                for _ in fill({name: tensor[: group.n_rows] for name, tensor in rows.items()}):
                    if coming.closed:
                        return
                yield group, first, rows

        coming = ReadAhead(read(), 1)
        with coming:
            for group, first, rows in coming:
                for stretch in self._stretches(order, iter([(group, first)])):
                    batch = self._allocate(stretch.n_rows)
                    _pick(rows, stretch, batch)
                    yield batch
                self._spare.append(rows)

    def _buffer(self) -> Rows:
        """Return tensors for the rows of the largest group."""
        most = min(self._deal(n_workers=1).group_batches * self._settings.batch_size, self._reader.n_rows)
        return self._reader.allocate(most, pinned=False)

    def _allocate(self, n_rows: int) -> Rows:
        return self._reader.allocate(n_rows, pinned=self._delivery.device.type == "cuda")

    def _deliver(self, rows: Rows) -> Rows:
        """Move a batch to its device and bring its activations to their size and type."""
        rows = {name: tensor.to(self._delivery.device, non_blocking=True) for name, tensor in rows.items()}
        for name in self._reader.activation_names:
            dtype = self._delivery.dtype or rows[name].dtype
            rows[name], n_lost = cast_rows(self._normalizer.normalize_(name, rows[name]), dtype, clip=False)
            if n_lost:
                raise DtypeOverflowError(f"{n_lost:,} values of {name} in one batch do not fit {dtype}; take another")
        return rows

    def _estimate(self, n_rows: int) -> Statistics:
        """Estimate statistics from blocks of rows, drawn by the seed; the same on every rank."""
        total = self._reader.n_rows
        order = Order("blocks", total, min(_SAMPLE_BLOCK_ROWS, total), self._settings.seed, _SAMPLE_EPOCH)

        stop = min(n_rows, total)
        starts = range(0, stop, _SAMPLE_AT_ONCE)
        stretches = [Stretch(start, min(start + _SAMPLE_AT_ONCE, stop)) for start in starts]
        with self._reader.reading(order, stretches) as fill:
            sample = (_filled(self._reader.allocate(each.n_rows, pinned=False), fill) for each in stretches)
            pieces = ({name: rows[name] for name in self._reader.activation_names} for rows in sample)
            return estimate_statistics(self._delivery.normalize, pieces)


def as_numpy(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """Return the same memory as numpy sees it, bfloat16 too."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(numpy_dtype("bfloat16"))
    array: npt.NDArray[Any] = tensor.numpy()
    return array


def empty_rows(n_rows: int, shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]], *, pinned: bool) -> Rows:
    """Return memory for rows of these shapes; numpy's where it may be, which asks for huge pages: found faster."""
    return {name: _empty((n_rows, *shape), dtype, pinned=pinned) for name, (shape, dtype) in shapes.items()}


def _empty(shape: tuple[int, ...], dtype: torch.dtype, *, pinned: bool) -> torch.Tensor:
    if pinned:
        return torch.empty(shape, dtype=dtype, pin_memory=True)
    return torch.from_numpy(np.empty(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).reshape(shape)


def _filled(rows: Rows, fill: Fill) -> Rows:
    for _ in fill(rows):
        pass
    return rows


def _pick(rows: Rows, stretch: Stretch, into: Rows) -> None:
    assert stretch.chosen is not None, "batches of blocks are drawn from a group"
    for name, tensor in rows.items():
        np.take(as_numpy(tensor), stretch.chosen, axis=0, out=as_numpy(into[name]), mode="clip")


def _after(groups: Iterator[Group], n_batches: int) -> Iterator[tuple[Group, int]]:
    """Yield the groups that hold a batch after the first few, each with its first such batch."""
    for group in groups:
        if n_batches < group.n_batches:
            yield group, n_batches
        n_batches = max(0, n_batches - group.n_batches)


def _this_worker() -> tuple[int, int]:
    """Return the number of this DataLoader worker, and how many there are; outside of one, the only one."""
    info = get_worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)


def _check_statistics(statistics: Statistics, names: tuple[str, ...]) -> None:
    missing = [name for name in names if name not in statistics]
    if missing:
        raise ValueError(f"statistics say nothing of {', '.join(missing)}; take them from a feed of the same hooks")

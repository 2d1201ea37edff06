"""Make items in a thread, a few ahead of who takes them, and measure how long that one waits."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from queue import SimpleQueue
from threading import Semaphore, Thread
from types import TracebackType
from typing import Generic, Self, TypeVar

Item = TypeVar("Item")


class ReadAhead(AbstractContextManager["ReadAhead[Item]"], Iterator[Item], Generic[Item]):
    """Goes through an iterator in a thread of its own; an error comes out in its place.

    Args:
        items: Used in that thread only.
        depth: Most items that are being made or wait to be taken; 0 makes each when it is asked for, without a
            thread.
    """

    def __init__(self, items: Iterator[Item], depth: int) -> None:
        self._items = items
        self._queue: SimpleQueue[tuple[Item | None, BaseException | None]] = SimpleQueue()
        self._room = Semaphore(depth)
        self._thread = Thread(target=self._work, name="actpipe-read-ahead", daemon=True) if depth else None
        self.closed = False
        self.wait_seconds = 0.0

    def __enter__(self) -> Self:
        if self._thread is not None:
            self._thread.start()
        return self

    def __next__(self) -> Item:
        started = time.perf_counter()
        try:
            return next(self._items) if self._thread is None else self._take()
        finally:
            self.wait_seconds += time.perf_counter() - started

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.closed = True
        self._room.release()
        if self._thread is not None:
            self._thread.join()

    def _take(self) -> Item:
        item, error = self._queue.get()
        if error is not None:
            self._queue.put((None, error))  # nothing more comes: who asks again gets it again
            raise error
        self._room.release()
        assert item is not None
        return item

    def _work(self) -> None:
        try:
            while self._room.acquire() and not self.closed:
                self._queue.put((next(self._items), None))
        except BaseException as error:  # noqa: BLE001 - handed to the thread that takes the items; the end, too
            self._queue.put((None, error))

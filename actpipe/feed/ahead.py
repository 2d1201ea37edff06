"""Make items in a thread, a few ahead of who takes them, and measure how long that one waits."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from queue import Full, Queue
from threading import Event, Thread
from types import TracebackType
from typing import Generic, Self, TypeVar

Item = TypeVar("Item")
_POLL_SECONDS = 0.1


class ReadAhead(AbstractContextManager["ReadAhead[Item]"], Iterator[Item], Generic[Item]):
    """Goes through an iterator in a thread of its own, at most `depth` items ahead; an error comes out in its place.

    Args:
        items: Used in that thread only.
        depth: Most items that wait to be taken; 0 makes each when it is asked for, without a thread.
    """

    def __init__(self, items: Iterator[Item], depth: int) -> None:
        self._items = items
        self._queue: Queue[tuple[Item | None, BaseException | None]] = Queue(max(depth, 1))
        self._closed = Event()
        self._thread = Thread(target=self._work, name="actpipe-read-ahead", daemon=True) if depth else None
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
        self._closed.set()
        if self._thread is not None:
            self._thread.join()

    def _take(self) -> Item:
        item, error = self._queue.get()
        if error is not None:
            self._queue.put((None, error))  # nothing more comes: who asks again gets it again
            raise error
        assert item is not None
        return item

    def _work(self) -> None:
        try:
            for item in self._items:
                if not self._put((item, None)):
                    return
            self._put((None, StopIteration()))
        except BaseException as error:  # noqa: BLE001 - handed to the thread that takes the items
            self._put((None, error))

    def _put(self, entry: tuple[Item | None, BaseException | None]) -> bool:
        """Wait for room; return whether anyone still wants items."""
        while not self._closed.is_set():
            try:
                self._queue.put(entry, timeout=_POLL_SECONDS)
            except Full:
                continue
            return True
        return False

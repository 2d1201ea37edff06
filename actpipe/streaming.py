"""Hand values from one thread to the next, in order, a few at a time; the first error wins."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

Item = TypeVar("Item")


def already_done() -> Future[None]:
    """Return a future of what is done."""
    done = Future[None]()
    done.set_result(None)
    return done


class BackgroundWorker(AbstractContextManager["BackgroundWorker[Item]"], Generic[Item]):
    """One thread that applies a function to items, in the order in which they are put.

    `put` waits while the items under way cost more than `budget`, so a slow consumer slows its
    producer down and memory stays bounded. An error in the thread is raised by the next `put`, or
    at the end of the `with` block; an error in the block drops what is still waiting, but for SystemExit,
    which ends the process in order: what was handed over is finished.

    Args:
        function: Called with each item, in the thread.
        budget: Most that the items under way may cost together, in the unit of `put`; one item
            alone may cost more.
    """

    def __init__(self, function: Callable[[Item], None], budget: int) -> None:
        self._function = function
        self._budget = budget
        self._items: deque[tuple[Item, int]] = deque()
        self._cost = 0
        self._closed = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="actpipe-background", daemon=True)
        _WORKERS.add(self)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def put(self, item: Item, cost: int) -> None:
        """Hand over an item; wait while too much is under way."""
        with self._changed:
            self._changed.wait_for(lambda: self._error or self._cost == 0 or self._cost + cost <= self._budget)
            self._raise_error()
            self._items.append((item, cost))
            self._cost += cost
            self._changed.notify_all()

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition holds; it is looked at again after every item that is done."""
        with self._changed:
            self._changed.wait_for(lambda: self._error or condition())
            self._raise_error()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            if error is not None and not isinstance(error, SystemExit):
                self._items.clear()
            self._closed = True
            self._changed.notify_all()
        self._thread.join()
        if error is None or isinstance(error, SystemExit):
            self._raise_error()

    def _work(self) -> None:
        while (entry := self._next()) is not None:
            try:
                self._function(entry[0])
            except BaseException as error:  # noqa: BLE001 - handed to the thread that put the item
                with self._changed:
                    self._error = error
                    self._items.clear()
                    self._changed.notify_all()
                return
            with self._changed:
                self._cost -= entry[1]
                self._changed.notify_all()

    def _next(self) -> tuple[Item, int] | None:
        """Return the next item, or None when there will be none."""
        with self._changed:
            self._changed.wait_for(lambda: self._items or self._closed)
            return self._items.popleft() if self._items else None

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error


_WORKERS: weakref.WeakSet[BackgroundWorker[Any]] = weakref.WeakSet()
"""All of this process."""


def under_way() -> tuple[int, int]:
    """Return how many items wait in this process for a thread of theirs, and what those under way cost together."""
    workers = list(_WORKERS)
    return sum(len(worker._items) for worker in workers), sum(worker._cost for worker in workers)

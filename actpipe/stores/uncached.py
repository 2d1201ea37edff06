"""Reads stretches of files past the page cache, several at a time.

Where a store is larger than memory, keeping what was read only drives out what was read before, and costs the system
more than the reading: a page to find, to fill and to copy for every 4 KiB.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections import deque
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from io import FileIO
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from actpipe.errors import IncompleteStoreError

_THREADS = 8
"""Requests that a disk is given at once; threads, since each waits for its own."""
_ALIGNED = 4096
"""What every disk takes as a multiple of for places, lengths and addresses."""
_BUFFER = 2**21
"""Bytes of a buffer: a huge page, which a disk takes as one stretch of memory."""
_AT_ONCE = 2**20
_UNCACHED = getattr(os, "O_DIRECT", 0)

Run = tuple[FileIO, int, memoryview]
"""A file, the byte where a stretch begins, and where it goes."""


def open_uncached(path: str) -> FileIO:
    """Open a file for `UncachedReader`; through the page cache where the file system has no other way."""
    try:
        return FileIO(path, opener=lambda name, flags: os.open(name, flags | _UNCACHED))
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return FileIO(path)


def cut_short(file: FileIO) -> IncompleteStoreError:
    """Return the error that a file ends too early."""
    return IncompleteStoreError(f"{file.name!s} is cut short; `actpipe verify` says what else is")


class UncachedReader(AbstractContextManager["UncachedReader"]):
    """Reads into memory of any address, from any place: what disks want aligned goes through buffers of its own."""

    def __enter__(self) -> Self:
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="actpipe-read")
        memory = np.empty((_THREADS + 1) * _BUFFER, np.uint8)  # numpy asks for huge pages
        first = -memory.ctypes.data % _BUFFER
        self._buffers = deque(memory[first:][: _THREADS * _BUFFER].reshape(_THREADS, -1))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()

    def read(self, runs: Iterable[Run]) -> None:
        """Read all these stretches, in no order.

        Raises:
            IncompleteStoreError: A file ends before a stretch does.
        """
        waiting = deque(runs)
        done = [self._pool.submit(self._work, waiting) for _ in range(min(_THREADS, len(waiting)))]
        wait(done)
        for future in done:
            future.result()

    def _work(self, waiting: deque[Run]) -> None:
        buffer = self._buffers.pop()
        try:
            while True:
                try:
                    file, offset, into = waiting.popleft()
                except IndexError:  # nothing is left
                    return
                for start in range(0, len(into), _AT_ONCE):
                    _read(file, offset + start, into[start : start + _AT_ONCE], buffer)
        finally:
            self._buffers.append(buffer)


def _read(file: FileIO, offset: int, into: memoryview, buffer: npt.NDArray[np.uint8]) -> None:
    """Read the pages that hold these bytes, and copy the bytes."""
    before = offset % _ALIGNED
    start, stop = offset - before, before + len(into)
    pages = buffer.data
    n_read = 0
    while n_read < stop:
        more = _read_pages(file, start + n_read, pages[n_read : -(-stop // _ALIGNED) * _ALIGNED])
        if n_read + more < stop and (not more or more % _ALIGNED):
            raise cut_short(file)
        n_read += more
    into[:] = pages[before:stop]


def _read_pages(file: FileIO, offset: int, pages: memoryview) -> int:
    try:
        return os.preadv(file.fileno(), [pages], offset)
    except OSError as error:
        flags = fcntl.fcntl(file.fileno(), fcntl.F_GETFL)
        if error.errno != errno.EINVAL or not flags & _UNCACHED:
            raise
        fcntl.fcntl(file.fileno(), fcntl.F_SETFL, flags & ~_UNCACHED)  # a disk that wants more than pages
        return os.preadv(file.fileno(), [pages], offset)

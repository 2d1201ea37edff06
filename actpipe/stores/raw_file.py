"""A chunk file on its way: of its final size from the start, written in any order."""

from __future__ import annotations

import errno
import os
from concurrent.futures import Executor
from pathlib import Path

from actpipe.stores.layout import crc32c_of, extend_crc32c

_PIECE_BYTES = 2**20
_TOGETHER_BYTES = 2**22
"""What is copied and summed up side by side: so little that both find it in the processor's cache."""


class RawFile:
    """A file that takes rows in any order, and sums up its checksum where they come in order.

    Its room is taken at once, so that a full disk shows before the forward passes of the part.
    """

    def __init__(self, path: Path, n_bytes: int) -> None:
        self.path = path
        self._n_bytes = n_bytes
        self._descriptor: int | None = os.open(path, os.O_CREAT | os.O_RDWR | os.O_EXCL, 0o644)
        self._checksum = 0
        self._in_order = 0
        """Bytes from the start that came in order; the checksum is theirs."""
        self._written = 0
        try:
            _take_room(self._descriptor, n_bytes)
        except OSError:
            self.close()
            raise

    def write(self, data: memoryview, position: int, beside: Executor) -> None:
        """Write bytes at a position; a thread sums up the checksum of many while the system copies them."""
        if position != self._in_order:
            self._put(data, position)
            return
        for start in range(0, len(data), _TOGETHER_BYTES):
            self._put_next(data[start : start + _TOGETHER_BYTES], beside)

    def _put_next(self, data: memoryview, beside: Executor) -> None:
        """Write what comes next in order, and take it into the checksum."""
        if len(data) < _PIECE_BYTES:
            self._put(data, self._in_order)
            self._checksum = extend_crc32c(self._checksum, data)
        else:
            checksum = beside.submit(extend_crc32c, self._checksum, data)
            try:
                self._put(data, self._in_order)
            finally:
                self._checksum = checksum.result()
        self._in_order += len(data)

    def _put(self, data: memoryview, position: int) -> None:
        assert self._descriptor is not None
        written = 0
        while written < len(data):
            written += os.pwrite(self._descriptor, data[written:], position + written)
        self._written += written

    def checksum(self) -> str:
        """Return the CRC-32C of the whole file, the part that was never written included: it is zeros."""
        if self._in_order < self._written:
            return crc32c_of(self.path)
        rest, zeros = self._n_bytes - self._in_order, memoryview(bytes(_PIECE_BYTES))
        for start in range(0, rest, len(zeros)):
            self._checksum = extend_crc32c(self._checksum, zeros[: rest - start])
        self._in_order = self._n_bytes
        return f"{self._checksum:08x}"

    def force(self) -> None:
        """Force what was written to the disk."""
        assert self._descriptor is not None
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the file; once is enough."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


def _take_room(descriptor: int, n_bytes: int) -> None:
    """Give a file its size and its place on the disk; its size alone where the system cannot do more."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, n_bytes)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
        else:
            return
    os.ftruncate(descriptor, n_bytes)

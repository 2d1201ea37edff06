"""Two workers at one part: one commits at a time, and the first counts."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from actpipe.stores.layout import RunFolder
from actpipe.stores.remote import remote_of

CLAIMS = "claims"
"""File among those on their way whose bytes are locked, one for each part; it stays empty."""
_ONE_AT_A_TIME = threading.Lock()
"""Locks of the file belong to the process, and go when any of its descriptors is closed."""
_NO_LOCKS = {errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL}


@contextmanager
def alone_at(folder: RunFolder, part: int) -> Iterator[None]:
    """Keep all others from committing this part; a process that dies lets go at once.

    On file systems without locks nothing is kept out: then the last of two commits counts, and both have the
    same bytes where both workers compute alike.
    """
    with _ONE_AT_A_TIME:
        folder.partial.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder.partial / CLAIMS, os.O_CREAT | os.O_RDWR, 0o644)
        try:
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX, 1, part)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
            yield
        finally:
            os.close(descriptor)


def is_committed(record: Path) -> bool:
    """Whether a commit record is there, here or in the object store behind the folder."""
    if record.is_file():
        return True
    remote = remote_of(record.parent)
    return remote is not None and remote.has(record)

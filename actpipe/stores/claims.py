"""Two workers at one part: one commits at a time, and the first counts."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from actpipe.errors import StoreMismatchError
from actpipe.stores.layout import RunFolder
from actpipe.stores.locking import STALE_SECONDS
from actpipe.stores.remote import remote_of

CLAIMS = "claims"
"""File among those on their way whose bytes are locked, one for each part; it stays empty."""
BATCH_SIZE = 2**40
"""Stands for the size of batches, in the place of a part."""
_ONE_AT_A_TIME = threading.Lock()
"""Locks of the file belong to the process, and go when any of its descriptors is closed."""
_WAIT_SECONDS = 0.1
PATIENCE_SECONDS = STALE_SECONDS
"""How long a commit waits for another one of the same part; then that hangs, and this one counts."""
_NO_LOCKS = {errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL}


@contextmanager
def alone_at(folder: RunFolder, part: int) -> Iterator[None]:
    """Keep all others from committing this part.

    A process that dies lets go: on a file system at once, in an object store too where the next one is on the same
    host, else once its claim has not been touched for some time. One that hangs keeps others out for a while only. On
    file systems without locks nothing is kept out: then the last of two commits counts, and both have the same bytes
    where both workers compute alike.
    """
    with _ONE_AT_A_TIME, _claimed(folder.part_commit(part)):
        folder.partial.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder.partial / CLAIMS, os.O_CREAT | os.O_RDWR, 0o644)
        try:
            _lock(descriptor, part)
            yield
        finally:
            os.close(descriptor)


def _lock(descriptor: int, part: int) -> None:
    """Wait for the lock of a part, for as long as its owner may be alive and well; without locks, do not wait."""
    until = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < until:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, part)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            time.sleep(_WAIT_SECONDS)
        else:
            return


@contextmanager
def _claimed(record: Path) -> Iterator[None]:
    """Wait until no one else commits a part in an object store, or the part is committed."""
    remote = remote_of(record.parent)
    until = time.monotonic() + PATIENCE_SECONDS
    with ExitStack() as held:
        while remote is not None and time.monotonic() < until and not remote.has(record):
            try:
                held.enter_context(remote.claim_of(record).held())
            except (StoreMismatchError, FileNotFoundError):  # someone else is at it, or has just been
                time.sleep(_WAIT_SECONDS)
            else:
                break
        yield


def is_committed(record: Path) -> bool:
    """Whether a commit record is there, here or in the object store behind the folder."""
    if record.is_file():
        return True
    remote = remote_of(record.parent)
    return remote is not None and remote.has(record)

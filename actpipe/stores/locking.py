"""One run at a time in a folder: a lock that says whose it is, and that a dead owner cannot keep."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

from actpipe.errors import StoreMismatchError
from actpipe.stores.layout import RunFolder

BEAT_SECONDS = 15.0
"""How often the owner of a lock touches it."""
STALE_SECONDS = 120.0
"""Age of the last touch from which an owner on another host is taken for dead."""
_UNSUPPORTED = {errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL}


@dataclass(frozen=True)
class Owner:
    """Who works in a folder."""

    host: str
    pid: int
    started: str
    """When it took the lock, UTC, to the microsecond."""

    @classmethod
    def this_process(cls) -> Owner:
        """Return this process, from now on."""
        return cls(socket.gethostname(), os.getpid(), datetime.now(UTC).isoformat())

    @classmethod
    def of(cls, path: Path) -> Owner | None:
        """Return whom a lock file names; none where the last owner ended in order."""
        try:
            return cls(**json.loads(path.read_text()))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, at work since {self.started[:19].replace('T', ' ')} UTC"


@contextmanager
def only_run_in(folder: RunFolder) -> Iterator[None]:
    """Keep other runs out of the folder.

    The lock of a process that died on this host is taken over at once, that of a process on another
    host once it has not been touched for `STALE_SECONDS`.

    Raises:
        StoreMismatchError: Another process is at work there; says which.
    """
    folder.root.mkdir(parents=True, exist_ok=True)
    path = folder.root / ".lock"
    with path.open("a+") as file:
        locked = _lock(file)
        other = Owner.of(path)
        if locked is False or (other is not None and _is_alive(other, path, kernel_asked=locked is True)):
            raise StoreMismatchError(
                f"{folder.root} is in use by {other or 'another process'}; wait for it to end, "
                "or choose another folder with --out"
            )
        owner = Owner.this_process()
        _write(file, json.dumps(asdict(owner)) + "\n")
        ended = threading.Event()
        heart = threading.Thread(target=_beat, args=(path, owner, ended), name="actpipe-heartbeat", daemon=True)
        heart.start()
        try:
            yield
        finally:
            ended.set()
            heart.join()
            if Owner.of(path) == owner:
                _write(file, "")


def _lock(file: TextIO) -> bool | None:
    """Ask the kernel for the lock: whether it is ours, or None where the file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return None
        raise
    return True


def _is_alive(owner: Owner, path: Path, *, kernel_asked: bool) -> bool:
    """Whether the owner that a lock file names may still be at work."""
    if owner.host != socket.gethostname():
        return _age_seconds(path) < STALE_SECONDS
    return not kernel_asked and is_running(owner.pid)


def is_running_here(owner: Owner) -> bool | None:
    """Whether an owner on this host is at work; None where it is on another host."""
    return is_running(owner.pid) if owner.host == socket.gethostname() else None


def is_running(pid: int) -> bool:
    """Whether there is a process of this number on this host."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it is there, and someone else's
    return True


def _age_seconds(path: Path) -> float:
    """Return the time since a file was touched, by the clock of the file system that holds it."""
    probe = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
    probe.touch()
    try:
        return probe.stat().st_mtime - path.stat().st_mtime
    finally:
        probe.unlink()


def _write(file: TextIO, text: str) -> None:
    file.truncate(0)
    file.write(text)
    file.flush()


def _beat(path: Path, owner: Owner, ended: threading.Event) -> None:
    """Touch the lock until the run ends; one that another run has taken over is left alone."""
    while not ended.wait(BEAT_SECONDS):
        with suppress(OSError):  # a file system that is away for a moment: the next beat tells
            if Owner.of(path) != owner:
                return
            os.utime(path)

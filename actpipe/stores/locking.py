"""One run at a time in a folder: a lock that says whose it is, and that a dead owner cannot keep."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

from actpipe.errors import RunInUseError
from actpipe.interrupting import INTERRUPTION
from actpipe.stores.layout import RunFolder

BEAT_SECONDS = 15.0
"""How often the owner of a lock touches it."""
STALE_SECONDS = 120.0
"""Age of the last touch from which an owner on another host may be dead."""
WATCH_SECONDS = 3 * BEAT_SECONDS
"""How long a lock that looks old, or touched in the future, is watched for a touch before it is taken over.

A clock that was set makes a living owner look dead, or a dead one alive for years; a touch that is seen does not lie.
"""
_LOOK_SECONDS = 1.0
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


@dataclass(frozen=True)
class LockState:
    """Whose a lock is, and whether its owner still shows signs of life."""

    owner: Owner
    is_alive: bool
    age_seconds: float
    """Time since the owner last touched it, by the clock of the place that holds it."""


@contextmanager
def only_run_in(folder: RunFolder) -> Iterator[Callable[[], bool]]:
    """Keep other runs out of the folder; gives a function that says whether it is still ours.

    The lock of a process that died on this host is taken over at once, that of a process on another
    host once it has not been touched for `STALE_SECONDS`, nor while it was watched.

    Raises:
        RunInUseError: Another process is at work there; says which.
    """
    folder.root.mkdir(parents=True, exist_ok=True)
    path = folder.root / ".lock"
    with path.open("a+") as file:
        locked = _lock(file)
        other = Owner.of(path)
        if locked is False or (other is not None and _is_alive(other, path, kernel_asked=locked is True)):
            raise RunInUseError(
                f"{folder.root} is in use by {other or 'another process'}; wait for it to end, "
                "or choose another folder with --out"
            )
        owner = Owner.this_process()
        _write(file, json.dumps(asdict(owner)) + "\n")

        def is_ours() -> bool:
            return Owner.of(path) == owner

        try:
            with beating(str(folder.root), lambda: Owner.of(path), owner, lambda: os.utime(path)):
                yield is_ours
        finally:
            if is_ours():
                _write(file, "")


@contextmanager
def beating(place: str, current: Callable[[], Owner | None], owner: Owner, touch: Callable[[], None]) -> Iterator[None]:
    """Touch a lock every `BEAT_SECONDS` within; one that another run has taken over is left alone, and ends this run.

    Args:
        place: The run, for people.
        current: Whom the lock names now.
        owner: Whom it should name.
        touch: Shows that the owner lives.
    """
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(BEAT_SECONDS):
            with suppress(OSError):  # the place is away for a moment: the next beat tells
                now = current()
                if now not in (None, owner):
                    INTERRUPTION.end_with(taken_over(place, now))
                    return
                touch()

    heart = threading.Thread(target=beat, name="actpipe-heartbeat", daemon=True)
    heart.start()
    try:
        yield
    finally:
        ended.set()
        heart.join()
        INTERRUPTION.forget_reason()


def taken_over(place: str, by: Owner | None) -> RunInUseError:
    """Return the error of a run that slept so long that another one took its place."""
    return RunInUseError(
        f"{place} was taken over by {by or 'another run'} while this process gave no sign of life; this one ends, and "
        "what it committed stays valid"
    )


def shows_life(age_seconds: float, last_touch: Callable[[], object]) -> bool:
    """Whether the owner of a lock may be alive: touched lately, or touched again while it is watched.

    Args:
        age_seconds: Time since the last touch by the clock of the place that holds the lock; below zero where that
            clock was set back since.
        last_touch: What is different after every touch.
    """
    if 0 <= age_seconds < STALE_SECONDS:
        return True
    before, end = last_touch(), time.monotonic() + WATCH_SECONDS
    while time.monotonic() < end:
        time.sleep(_LOOK_SECONDS)
        if last_touch() != before:
            return True
    return False


def look_at_lock(folder: RunFolder) -> LockState | None:
    """Say whose a run's lock is, without taking it; None where nobody holds it.

    Disturbs no one: what a kernel's lock would say is asked only where a process of that number is silent for long.
    """
    path = folder.root / ".lock"
    owner, touched = Owner.of(path), _touched(path)
    if owner is None or touched is None:
        return None
    running = is_running_here(owner)
    age = _age_seconds(path) if running is None else time.time() - touched / 1e9
    fresh = 0 <= age < STALE_SECONDS
    alive = fresh if running is None else running and (fresh or _is_locked(path))
    return LockState(owner, alive, max(0.0, age))


def _is_locked(path: Path) -> bool:
    """Whether the kernel keeps the lock for someone; true where it cannot say."""
    try:
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    return False


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
        return shows_life(_age_seconds(path), lambda: _touched(path))
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
    """Return the time since a file was touched, by the clock of the file system that holds it.

    Where nothing can be written there, by this machine's.
    """
    probe = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
    try:
        probe.touch()
    except OSError:
        return time.time() - path.stat().st_mtime
    try:
        return probe.stat().st_mtime - path.stat().st_mtime
    finally:
        probe.unlink()


def _touched(path: Path) -> int | None:
    """Return when a file was last touched, in nanoseconds; None where it is gone."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def _write(file: TextIO, text: str) -> None:
    file.truncate(0)
    file.write(text)
    file.flush()

"""One run at a time in an object store: a lock object, made only if it is absent, that a dead owner cannot keep."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from actpipe.errors import RunInUseError, StorageError
from actpipe.stores.locking import (
    STALE_SECONDS,
    LockState,
    Owner,
    beating,
    is_running_here,
    shows_life,
    taken_over,
)

LOCK_NAME = ".lock"


@dataclass(frozen=True)
class RemoteLock:
    """The lock of a run in an object store, as `locking.only_run_in` has one on a file system; or of one part."""

    url: str
    objects: Any
    """The run's place, as obstore opens it."""
    explained: Callable[[], AbstractContextManager[None]]
    """Within, trouble with the object store becomes a StorageError."""
    name: str = LOCK_NAME
    """Of the lock object."""

    @contextmanager
    def held(self) -> Iterator[Callable[[], None]]:
        """Keep others out, on whatever host; gives a function that raises once the lock is no longer ours.

        Raises:
            RunInUseError: Another process is at work there; says which.
        """
        owner = Owner.this_process()

        def require_ours() -> None:
            now = self.owner()
            if now not in (None, owner):
                raise taken_over(self.url, now)

        self._take(owner)
        try:
            with beating(self.url, self.owner, owner, lambda: self._touch(owner)):
                yield require_ours
        finally:
            with suppress(StorageError):
                if self.owner() == owner:
                    self._delete()

    def _take(self, owner: Owner) -> None:
        import obstore

        with self.explained():
            try:
                self._put(owner, mode="create")
            except (obstore.exceptions.AlreadyExistsError, obstore.exceptions.PreconditionError):
                other = self.owner()
                if other == owner:  # the first answer was lost on its way
                    return
                if other is not None and self._is_alive(other):
                    raise RunInUseError(
                        f"{self.url} is in use by {other}; wait for it to end, or choose another place with --out"
                    ) from None
                self._put(owner)
                if self.owner() != owner:
                    raise RunInUseError(f"{self.url} was just taken over by another run") from None

    def look(self) -> LockState | None:
        """Say whose the lock is, without taking it; None where nobody holds it."""
        owner, touched = self.owner(), self._touched()
        if owner is None or touched is None:
            return None
        running = is_running_here(owner)
        age = self._age_seconds() if running is None else (datetime.now(UTC) - touched).total_seconds()
        return LockState(owner, 0 <= age < STALE_SECONDS if running is None else running, max(0.0, age))

    def _is_alive(self, other: Owner) -> bool:
        """Whether a lock's owner may still be at work, by the clock of the object store."""
        running = is_running_here(other)
        return shows_life(self._age_seconds(), self._touched) if running is None else running

    def _touched(self) -> datetime | None:
        """Return when the lock was last written; None where it is gone."""
        import obstore

        with suppress(FileNotFoundError), self.explained():
            touched: datetime = obstore.head(self.objects, self.name)["last_modified"]
            return touched
        return None

    def _age_seconds(self) -> float:
        """Return the time since the lock was written, by the store's clock; by ours where nothing can be put there."""
        import obstore

        touched, probe = self._touched(), f"{self.name}-{uuid.uuid4().hex[:12]}"
        if touched is None:
            return float("inf")
        try:
            with self.explained():
                obstore.put(self.objects, probe, b"")
        except StorageError:
            return (datetime.now(UTC) - touched).total_seconds()
        with self.explained():
            now: datetime = obstore.head(self.objects, probe)["last_modified"]
            obstore.delete(self.objects, probe)
        return (now - touched).total_seconds()

    def owner(self) -> Owner | None:
        """Return whom the lock names; None where there is none."""
        import obstore

        with suppress(FileNotFoundError, ValueError, TypeError), self.explained():
            return Owner(**json.loads(bytes(obstore.get(self.objects, self.name).bytes())))
        return None

    def _put(self, owner: Owner, mode: Literal["create", "overwrite"] = "overwrite") -> None:
        import obstore

        obstore.put(self.objects, self.name, json.dumps(asdict(owner)).encode(), mode=mode)

    def _delete(self) -> None:
        import obstore

        with suppress(FileNotFoundError), self.explained():
            obstore.delete(self.objects, self.name)

    def _touch(self, owner: Owner) -> None:
        with self.explained():
            self._put(owner)

"""One run at a time in an object store: a lock object, made only if it is absent, that a dead owner cannot keep."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any, Literal

from actpipe.errors import StorageError, StoreMismatchError
from actpipe.stores.locking import BEAT_SECONDS, STALE_SECONDS, Owner, is_running_here

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
    def held(self) -> Iterator[None]:
        """Keep others out, on whatever host.

        Raises:
            StoreMismatchError: Another process is at work there; says which.
        """
        owner, ended = Owner.this_process(), threading.Event()
        self._take(owner)
        heart = threading.Thread(target=self._beat, args=(owner, ended), name="actpipe-heartbeat", daemon=True)
        heart.start()
        try:
            yield
        finally:
            ended.set()
            heart.join()
            if self._owner() == owner:
                self._delete()

    def _take(self, owner: Owner) -> None:
        import obstore

        with self.explained():
            try:
                self._put(owner, mode="create")
            except (obstore.exceptions.AlreadyExistsError, obstore.exceptions.PreconditionError):
                held, other = obstore.head(self.objects, self.name), self._owner()
                if other == owner:  # the first answer was lost on its way
                    return
                if other is not None and self._is_alive(other, held):
                    raise StoreMismatchError(
                        f"{self.url} is in use by {other}; wait for it to end, or choose another place with --out"
                    ) from None
                self._put(owner)
                if self._owner() != owner:
                    raise StoreMismatchError(f"{self.url} was just taken over by another run") from None

    def _is_alive(self, other: Owner, held: Any) -> bool:
        """Whether a lock's owner may still be at work, by the clock of the object store."""
        import obstore

        running = is_running_here(other)
        if running is not None:
            return running
        probe = f"{self.name}-{os.getpid()}"
        obstore.put(self.objects, probe, b"")
        now = obstore.head(self.objects, probe)["last_modified"]
        obstore.delete(self.objects, probe)
        return bool((now - held["last_modified"]).total_seconds() < STALE_SECONDS)

    def _owner(self) -> Owner | None:
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

    def _beat(self, owner: Owner, ended: threading.Event) -> None:
        """Write the lock anew until the run ends; one that another run has taken over is left alone."""
        while not ended.wait(BEAT_SECONDS):
            with suppress(StorageError):  # away for a moment: the next beat tells
                if self._owner() != owner:
                    return
                with self.explained():
                    self._put(owner)

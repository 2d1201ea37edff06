"""Look into a run that may be at work, wherever it is, and leave everything as it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from actpipe.errors import StorageRefusedError
from actpipe.stores.layout import RunFolder
from actpipe.stores.locking import LockState, look_at_lock
from actpipe.stores.remote import Remote, as_url


class Place(Protocol):
    """Where a run is; names are relative to it, with `/` between their pieces."""

    @property
    def title(self) -> str:
        """The run folder or its URL."""

    def read(self, name: str) -> bytes | None:
        """Return a file as it is there now; None where there is none."""

    def children(self, folder: str) -> list[str]:
        """Return the names of what is directly in a folder; none where there is no such folder."""

    def look_at_lock(self) -> LockState | None:
        """Say who is at work there."""


@dataclass(frozen=True)
class LocalPlace:
    """A run folder on a file system."""

    root: Path

    @property
    def title(self) -> str:
        """The run folder."""
        return str(self.root)

    def read(self, name: str) -> bytes | None:
        """Return a file as it is now."""
        with _missing_is_nothing():
            return (self.root / name).read_bytes()
        return None

    def children(self, folder: str) -> list[str]:
        """Return the names of what is directly in a folder."""
        with _missing_is_nothing():
            return sorted(path.name for path in (self.root / folder).iterdir())
        return []

    def look_at_lock(self) -> LockState | None:
        """Say who is at work there."""
        return look_at_lock(RunFolder(self.root))


@contextmanager
def _missing_is_nothing() -> Iterator[None]:
    """Let pass what is not there.

    Raises:
        StorageRefusedError: It is there, and may not be read.
    """
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return
    except PermissionError as error:
        raise StorageRefusedError(f"{error.filename} may not be read; ask its owner") from error


@dataclass(frozen=True)
class RemotePlace:
    """A run in an object store; the folder on this machine that stands in front of it is not touched."""

    remote: Remote

    @property
    def title(self) -> str:
        """The URL."""
        return self.remote.url

    def read(self, name: str) -> bytes | None:
        """Return an object as it is now."""
        return self.remote.read(name)

    def children(self, folder: str) -> list[str]:
        """Return the names of what is directly in a folder."""
        return self.remote.children(folder)

    def look_at_lock(self) -> LockState | None:
        """Say who is at work there."""
        return self.remote.lock.look()


def place_of(run: str | Path) -> Place:
    """Return where a run is, by its folder or URL."""
    url = as_url(run)
    return LocalPlace(Path(run)) if url is None else RemotePlace(Remote(Path(), url))

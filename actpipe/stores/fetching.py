"""Chunks of a run in an object store, on this machine: each fetched once, ahead of its use, into a bounded cache."""

from __future__ import annotations

import os
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from stat import S_ISREG
from threading import Lock
from types import TracebackType
from typing import Generic, TypeVar

from actpipe.stores.mapping import forget_maps

CACHE_BYTES = 20 * 10**9
"""Bytes of fetched chunks that stay here, unless `ACTPIPE_CACHE_BYTES` says otherwise."""
CHUNK = re.compile(r"(.*/)?store\.zarr/.+/c/[\d/]+")
"""Paths of chunks below a run folder."""
AT_ONCE = 8
"""Requests that are under way together."""
_WANTED_SHARE = 0.75
"""Share of the bound that chunks to come may take; the rest is for what nobody announced."""
_STEPS_AHEAD = 64
_AHEAD_BYTES = 2 * 2**30
"""Once chunks to come have so many bytes, no further step is looked at."""

Step = TypeVar("Step")
Download = Callable[[Path, Callable[[int], None]], None]
"""Brings a file here whole or not at all, after calling what it is given with the number of its bytes."""


class ChunkCache:
    """The fetched chunks of one run.

    Different chunks are fetched side by side, the same one once for all who ask for it meanwhile. Those fetched
    longest ago make room before a new one comes, so that files and what is on its way keep within the bound;
    chunks that are wanted soon go only where nothing else is left. (One chunk may be larger than the bound.)

    Args:
        folder: The run folder.
        download: Fetches one file into it; raises FileNotFoundError where there is none.
    """

    def __init__(self, folder: Path, download: Download) -> None:
        self._folder, self._download = folder, download
        self._lock = Lock()
        self._coming: dict[Path, Future[bool]] = {}
        self._room_taken: dict[Path, int] = {}
        self._wanted: Counter[Path] = Counter()
        self._wanted_bytes = 0

    def fetch(self, path: Path) -> bool:
        """Bring a chunk here unless it is here; say whether it is.

        Raises:
            StorageError: The object store cannot be reached.
        """
        with self._lock:
            coming, mine = self._coming.get(path), Future[bool]()
            if coming is None:
                if path.is_file():
                    return True
                self._coming[path] = mine
        if coming is not None:
            return coming.result()
        try:
            mine.set_result(self._bring(path))
        except BaseException as error:
            mine.set_exception(error)
            raise
        finally:
            with self._lock:
                del self._coming[path]
                self._room_taken.pop(path, None)
        return mine.result()

    def _bring(self, path: Path) -> bool:
        try:
            self._download(path, lambda n_bytes: self._make_room(path, n_bytes))
        except FileNotFoundError:
            return False
        return True

    def want(self, path: Path, n_bytes: int) -> bool:
        """Keep a chunk of at most so many bytes from being removed until `release`, if there is room for it."""
        with self._lock:
            if not self._wanted[path]:
                if self._wanted_bytes + n_bytes > _WANTED_SHARE * _bound():
                    return False
                self._wanted_bytes += n_bytes
            self._wanted[path] += 1
        return True

    def release(self, path: Path, n_bytes: int) -> None:
        """Take back one `want`."""
        with self._lock:
            self._wanted[path] -= 1
            if not self._wanted[path]:
                del self._wanted[path]
                self._wanted_bytes -= n_bytes

    def keep_to_bound(self) -> None:
        """Remove chunks until all that are here fit within the bound, those that a run has put here too."""
        self._make_room(None, 0)

    def _make_room(self, path: Path | None, n_bytes: int) -> None:
        """Remove chunks until so many bytes fit within the bound, and count them as taken."""
        removed = False
        with self._lock:
            if path is not None:
                self._room_taken[path] = n_bytes
            known = sorted(self._kept())
            excess = sum(size for *_, size, _ in known) + sum(self._room_taken.values()) - _bound()
            for *_, size, file in known:
                if excess <= 0:
                    break
                file.unlink(missing_ok=True)
                excess -= size
                removed = True
        if removed:
            forget_maps()

    def _kept(self) -> Iterator[tuple[bool, int, int, Path]]:
        """Yield every chunk here: whether it is wanted, when it came, its bytes, its path."""
        for file in self._folder.rglob("c/**/*"):
            if self._is_chunk(file):
                with suppress(FileNotFoundError):  # another process makes room, too
                    status = file.stat()
                    if S_ISREG(status.st_mode):
                        yield file in self._wanted, status.st_mtime_ns, status.st_size, file

    def _is_chunk(self, file: Path) -> bool:
        return bool(CHUNK.fullmatch(file.relative_to(self._folder).as_posix()))


def _bound() -> int:
    return int(os.environ.get("ACTPIPE_CACHE_BYTES", CACHE_BYTES))


@dataclass(frozen=True)
class Chunk:
    """A chunk that an object store has."""

    cache: ChunkCache
    path: Path
    n_bytes: int
    """Most bytes that it can have."""


@dataclass
class _Coming(Generic[Step]):
    """A step that is still to come, its chunks that are not asked for yet, and those that are."""

    step: Step
    missing: deque[Chunk]
    kept: list[Chunk] = field(default_factory=list)


class FetchAhead(AbstractContextManager["FetchAhead[Step]"], Iterator[Step], Generic[Step]):
    """Goes through the steps of some work, and meanwhile fetches the chunks of the steps to come, in their order.

    Asking for a step says that the one before has done with its chunks. Whoever reads a chunk that is on its way
    waits for it, and fetches at once one that has not begun to come; so an error of the object store is met by
    who needs the chunk. Several threads may ask in turn. Once it is left, no further fetch begins.

    Args:
        steps: Looked at ahead of their turn, but not beyond one that reads nothing of an object store.
        chunks_of: Which chunks a step reads, in order; none for files of this machine.
    """

    def __init__(self, steps: Iterable[Step], chunks_of: Callable[[Step], Iterable[Chunk]]) -> None:
        self._steps, self._chunks_of = iter(steps), chunks_of
        self._lock = Lock()
        self._coming: deque[_Coming[Step]] = deque()
        self._now: _Coming[Step] | None = None
        self._kept: Counter[Chunk] = Counter()
        self._pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="actpipe-fetch")

    def __next__(self) -> Step:
        with self._lock:
            self._end_step()
            self._look_ahead()
            if not self._coming:
                raise StopIteration
            self._now = self._coming.popleft()
            return self._now.step

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._steps = iter(())
            while self._now is not None or self._coming:
                self._end_step()
                self._now = self._coming.popleft() if self._coming else None

    def _end_step(self) -> None:
        for chunk in self._now.kept if self._now is not None else ():
            self._kept[chunk] -= 1
            if not self._kept[chunk]:
                del self._kept[chunk]
                chunk.cache.release(chunk.path, chunk.n_bytes)
        self._now = None

    def _look_ahead(self) -> None:
        """Begin to fetch what the next steps read, as far as there is room."""
        while all(self._fetch(coming) for coming in self._coming):
            full = sum(chunk.n_bytes for chunk in self._kept) >= _AHEAD_BYTES
            if self._coming and (full or len(self._coming) >= _STEPS_AHEAD or not self._coming[-1].kept):
                return
            step = next(self._steps, _END)
            if isinstance(step, _End):
                return
            self._coming.append(_Coming(step, deque(self._chunks_of(step))))

    def _fetch(self, coming: _Coming[Step]) -> bool:
        """Begin to fetch the chunks of one step; say whether there was room for all of them."""
        while coming.missing:
            chunk = coming.missing[0]
            if not self._kept[chunk]:
                if not chunk.cache.want(chunk.path, chunk.n_bytes):
                    return False
                self._pool.submit(chunk.cache.fetch, chunk.path)
            self._kept[chunk] += 1
            coming.kept.append(coming.missing.popleft())
        return True


class _End:
    """Stands for the step after the last one."""


_END = _End()

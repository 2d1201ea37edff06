"""Run folders in object stores: a folder on this machine stands in front of each.

Everything but chunks is copied here when the run is opened; chunks are fetched when they are first read, into
a cache of bounded size. What a run writes is put there as it is committed: the chunks of a part, then its record.
So all other code works on files, and a commit record in the object store means what it means on a disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from actpipe.errors import StorageError, StorageRefusedError, StoreMismatchError
from actpipe.stores.fetching import AT_ONCE, CHUNK, ChunkCache
from actpipe.stores.layout import user_cache, write_whole
from actpipe.stores.remote_locking import LOCK_NAME, RemoteLock
from actpipe.stores.remote_trouble import trouble_explained

RETRY_SECONDS = 180
"""How long a request is tried again, with growing waits, before the object store counts as out of reach."""
_URL = re.compile(r"(s3|gs|az|abfs|https?):/+(.+)")
_OURS = re.compile(
    r"(corpora/[^/]+/)?(run\.yaml|log\.jsonl|report\.html|(documents|sequences|rows)\.parquet"
    r"|(tokenizer|commits|results|store\.zarr|reductions|continuations)/(?!\.)(.+/)?[^./][^/]*)"
)
"""What a run has beside chunks, and what is copied: no files on their way, and no locks."""
_PIECES = re.compile(r"(corpora/[^/]+/)?(commits|reductions|continuations)/.+")
"""What the workers of a cluster add, each file once."""
_CLAIM = re.compile(r"(corpora/[^/]+/)?commits/\.part-.+")
_MARK = ".remote"
_PIECE_BYTES = 8 * 2**20


def as_url(run: str | Path) -> str | None:
    """Return a run's URL, if it is one; a `Path` has lost one of its slashes."""
    found = _URL.fullmatch(str(run))
    return f"{found[1]}://{found[2].rstrip('/')}" if found else None


def local_folder(run: str | Path) -> Path:
    """Return the folder of a run on this machine; of a URL, after copying there what is new.

    Raises:
        StorageError: The object store cannot be reached.
    """
    url = as_url(run)
    if url is None:
        return Path(run)
    remote = Remote.in_front_of(url)
    remote.pull()
    return remote.folder


def publish_all(folder: Path) -> None:
    """Put into the object store behind a run folder what is new in it, if there is one, for others to see."""
    if (remote := remote_of(folder)) is not None:
        remote.push()


def fetch_pieces(folder: Path) -> None:
    """Bring what workers have put into the object store behind a run folder: commit records, and parts of results."""
    if (remote := remote_of(folder)) is not None:
        remote.bring_pieces()


def fetch_all(folder: Path) -> None:
    """Make all that is no chunk equal to what is in the object store behind a run folder, if there is one."""
    if (remote := remote_of(folder)) is not None:
        remote.pull()


def remote_of(path: Path) -> Remote | None:
    """Return the object store behind a folder or file, if there is one."""
    found = _marked(path)
    return None if found is None else _opened(*found)


@lru_cache(maxsize=4096)
def _marked(path: Path) -> tuple[Path, str] | None:
    for folder in (path, *path.parents):
        if (folder / _MARK).is_file():
            return folder, (folder / _MARK).read_text().strip()
    return None


def _opened(folder: Path, url: str) -> Remote:
    """Return the one object that all threads of this process have of a run."""
    return _OPENED.setdefault((folder, url), Remote(folder, url))


_OPENED: dict[tuple[Path, str], Remote] = {}
os.register_at_fork(after_in_child=_OPENED.clear)
_ASKED_BY: set[int] = set()
"""Processes that have asked object stores; obstore's threads do not live on in a fork, and its requests hang there."""


@dataclass(frozen=True)
class Remote:
    """An object store with one run in it, and the folder in front."""

    folder: Path
    url: str
    chunks: ChunkCache = field(init=False, compare=False, repr=False)
    """The chunks that are here, and how others come."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "chunks", ChunkCache(self.folder, self._download_chunk))

    @classmethod
    def in_front_of(cls, url: str, base: Path | None = None) -> Remote:
        """Return the run at a URL; its folder is in the user's cache, or in `base`, under a name of its own."""
        readable = re.sub(r"[^A-Za-z0-9]+", "-", url)[-60:].strip("-")
        folder = (base or user_cache()) / f"{readable}-{hashlib.sha256(url.encode()).hexdigest()[:12]}"
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / _MARK, f"{url}\n".encode(), force=False)
        _marked.cache_clear()
        return _opened(folder, url)

    @property
    def read_only(self) -> bool:
        """Whether nothing can be written there."""
        return self.url.startswith("http")

    @cached_property
    def _objects(self) -> Any:
        from obstore.store import from_url

        if _ASKED_BY and os.getpid() not in _ASKED_BY:
            raise StorageError(
                f"{self.url} cannot be read in a process that was forked after its parent has asked an object store; "
                "start it anew: `multiprocessing_context='spawn'` in a DataLoader"
            )
        _ASKED_BY.add(os.getpid())
        with self._trouble_explained():
            return from_url(
                self.url,
                client_options={"allow_http": True, "timeout": "60s"},
                retry_config={"max_retries": 10, "retry_timeout": timedelta(seconds=RETRY_SECONDS)},
            )

    def pull(self) -> None:
        """Make everything here that is no chunk equal to what is there."""
        index = self.folder / ".partial" / "remote.json"
        known: dict[str, str] = json.loads(index.read_text()) if index.is_file() else {}
        there = self._metadata_there()
        changed = [path for path, tag in there.items() if known.get(path) != tag or not (self.folder / path).is_file()]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(self._download, changed))
        for path in self._metadata_here():
            if path not in there:
                (self.folder / path).unlink()
        write_whole(index, json.dumps(there).encode(), force=False)

    def push(self) -> None:
        """Make everything there that is no chunk equal to what is here."""
        there, here = self._metadata_there(), sorted(self._metadata_here())
        records = [path for path in here if "commits/" in path]
        for group in ([path for path in here if path not in records], records):
            self.put(*(self.folder / path for path in group))
        for path in there.keys() - set(here):
            self.delete(self.folder / path)

    def bring_pieces(self) -> None:
        """Bring the files of finished parts here that are there and not here."""
        names = [name for name, _ in self._list() if _PIECES.fullmatch(name) and _is_metadata(name)]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(self._download, [name for name in names if not (self.folder / name).is_file()]))

    def put(self, *paths: Path) -> None:
        """Put files there, several at once; all of them are there when it returns."""
        import obstore

        def put(path: Path) -> None:
            with self._trouble_explained():
                obstore.put(self._objects, self._name(path), path)

        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(put, paths))

    def has(self, path: Path) -> bool:
        """Whether a file is there."""
        import obstore

        try:
            with self._trouble_explained():
                obstore.head(self._objects, self._name(path))
        except FileNotFoundError:
            return False
        return True

    def delete(self, path: Path) -> None:
        """Remove a file there; one that is not there is no error."""
        import obstore

        with self._trouble_explained(), suppress(FileNotFoundError):
            obstore.delete(self._objects, self._name(path))

    @contextmanager
    def as_it_is_there(self, path: Path) -> Iterator[None]:
        """Within, a chunk here is what is there now, and afterwards it is gone."""
        path.unlink(missing_ok=True)
        with suppress(FileNotFoundError):
            self._download(self._name(path))
        try:
            yield
        finally:
            path.unlink(missing_ok=True)

    def chunks_there(self) -> Iterator[str]:
        """Yield the paths of all chunks there."""
        if not self.read_only:
            yield from (name for name, _ in self._list() if CHUNK.fullmatch(name))

    @contextmanager
    def only_run(self) -> Iterator[Callable[[], None]]:
        """Keep other runs out, on whatever host; gives a function that raises once another has taken over.

        Raises:
            StoreMismatchError: Another process is at work there, or something else is there.
            StorageError: Nothing can be written there.
        """
        if self.read_only:
            raise StorageRefusedError(f"{self.url} can be read only; give --out a folder, or a URL of s3, gs or az")
        self._refuse_foreign()
        with self.lock.held() as require_ours:
            self._forget_claims()
            yield require_ours
            self._forget_claims()

    @property
    def lock(self) -> RemoteLock:
        """The lock of the run there."""
        return RemoteLock(self.url, self._objects, self._trouble_explained)

    def read(self, name: str) -> bytes | None:
        """Return an object as it is there now, and leave nothing here; None where there is none."""
        import obstore

        with suppress(FileNotFoundError), self._trouble_explained():
            return bytes(obstore.get(self._objects, name).bytes())
        return None

    def children(self, folder: str) -> list[str]:
        """Return the names of what is there directly in a folder."""
        import obstore

        if self.read_only:
            raise StorageRefusedError(f"{self.url} is on a web server, which does not say what it holds; copy it here")
        with self._trouble_explained():
            found = obstore.list_with_delimiter(self._objects, folder or None)
        paths = [*found["common_prefixes"], *(entry["path"] for entry in found["objects"])]
        return sorted(path.rstrip("/").rsplit("/", 1)[-1] for path in paths)

    def claim_of(self, record: Path) -> RemoteLock:
        """Return the lock that whoever commits a record takes, on whatever host."""
        hidden = record.with_name(f".{record.name}")
        return RemoteLock(self.url, self._objects, self._trouble_explained, self._name(hidden))

    def _forget_claims(self) -> None:
        """Remove the claims of workers that are dead, or not needed any more."""
        for name in [name for name, _ in self._list() if _CLAIM.fullmatch(name)]:
            self.delete(self.folder / name)

    def _refuse_foreign(self) -> None:
        """Keep out of places that hold something else."""
        names = {name for name, _ in self._list() if name != LOCK_NAME}
        if names and not any(_OURS.fullmatch(name) for name in names):
            raise StoreMismatchError(
                f"{self.url} holds other files and no run, such as {min(names)}; choose an empty place with --out"
            )

    def _download(self, name: str, make_room: Callable[[int], None] = lambda _: None) -> None:
        """Copy an object here, whole or not at all, after making room for its bytes."""
        import obstore

        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.urandom(6).hex()}")
        try:
            with self._trouble_explained(), temporary.open("wb") as file:
                found = obstore.get(self._objects, name)
                make_room(found.meta["size"])
                for piece in found.stream(min_chunk_size=_PIECE_BYTES):
                    file.write(piece)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def _download_chunk(self, path: Path, make_room: Callable[[int], None]) -> None:
        self._download(self._name(path), make_room)

    def _metadata_there(self) -> dict[str, str]:
        """Return everything there that is no chunk, with what changes when it does."""
        if self.read_only:
            return dict(self._guess())
        return {name: tag for name, tag in self._list() if _is_metadata(name)}

    def _metadata_here(self) -> set[str]:
        names = (self._name(path) for path in self.folder.rglob("*") if path.is_file())
        return {name for name in names if _is_metadata(name)}

    def _list(self) -> Iterator[tuple[str, str]]:
        import obstore

        with self._trouble_explained():
            for page in obstore.list(self._objects, chunk_size=1000):
                for entry in page:
                    yield entry["path"], f"{entry['e_tag']} {entry['size']} {entry['last_modified']}"

    def _guess(self) -> Iterator[tuple[str, str]]:
        """Yield what a finished run of one corpus has, from a server that lists nothing."""
        import obstore

        def there(name: str) -> Iterator[tuple[str, str]]:
            with suppress(FileNotFoundError), self._trouble_explained():
                entry = obstore.head(self._objects, name)
                yield name, f"{entry['e_tag']} {entry['size']} {entry['last_modified']}"

        for name in ("run.yaml", "documents.parquet", "sequences.parquet", "rows.parquet", "tokenizer/tokenizer.json"):
            yield from there(name)
        for name in ("commits/tokens.json", "commits/rows.json", "store.zarr/zarr.json"):
            yield from there(name)
        part = 0
        while found := list(there(f"commits/part-{part:08d}.json")):
            yield from found
            part += 1

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def _trouble_explained(self) -> AbstractContextManager[None]:
        return trouble_explained(self.url)


def _is_metadata(name: str) -> bool:
    return bool(_OURS.fullmatch(name)) and not CHUNK.fullmatch(name) and ".." not in name.split("/")


def publish(paths: Iterable[Path]) -> None:
    """Put files that count into the object store behind them, if there is one; what unfinished stages leave stays."""
    paths = list(paths)
    if paths and (remote := remote_of(paths[0].parent)) is not None:
        remote.put(*(path for path in paths if _OURS.fullmatch(path.relative_to(remote.folder).as_posix())))
        remote.chunks.keep_to_bound()


@contextmanager
def at_work_in(folder: Path) -> Iterator[Callable[[], None]]:
    """Hold the object store behind a run folder, if there is one, and give a function that puts there what is new.

    Raises:
        StoreMismatchError: Another process is at work there.
        StorageError: It cannot be reached, or not be written.
    """
    remote = remote_of(folder)
    if remote is None:
        yield lambda: None
        return
    with remote.only_run() as require_ours:
        remote.pull()

        def save() -> None:
            require_ours()
            remote.push()

        yield save


@contextmanager
def as_kept(path: Path) -> Iterator[None]:
    """Within, a chunk is what is kept for good, not a copy that was fetched before."""
    remote = remote_of(path.parent)
    if remote is None:
        yield
        return
    with remote.as_it_is_there(path):
        yield


def kept_chunks(store: Path) -> set[str]:
    """Return the paths in a store's Zarr group of chunks that an object store behind it has."""
    remote = remote_of(store)
    if remote is None:
        return set()
    place = store.relative_to(remote.folder).as_posix() + "/"
    return {name.removeprefix(place) for name in remote.chunks_there() if name.startswith(place)}

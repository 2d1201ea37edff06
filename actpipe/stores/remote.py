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
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NoReturn

from actpipe.errors import StorageError, StoreMismatchError
from actpipe.stores.layout import write_whole
from actpipe.stores.remote_locking import LOCK_NAME, RemoteLock

CACHE_BYTES = 20 * 10**9
"""Bytes of fetched chunks that stay here, unless `ACTPIPE_CACHE_BYTES` says otherwise."""
RETRY_SECONDS = 180
"""How long a request is tried again, with growing waits, before the object store counts as out of reach."""
_URL = re.compile(r"(s3|gs|az|abfs|https?):/+(.+)")
_CHUNK = re.compile(r"(.*/)?store\.zarr/.+/c/[\d/]+")
_OURS = re.compile(
    r"(corpora/[^/]+/)?(run\.yaml|log\.jsonl|report\.html|(documents|sequences|rows)\.parquet"
    r"|(tokenizer|commits|results|store\.zarr|reductions|continuations)/(?!\.)(.+/)?[^./][^/]*)"
)
"""What a run has beside chunks, and what is copied: no files on their way, and no locks."""
_PIECES = re.compile(r"(corpora/[^/]+/)?(commits|reductions|continuations)/.+")
"""What the workers of a cluster add, each file once."""
_CLAIM = re.compile(r"(corpora/[^/]+/)?commits/\.part-.+")
_MARK = ".remote"
_AT_ONCE = 8
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


@lru_cache(maxsize=64)
def _opened(folder: Path, url: str) -> Remote:
    return Remote(folder, url)


@dataclass(frozen=True)
class Remote:
    """An object store with one run in it, and the folder in front."""

    folder: Path
    url: str
    _fetching: threading.Lock = field(default_factory=threading.Lock, compare=False, repr=False)

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
        with ThreadPoolExecutor(_AT_ONCE) as pool:
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
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            list(pool.map(self._download, [name for name in names if not (self.folder / name).is_file()]))

    def put(self, *paths: Path) -> None:
        """Put files there, several at once; all of them are there when it returns."""
        import obstore

        def put(path: Path) -> None:
            with self._trouble_explained():
                obstore.put(self._objects, self._name(path), path)

        with ThreadPoolExecutor(_AT_ONCE) as pool:
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

    def fetch(self, path: Path) -> bool:
        """Bring a chunk here, if it is there; the chunks fetched longest ago make room for it."""
        with self._fetching:
            if path.is_file():
                return True
            try:
                self._download(self._name(path))
            except FileNotFoundError:
                return False
            self.make_room(keep=path)
            return True

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
            yield from (name for name, _ in self._list() if _CHUNK.fullmatch(name))

    def make_room(self, keep: Path | None = None) -> None:
        """Remove chunks here, the oldest first, until no more than the bound is left."""
        bound = int(os.environ.get("ACTPIPE_CACHE_BYTES", CACHE_BYTES))
        files = [path for path in self.folder.rglob("c/**/*") if path.is_file() and _CHUNK.fullmatch(self._name(path))]
        sizes = sorted((path.stat().st_mtime_ns, path.stat().st_size, path) for path in files)
        total = sum(size for _, size, _ in sizes)
        for _, size, path in sizes:
            if total <= bound:
                break
            if path != keep:
                path.unlink(missing_ok=True)
                total -= size

    @contextmanager
    def only_run(self) -> Iterator[None]:
        """Keep other runs out, on whatever host.

        Raises:
            StoreMismatchError: Another process is at work there, or something else is there.
            StorageError: Nothing can be written there.
        """
        if self.read_only:
            raise StorageError(f"{self.url} can be read only; give --out a folder, or a URL of s3, gs or az")
        self._refuse_foreign()
        with RemoteLock(self.url, self._objects, self._trouble_explained).held():
            self._forget_claims()
            yield
            self._forget_claims()

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

    def _download(self, name: str) -> None:
        """Copy an object here, whole or not at all."""
        import obstore

        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.urandom(6).hex()}")
        try:
            with self._trouble_explained(), temporary.open("wb") as file:
                for piece in obstore.get(self._objects, name).stream(min_chunk_size=_PIECE_BYTES):
                    file.write(piece)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

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

    @contextmanager
    def _trouble_explained(self) -> Iterator[None]:
        """Say in one sentence what trouble with the object store means; what is not there is a FileNotFoundError."""
        try:
            import obstore
        except ImportError as error:
            raise StorageError(f"{self.url} needs `pip install 'actpipe[remote]'`") from error
        try:
            yield
        except (obstore.exceptions.AlreadyExistsError, obstore.exceptions.PreconditionError, FileNotFoundError):
            raise
        except obstore.exceptions.BaseError as error:
            _explain(self.url, error)


def _is_metadata(name: str) -> bool:
    return bool(_OURS.fullmatch(name)) and not _CHUNK.fullmatch(name) and ".." not in name.split("/")


def _explain(url: str, error: Exception) -> NoReturn:
    lines = str(error).strip().splitlines()
    raise StorageError(
        f"{url} is out of reach ({lines[0] if lines else type(error).__name__}); what is committed stays valid, give "
        "the same command again once it is back"
    ) from error


def user_cache() -> Path:
    """Return where folders in front of object stores are: `$ACTPIPE_CACHE`, or in the user's cache."""
    usual = Path(os.environ.get("XDG_CACHE_HOME", "") or Path.home() / ".cache") / "actpipe"
    return Path(os.environ.get("ACTPIPE_CACHE") or usual)


def publish(paths: Iterable[Path]) -> None:
    """Put files that count into the object store behind them, if there is one."""
    paths = list(paths)
    if paths and (remote := remote_of(paths[0].parent)) is not None:
        remote.put(*paths)
        remote.make_room()


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
    with remote.only_run():
        remote.pull()
        yield remote.push


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

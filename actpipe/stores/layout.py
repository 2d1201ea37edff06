"""Where everything is in a run folder, and how files get there whole."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import google_crc32c

from actpipe.errors import StoreMismatchError

MAIN_CORPUS = "main"
_READ_BYTES = 2**24


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run, or of one corpus in it: paths, and nothing is opened."""

    root: Path

    def corpus(self, name: str) -> RunFolder:
        """Return the folder of a corpus: the run folder itself for `main`, `corpora/NAME` for others."""
        return self if name == MAIN_CORPUS else RunFolder(self.root / "corpora" / name)

    @property
    def record(self) -> Path:
        """`run.yaml`, of the run folder only."""
        return self.root / "run.yaml"

    @property
    def documents(self) -> Path:
        """One row per document."""
        return self.root / "documents.parquet"

    @property
    def sequences(self) -> Path:
        """One row per model input."""
        return self.root / "sequences.parquet"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer, so that text can be had from ids for ever."""
        return self.root / "tokenizer"

    @property
    def store(self) -> Path:
        """The Zarr group."""
        return self.root / "store.zarr"

    @property
    def commits(self) -> Path:
        """Commit records."""
        return self.root / "commits"

    @property
    def token_commit(self) -> Path:
        """Commit record of the token table."""
        return self.commits / "tokens.json"

    def part_commit(self, part: int) -> Path:
        """Commit record of one part."""
        return self.commits / f"part-{part:08d}.json"

    @property
    def results(self) -> Path:
        """What the analyses found."""
        return self.root / "results"

    @property
    def partial(self) -> Path:
        """Files on their way; nothing in it counts, and a run clears it."""
        return self.root / ".partial"

    @property
    def log(self) -> Path:
        """One JSON line per event."""
        return self.root / "log.jsonl"

    @property
    def report(self) -> Path:
        """The report."""
        return self.root / "report.html"

    def new_partial(self, what: str) -> Path:
        """Make a folder for files on their way, which no one else has."""
        path = self.partial / f"{what}-{uuid.uuid4().hex[:12]}"
        path.mkdir(parents=True)
        return path


@contextmanager
def only_run_in(folder: RunFolder) -> Iterator[None]:
    """Keep other runs out of the folder, and clear what a killed one left half done.

    Raises:
        StoreMismatchError: Another process is at work there.
    """
    folder.root.mkdir(parents=True, exist_ok=True)
    path = folder.root / ".lock"
    with path.open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            owner = lock.read().strip() or "another process"
            raise StoreMismatchError(
                f"{folder.root} is in use by {owner}; wait for it to end, or choose another folder with --out"
            ) from error
        lock.truncate(0)
        lock.write(f"process {os.getpid()}")
        lock.flush()
        _clear_partial(folder)
        try:
            yield
        finally:
            _clear_partial(folder)


def _clear_partial(folder: RunFolder) -> None:
    for corpus in (folder, *map(RunFolder, folder.root.glob("corpora/*"))):
        shutil.rmtree(corpus.partial, ignore_errors=True)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that it is either there whole or not at all, power loss included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Force a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def crc32c_of(path: Path) -> str:
    """Return the CRC-32C of a file as eight hexadecimal digits, reading 16 MiB at a time."""
    checksum = 0
    with path.open("rb") as file:
        while piece := file.read(_READ_BYTES):
            checksum = google_crc32c.extend(checksum, piece)
    return f"{checksum:08x}"


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

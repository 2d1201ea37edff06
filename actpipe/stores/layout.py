"""Where everything is in a run folder, and how files get there whole."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import google_crc32c

from actpipe.errors import StorageError, StorageRefusedError

MAIN_CORPUS = "main"
_READ_BYTES = 2**20
_COPY_BYTES = 2**16
"""The checksum takes `bytes` only; copies of this size stay in the processor's cache."""
WAYS_OUT = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space, or have the quota raised",
    errno.EACCES: "make it writable",
    errno.EPERM: "make it writable",
    errno.EROFS: "mount it for writing",
    errno.EIO: "look after the disk",
    errno.ESTALE: "mount it again",
    errno.ENOTCONN: "mount it again",
    errno.ETIMEDOUT: "see that its server answers",
    errno.EMFILE: "allow more open files with `ulimit -n`",
}
"""What to do about a disk that takes nothing, by the number of the error."""
_NEEDS_SOMEONE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EMFILE}
"""Trouble that does not pass by itself."""
SAME_EVERYWHERE = _NEEDS_SOMEONE | {errno.ENOSPC, errno.EDQUOT}
"""Trouble that another host would have with the same folder, too."""

HALF_WRITTEN = re.compile(
    r"\.(run\.yaml|tokens\.json|rows\.json|part-\d{8}\.json|report\.html|\.lock|[a-z0-9][a-z0-9_-]*\.json)\.[0-9a-f]{12}"
)
"""What `write_whole` and the lock call a file before it has its name; the next run clears what a killed one left."""


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
    def rows(self) -> Path:
        """One row per token that the store keeps, where these are not all."""
        return self.root / "rows.parquet"

    @property
    def rows_commit(self) -> Path:
        """Commit record of `rows.parquet`."""
        return self.commits / "rows.json"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer, so that text can be had from ids for ever."""
        return self.root / "tokenizer"

    @property
    def store(self) -> Path:
        """The Zarr group."""
        return self.root / "store.zarr"

    @property
    def has_store(self) -> bool:
        """Whether there is a store, begun or finished."""
        return (self.store / "zarr.json").is_file()

    @property
    def commits(self) -> Path:
        """Commit records."""
        return self.root / "commits"

    @property
    def batch_tokens(self) -> Path:
        """The size of batches, where it was found by trial: all parts are made with the same."""
        return self.commits / "batch_tokens.json"

    @property
    def token_commit(self) -> Path:
        """Commit record of the token table."""
        return self.commits / "tokens.json"

    @property
    def withdrawn_tokens(self) -> Path:
        """Commit record that the token table had before its repair began."""
        return self.commits / "withdrawn-tokens.json"

    def part_commit(self, part: int) -> Path:
        """Commit record of one part."""
        return self.commits / f"part-{part:08d}.json"

    @property
    def results(self) -> Path:
        """What the analyses found."""
        return self.root / "results"

    @property
    def reductions(self) -> Path:
        """What finished parts of `reduce_activations` gave, until all are done."""
        return self.root / "reductions"

    @property
    def partial(self) -> Path:
        """Files on their way; nothing in it counts, and a run clears its own kind."""
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


def user_cache() -> Path:
    """Return the folder for what can be fetched or found again: `ACTPIPE_CACHE`, else in the user's cache."""
    own = os.environ.get("ACTPIPE_CACHE", "")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME", "") or Path.home() / ".cache") / "actpipe"


@contextmanager
def disk_trouble_explained(folder: RunFolder) -> Iterator[None]:
    """Say in one sentence what a failing disk means for a run.

    Raises:
        StorageError: The disk is full, broken or out of reach.
        StorageRefusedError: It is read-only or forbidden.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in WAYS_OUT:
            raise
        where = error.filename or folder.root
        kind = StorageRefusedError if error.errno in _NEEDS_SOMEONE else StorageError
        raise kind(
            f"stopped at {where}: {os.strerror(error.errno).lower()}; {WAYS_OUT[error.errno]} and give the same "
            "command again, it continues from what is committed"
        ) from error


def write_whole(path: Path, data: bytes, *, force: bool = True, parents: bool = True) -> None:
    """Write a file so that it is either there whole or not at all, power loss included unless `force` is off.

    Its folder is made, unless `parents` is off: then it is an error if that is gone.
    """
    if parents:
        path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            if force:
                os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    if force:
        sync(path.parent)


def take_away(path: Path, folder: RunFolder) -> None:
    """Remove a folder that others may be writing into: at once out of their sight, then file by file."""
    aside = folder.new_partial("away")
    with suppress(FileNotFoundError):
        path.replace(aside / path.name)
    shutil.rmtree(aside, ignore_errors=True)


def sync(path: Path) -> None:
    """Force a file's bytes, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Force a folder and everything in it to the disk."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def move(path: Path, to: Path) -> None:
    """Put a finished file or folder into its place, for good: power loss does not undo it."""
    path.replace(to)
    sync(to.parent)


def crc32c_of(path: Path) -> str:
    """Return the CRC-32C of a file as eight hexadecimal digits."""
    checksum = 0
    with path.open("rb", buffering=0) as file:
        while piece := file.read(_READ_BYTES):
            checksum = google_crc32c.extend(checksum, piece)
    return f"{checksum:08x}"


def extend_crc32c(checksum: int, data: memoryview) -> int:
    """Return the CRC-32C of what had `checksum` followed by `data`."""
    for start in range(0, len(data), _COPY_BYTES):
        checksum = google_crc32c.extend(checksum, data[start : start + _COPY_BYTES].tobytes())
    return checksum


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""Compare what is on disk with what was committed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from actpipe.errors import IncompleteStoreError
from actpipe.planning import plan_parts
from actpipe.records import Part
from actpipe.schemas.commit import ChunkRecord, Commit
from actpipe.schemas.manifest import StoreManifest
from actpipe.schemas.results import ResultRecord
from actpipe.stores.encoding import chunk_paths
from actpipe.stores.kept_rows import read_kept_rows
from actpipe.stores.layout import HALF_WRITTEN, RunFolder, crc32c_of, sha256_of
from actpipe.stores.remote import as_kept, kept_chunks
from actpipe.stores.results import files_of
from actpipe.stores.token_table import TokenTable
from actpipe.stores.writing import (
    ATTRIBUTE,
    CHECKSUM,
    checksum_of,
    metadata_of,
    missing_parts,
    read_commit,
    read_manifest,
)

Progress = Callable[[int], None]
_MEANING = {
    "node_type",
    "shape",
    "data_type",
    "chunk_grid",
    "chunk_key_encoding",
    "fill_value",
    "codecs",
    "dimension_names",
}
"""What of a zarr.json says how to read the chunks."""


class Remedy(Enum):
    """What mends a problem."""

    TOKENS = "make the token table again"
    ROWS = "choose the rows again"
    METADATA = "write the store's metadata again"
    PART = "do the part again"
    RESUME = "continue the run"
    RESULT = "compute the result again"
    NONE = "look after it yourself"


@dataclass(frozen=True)
class Problem:
    """One thing that is not as it was committed."""

    where: str
    """The file, relative to the folder that holds such files, or the part."""
    what: str
    remedy: Remedy
    record: Path | None = None
    """The file whose withdrawal makes a run do it again."""

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


def find_problems(folder: RunFolder, progress: Progress = lambda _: None) -> list[Problem]:
    """Check the token table, the metadata, every commit record, every chunk's bytes, and that nothing else is there.

    Args:
        folder: One corpus of a run.
        progress: Called with the bytes checked since the last call.

    Returns:
        What is wrong; empty where all is well.
    """
    problems = [*_token_problems(folder), *_result_problems(folder)]
    if not folder.store.is_dir():
        return problems
    try:
        manifest = read_manifest(folder)
    except IncompleteStoreError:
        what = "holds no manifest; the chunks were not checked"
        return [*problems, Problem("zarr.json", what, Remedy.METADATA, folder.store / "zarr.json")]
    problems += _row_problems(folder, manifest)
    problems += _metadata_problems(folder, manifest)
    parts = plan_parts(manifest.n_rows, manifest.rows_per_part)
    missing = {part.index for part in missing_parts(folder, parts)}
    for part in parts:
        if part.index in missing:
            problems.append(Problem(f"part {part.index}", "not committed", Remedy.RESUME))
        else:
            problems += _part_problems(folder, manifest, part, progress)
    problems += _foreign_files(folder, manifest, parts)
    return problems


def _token_problems(folder: RunFolder) -> Iterator[Problem]:
    """Compare the files of the token table, and the tokenizer, with the checksums in its record."""
    record = folder.token_commit
    if not record.is_file():
        if folder.store.is_dir():
            yield Problem("tokens.json", "missing", Remedy.TOKENS, record)
        return
    try:
        manifest = TokenTable(folder).manifest
    except ValidationError as error:
        yield Problem(record.name, f"is no commit record ({_first_line(error)})", Remedy.TOKENS, record)
        return
    for name, expected in manifest.checksums.items():
        if what := _file_problem(folder.root / name, expected):
            yield Problem(name, what, Remedy.TOKENS, record)
    definition = folder.tokenizer / "tokenizer.json"
    if manifest.tokenizer_sha256 is None:
        return
    if not definition.is_file():
        yield Problem("tokenizer/tokenizer.json", "missing", Remedy.NONE)
    elif sha256_of(definition) != manifest.tokenizer_sha256:
        yield Problem("tokenizer/tokenizer.json", "checksum differs from the one committed", Remedy.NONE)


def _row_problems(folder: RunFolder, manifest: StoreManifest) -> Iterator[Problem]:
    """Compare the row table, where there should be one, with its record, and that with the manifest."""
    if manifest.kept_rows is None:
        return
    record = folder.rows_commit
    try:
        kept = read_kept_rows(folder)
    except ValidationError as error:
        yield Problem(record.name, f"is no commit record ({_first_line(error)})", Remedy.ROWS, record)
        return
    if kept is None:
        yield Problem(record.name, "missing", Remedy.ROWS, record)
    elif kept.rows_crc32c != manifest.kept_rows:
        yield Problem(record.name, "is of other rows than the store's manifest", Remedy.ROWS, record)
    elif what := _file_problem(folder.rows, kept.file_crc32c):
        yield Problem(folder.rows.name, what, Remedy.ROWS, record)


def _result_problems(folder: RunFolder) -> Iterator[Problem]:
    """Name results whose record cannot be read, and files of results that are gone, others, or not theirs."""
    for path in sorted(folder.results.glob("*.json")):
        try:
            record = ResultRecord.from_json(path.read_bytes())
        except ValidationError as error:
            yield Problem(f"results/{path.name}", f"is no record ({_first_line(error)})", Remedy.RESULT, path)
            continue
        gone = {name for name in (record.dataset, record.table) if name and not (folder.results / name).exists()}
        for name in sorted(gone):
            yield Problem(f"results/{name}", "missing", Remedy.RESULT, path)
        for file in record.files:
            if file.path.split("/", 1)[0] in gone:
                continue
            if what := _file_problem(folder.results / file.path, file.crc32c, file.n_bytes):
                yield Problem(f"results/{file.path}", what, Remedy.RESULT, path)
        known = {file.path for file in record.files}
        for found in files_of(folder.results, record.name) if known else ():
            if (relative := found.relative_to(folder.results).as_posix()) not in known:
                yield Problem(f"results/{relative}", "is no file of this result", Remedy.NONE)


def _metadata_problems(folder: RunFolder, manifest: StoreManifest) -> Iterator[Problem]:
    """Compare the manifest with its checksum, and every zarr.json with what the manifest makes of it."""
    for path, wanted in metadata_of(manifest).items():
        name = f"{path}/zarr.json".removeprefix("/")
        for what in _differences(folder.store / name, wanted):
            yield Problem(name, what, Remedy.METADATA, folder.store / "zarr.json")


def _differences(path: Path, wanted: dict[str, Any]) -> Iterator[str]:
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        yield "missing"
        return
    except ValueError as error:
        yield f"is no JSON ({_first_line(error)})"
        return
    for key in sorted(_MEANING & wanted.keys()):
        if found.get(key) != wanted[key]:
            yield f"{key} is {found.get(key)!r}, the manifest makes it {wanted[key]!r}"
    attributes = found.get("attributes", {})
    if CHECKSUM in attributes and attributes[CHECKSUM] != checksum_of(attributes[ATTRIBUTE]):
        yield "the manifest in it is not the one that was written"


def _part_problems(folder: RunFolder, manifest: StoreManifest, part: Part, progress: Progress) -> list[Problem]:
    path = folder.part_commit(part.index)
    try:
        commit = read_commit(path)
    except ValidationError as error:
        return [Problem(path.name, f"is no commit record ({_first_line(error)})", Remedy.PART, path)]
    wanted = {chunk for array in manifest.arrays for chunk in chunk_paths(manifest, array, part.index)}
    rows = (commit.part, commit.row_start, commit.row_stop)
    if {chunk.path for chunk in commit.chunks} != wanted or rows != (part.index, part.row_start, part.row_stop):
        return [Problem(path.name, "does not belong to this store's manifest", Remedy.PART, path)]
    return _chunk_problems(folder, commit, path, progress)


def _chunk_problems(folder: RunFolder, commit: Commit, record: Path, progress: Progress) -> list[Problem]:
    def check(chunk: ChunkRecord) -> Problem | None:
        with as_kept(folder.store / chunk.path):
            what = _file_problem(folder.store / chunk.path, chunk.crc32c, chunk.n_bytes)
        progress(chunk.n_bytes)
        return None if what is None else Problem(chunk.path, what, Remedy.PART, record)

    with ThreadPoolExecutor() as pool:
        return [problem for problem in pool.map(check, commit.chunks) if problem]


def _file_problem(path: Path, crc32c: str, n_bytes: int | None = None) -> str | None:
    """Say how a file differs from what was committed, or None."""
    if not path.is_file():
        return "missing"
    size = path.stat().st_size
    if n_bytes is not None and size != n_bytes:
        return f"{size} bytes, committed were {n_bytes}"
    found = crc32c_of(path)
    return None if found == crc32c else f"checksum {found}, committed was {crc32c}"


def _foreign_files(folder: RunFolder, manifest: StoreManifest, parts: tuple[Part, ...]) -> Iterator[Problem]:
    """Name files in the store and among the records that are none of theirs.

    Chunks of parts that are not committed are on their way.
    """
    ours = {chunk for part in parts for array in manifest.arrays for chunk in chunk_paths(manifest, array, part.index)}
    ours |= {f"{path}/zarr.json".removeprefix("/") for path in metadata_of(manifest)}
    here = {path.relative_to(folder.store).as_posix() for path in folder.store.rglob("*") if not path.is_dir()}
    for relative in sorted(here | kept_chunks(folder.store)):
        if relative not in ours:
            yield Problem(relative, "belongs to no part of this store", Remedy.NONE)
    records = {folder.part_commit(part.index) for part in parts}
    records |= {folder.token_commit, folder.withdrawn_tokens, folder.rows_commit, folder.batch_tokens}
    for path in sorted(folder.commits.iterdir()) if folder.commits.is_dir() else ():
        if path not in records and not HALF_WRITTEN.fullmatch(path.name):
            yield Problem(f"commits/{path.name}", "is no record of this store", Remedy.NONE)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def chunk_bytes(folder: RunFolder) -> int:
    """Return the bytes of all committed chunks; records that cannot be read count nothing."""
    total = 0
    for path in sorted(folder.commits.glob("part-*.json")):
        try:
            total += sum(chunk.n_bytes for chunk in read_commit(path).chunks)
        except ValidationError:
            continue
    return total


def corpora(folder: RunFolder) -> dict[str, RunFolder]:
    """Return every corpus of a run by name, `main` first."""
    others: list[Path] = sorted(path for path in folder.root.glob("corpora/*") if path.is_dir())
    return {"main": folder} | {path.name: RunFolder(path) for path in others}

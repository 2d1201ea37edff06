"""Compare what is on disk with what was committed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import zarr

from actpipe.planning import plan_parts
from actpipe.schemas.commit import ChunkRecord
from actpipe.schemas.manifest import StoreManifest
from actpipe.stores.dtypes import numpy_dtype
from actpipe.stores.layout import RunFolder, crc32c_of
from actpipe.stores.token_table import TokenTable, checksum_problems
from actpipe.stores.writing import chunk_path, missing_parts, read_commit, read_manifest

Progress = Callable[[int], None]


def find_problems(folder: RunFolder, progress: Progress = lambda _: None) -> list[str]:
    """Check the token table, the manifest, every commit record and every chunk's bytes.

    Args:
        folder: One corpus of a run.
        progress: Called with the bytes checked since the last call.

    Returns:
        What is wrong, one line each, naming the file; empty where all is well.
    """
    problems: list[str] = []
    if TokenTable.exists(folder):
        problems += checksum_problems(folder)
    if not folder.store.is_dir():
        return problems
    manifest = read_manifest(folder)
    problems += _array_problems(folder, manifest)
    parts = plan_parts(manifest.n_rows, manifest.rows_per_part)
    missing = {part.index for part in missing_parts(folder, parts)}
    problems += [f"part {index}: not committed" for index in sorted(missing)]
    expected: set[str] = set()
    for part in parts:
        if part.index in missing:
            continue
        commit = read_commit(folder.part_commit(part.index))
        wanted = {chunk_path(array, part.index) for array in manifest.arrays}
        if {chunk.path for chunk in commit.chunks} != wanted or commit.row_stop != part.row_stop:
            problems.append(f"{folder.part_commit(part.index).name}: does not belong to this store's manifest")
        expected |= wanted
        problems += _chunk_problems(folder, commit.chunks, progress)
    problems += _foreign_files(folder, manifest, expected, missing)
    return problems


def _array_problems(folder: RunFolder, manifest: StoreManifest) -> list[str]:
    problems = []
    group = zarr.open_group(folder.store, mode="r")
    for array in manifest.arrays:
        if array.path not in group:
            problems.append(f"{array.path}: its zarr.json is missing")
            continue
        found = group[array.path]
        shape, chunks = (manifest.n_rows, *array.row_shape), (manifest.rows_per_part, *array.row_shape)
        if (found.shape, found.chunks, found.dtype) != (shape, chunks, numpy_dtype(array.dtype)):
            problems.append(
                f"{array.path}: zarr.json says {found.shape} {found.dtype} in chunks {found.chunks}, "
                f"the manifest {shape} {array.dtype} in chunks {chunks}"
            )
    return problems


def _chunk_problems(folder: RunFolder, chunks: tuple[ChunkRecord, ...], progress: Progress) -> list[str]:
    def check(chunk: ChunkRecord) -> str | None:
        path = folder.store / chunk.path
        if not path.is_file():
            return f"{chunk.path}: missing"
        size = path.stat().st_size
        if size != chunk.n_bytes:
            return f"{chunk.path}: {size} bytes, committed were {chunk.n_bytes}"
        found = crc32c_of(path)
        progress(size)
        return None if found == chunk.crc32c else f"{chunk.path}: checksum {found}, committed was {chunk.crc32c}"

    with ThreadPoolExecutor() as pool:
        return [problem for problem in pool.map(check, chunks) if problem]


def _foreign_files(folder: RunFolder, manifest: StoreManifest, expected: set[str], missing: set[int]) -> list[str]:
    """Name files that no commit record speaks of; chunks of parts that are not committed are only on their way."""
    on_their_way = {chunk_path(array, part) for array in manifest.arrays for part in missing}
    problems = []
    for path in sorted(folder.store.rglob("*")):
        relative = path.relative_to(folder.store).as_posix()
        if path.is_file() and path.name != "zarr.json" and relative not in expected | on_their_way:
            problems.append(f"{relative}: belongs to no committed part")
    return problems


def chunk_bytes(folder: RunFolder) -> int:
    """Return the bytes of all committed chunks."""
    return sum(
        chunk.n_bytes for path in sorted(folder.commits.glob("part-*.json")) for chunk in read_commit(path).chunks
    )


def corpora(folder: RunFolder) -> dict[str, RunFolder]:
    """Return every corpus of a run by name, `main` first."""
    others: list[Path] = sorted(path for path in folder.root.glob("corpora/*") if path.is_dir())
    return {"main": folder} | {path.name: RunFolder(path) for path in others}

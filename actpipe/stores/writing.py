"""Write a store: its metadata once, then parts, each a raw chunk file per array and one commit record."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
import zarr
from zarr.storage import MemoryStore

from actpipe.errors import IncompleteStoreError, StoreMismatchError
from actpipe.records import Part
from actpipe.schemas.commit import ChunkRecord, Commit
from actpipe.schemas.manifest import ArrayManifest, StoreManifest
from actpipe.stores.dtypes import fill_value, numpy_dtype
from actpipe.stores.layout import RunFolder, crc32c_of, move, sync, sync_tree, write_whole

_PART_RECORD = re.compile(r"part-(\d{8})\.json")
ATTRIBUTE = "actpipe"
"""Key of the manifest in the attributes of the Zarr group."""
CHECKSUM = "actpipe_crc32c"
"""Key of its checksum beside it; absent in stores of early releases."""


def create_store(folder: RunFolder, manifest: StoreManifest) -> None:
    """Make the Zarr group with all arrays and no data; a store of the same manifest is left as it is.

    A store without `zarr.json` gets its metadata back, and keeps its chunks.

    Raises:
        StoreMismatchError: There is a store of another manifest; says where they differ.
    """
    if (folder.store / "zarr.json").exists():
        _refuse_other_manifest(folder, manifest)
        return
    partial = folder.new_partial("store")
    made = partial / "store.zarr"
    _make_group(made, manifest)
    sync_tree(made)
    if folder.store.exists():
        _restore_metadata(folder, made)
    else:
        move(made, folder.store)
    shutil.rmtree(partial)


def _make_group(store: Any, manifest: StoreManifest) -> None:
    group = zarr.create_group(store, zarr_format=3)
    for array in manifest.arrays:
        dtype = numpy_dtype(array.dtype)
        group.create_array(
            array.path,
            shape=(manifest.n_rows, *array.row_shape),
            chunks=(manifest.rows_per_part, *array.row_shape),
            dtype=array.dtype,
            compressors=None,
            filters=None,
            fill_value=fill_value(dtype),
            dimension_names=array.axes,
        )
    record = manifest.model_dump(mode="json")
    group.attrs.update({ATTRIBUTE: record, CHECKSUM: checksum_of(record)})


def _restore_metadata(folder: RunFolder, made: Path) -> None:
    """Put the metadata of every array in its place, the group's last: without it there is no store."""
    paths = sorted(path.relative_to(made) for path in made.rglob("zarr.json"))
    for path in sorted(paths, key=lambda path: len(path.parts), reverse=True):
        (folder.store / path).parent.mkdir(parents=True, exist_ok=True)
        move(made / path, folder.store / path)


def metadata_of(manifest: StoreManifest) -> dict[str, dict[str, Any]]:
    """Return what every `zarr.json` of a store says, by the path of its folder in the group."""
    memory: dict[str, Any] = {}
    _make_group(MemoryStore(memory), manifest)
    return {key.removesuffix("zarr.json").rstrip("/"): json.loads(data.to_bytes()) for key, data in memory.items()}


def checksum_of(record: Mapping[str, Any]) -> str:
    """Return the CRC-32C of a manifest, whatever the order and spacing in which JSON has it."""
    return f"{google_crc32c.value(json.dumps(record, sort_keys=True).encode()):08x}"


def _refuse_other_manifest(folder: RunFolder, wanted: StoreManifest) -> None:
    found = read_manifest(folder)
    ours, theirs = wanted.model_dump(), found.model_dump()
    different = [key for key in ours if ours[key] != theirs[key]]
    if different:
        key = different[0]
        raise StoreMismatchError(
            f"cannot continue {folder.store}: its {key} is {theirs[key]!r}, this run's {ours[key]!r}; "
            "choose another folder with --out"
        )


def read_manifest(folder: RunFolder) -> StoreManifest:
    """Read a store's manifest from its Zarr attributes.

    Raises:
        IncompleteStoreError: There is none that could be read.
    """
    path = folder.store / "zarr.json"
    try:
        attributes = json.loads(path.read_text(encoding="utf-8"))["attributes"]
        return StoreManifest.from_json(json.dumps(attributes[ATTRIBUTE]))
    except (ValueError, LookupError, FileNotFoundError) as error:
        raise IncompleteStoreError(
            f"{path} holds no manifest ({str(error).splitlines()[0]}); "
            f"`actpipe repair {folder.root}` writes it again from the recipe"
        ) from error


def chunk_path(array: ArrayManifest, part: int) -> str:
    """Return the path of one array's chunk of one part, relative to the Zarr group."""
    return "/".join([array.path, "c", str(part), *("0" for _ in array.row_shape)])


def chunk_paths(array: ArrayManifest, part: int) -> tuple[str, ...]:
    """Return the paths of all chunks that hold one part of an array, relative to the Zarr group."""
    return (chunk_path(array, part),)


class PartWriter:
    """Takes the rows of one part in any order, then commits the part as a whole.

    Rows go straight into files of their final size, so memory does not grow with the part.
    """

    def __init__(self, folder: RunFolder, manifest: StoreManifest, part: Part, *, fsync: bool) -> None:
        self._folder = folder
        self._manifest = manifest
        self._part = part
        self._fsync = fsync
        self._partial = folder.new_partial(f"part-{part.index:08d}")
        self._arrays = {array.path: array for array in manifest.arrays}
        self._row_bytes = {
            array.path: int(np.prod(array.row_shape, dtype=np.int64)) * numpy_dtype(array.dtype).itemsize
            for array in manifest.arrays
        }
        self._rows_written = dict.fromkeys(self._arrays, 0)
        self._n_clipped: dict[str, int] = {}
        self._files = {path: self._create(path) for path in self._arrays}

    def _create(self, array: str) -> int:
        descriptor = os.open(self._partial / array.replace("/", "%"), os.O_CREAT | os.O_RDWR | os.O_EXCL, 0o644)
        os.ftruncate(descriptor, self._manifest.rows_per_part * self._row_bytes[array])
        return descriptor

    def write(self, array: str, first_row: int, rows: npt.NDArray[Any]) -> int:
        """Write consecutive rows of one array; `first_row` counts from the start of the store.

        Returns:
            Bytes written.
        """
        offset = first_row - self._part.row_start
        assert 0 <= offset <= self._part.n_rows - len(rows), "rows must lie within the part"
        data = np.ascontiguousarray(rows).view(np.uint8).data.cast("B")
        assert len(data) == len(rows) * self._row_bytes[array], f"rows of {array} have the wrong shape or type"
        position, written = offset * self._row_bytes[array], 0
        while written < len(data):
            written += os.pwrite(self._files[array], data[written:], position + written)
        self._rows_written[array] += len(rows)
        return written

    def count_clipped(self, array: str, count: int) -> None:
        """Note that values were clipped, for the commit record."""
        self._n_clipped[array] = self._n_clipped.get(array, 0) + count

    def commit(self) -> None:
        """Put every chunk in its place, then the record that makes the part count."""
        for array, rows in self._rows_written.items():
            assert rows == self._part.n_rows, f"{array}: {rows} of {self._part.n_rows} rows were written"
        chunks = tuple(self._place(array) for array in self._arrays.values())
        commit = Commit(
            part=self._part.index,
            row_start=self._part.row_start,
            row_stop=self._part.row_stop,
            n_clipped=dict(sorted(self._n_clipped.items())),
            chunks=chunks,
        )
        write_whole(self._folder.part_commit(self._part.index), commit.to_json().encode())
        self.abandon()

    def _place(self, array: ArrayManifest) -> ChunkRecord:
        temporary = self._partial / array.path.replace("/", "%")
        descriptor = self._files.pop(array.path)
        try:
            if self._fsync:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
        path = chunk_path(array, self._part.index)
        record = ChunkRecord(path=path, n_bytes=temporary.stat().st_size, crc32c=crc32c_of(temporary))
        final = self._folder.store / path
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary.replace(final)
        if self._fsync:
            sync(final.parent)
        return record

    def abandon(self) -> None:
        """Close and remove what was not committed."""
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files = {}
        shutil.rmtree(self._partial, ignore_errors=True)


def read_commit(path: Path) -> Commit:
    """Read one commit record."""
    return Commit.from_json(path.read_bytes())


def withdraw(record: Path) -> None:
    """Remove the record that makes something count, at once and for good; what it spoke of will be done again."""
    record.unlink(missing_ok=True)
    sync(record.parent)


def committed_parts(folder: RunFolder) -> set[int]:
    """Return the numbers of the parts that are done."""
    names = (_PART_RECORD.fullmatch(path.name) for path in folder.commits.glob("part-*.json"))
    return {int(name[1]) for name in names if name}


def missing_parts(folder: RunFolder, parts: Iterable[Part]) -> list[Part]:
    """Return the parts that have no commit record, in order."""
    done = committed_parts(folder)
    return [part for part in parts if part.index not in done]

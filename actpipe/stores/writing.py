"""Write a store: its metadata once, then parts, each a raw chunk file per array and one commit record."""

from __future__ import annotations

import json
import math
import re
import resource
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import google_crc32c
import numpy as np
import numpy.typing as npt
import zarr
from zarr.storage import MemoryStore

from actpipe.errors import IncompleteStoreError, StorageRefusedError, StoreMismatchError
from actpipe.records import Part
from actpipe.schemas.commit import ChunkRecord, Commit, Fidelity
from actpipe.schemas.manifest import ArrayManifest, StoreManifest
from actpipe.stores.claims import alone_at, is_committed
from actpipe.stores.dtypes import numpy_dtype
from actpipe.stores.encoding import compress, quantise_file, zarr_arrays, zarr_codec
from actpipe.stores.layout import RunFolder, crc32c_of, move, sync, sync_tree, write_whole
from actpipe.stores.raw_file import RawFile
from actpipe.stores.remote import publish, remote_of

Fsync = Literal["none", "commit", "always"]
_PART_RECORD = re.compile(r"part-(\d{8})\.json")
ATTRIBUTE = "actpipe"
"""Key of the manifest in the attributes of the Zarr group."""
_OTHER_FILES = 256
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
    publish(folder.store.rglob("zarr.json"))


def _make_group(store: Any, manifest: StoreManifest) -> None:
    group = zarr.create_group(store, zarr_format=3)
    for array in manifest.arrays:
        for each in zarr_arrays(manifest, array):
            group.create_array(
                each.path,
                shape=each.shape,
                chunks=each.chunk,
                dtype=each.dtype,
                compressors=zarr_codec(manifest.codec),
                filters=None,
                fill_value=each.fill_value,
                dimension_names=each.axes,
                attributes=each.attributes,
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
        key, here, there = different[0], ours[different[0]], theirs[different[0]]
        if key == "arrays":
            key, here, there = _first_difference(here, there)
        raise StoreMismatchError(
            f"cannot continue {folder.store}: its {key} is {there!r}, this run's {here!r}; "
            "choose another folder with --out"
        )


def _first_difference(ours: Iterable[Any], theirs: Iterable[Any]) -> tuple[str, Any, Any]:
    """Return what differs first in two lists of arrays, ours and theirs; None where one of them lacks it."""
    mine, other = ({array["path"]: array for array in arrays} for arrays in (ours, theirs))
    path = next((path for path in (*mine, *other) if mine.get(path) != other.get(path)), "arrays")
    return path, mine.get(path), other.get(path)


def read_manifest(folder: RunFolder) -> StoreManifest:
    """Read a store's manifest from its Zarr attributes.

    Raises:
        IncompleteStoreError: There is none that could be read.
    """
    path = folder.store / "zarr.json"
    try:
        return parse_manifest(path.read_bytes())
    except (ValueError, LookupError, FileNotFoundError) as error:
        raise IncompleteStoreError(
            f"{path} holds no manifest ({str(error).splitlines()[0]}); "
            f"`actpipe repair {folder.root}` writes it again from the recipe"
        ) from error


def parse_manifest(metadata: bytes) -> StoreManifest:
    """Return the manifest in the metadata of a Zarr group.

    Raises:
        ValueError: It is no JSON, or the manifest does not fit.
        LookupError: There is no manifest in it.
    """
    return StoreManifest.from_json(json.dumps(json.loads(metadata)["attributes"][ATTRIBUTE]))


def allow_open_files(wanted: int) -> None:
    """Raise this process's limit of open files to so many more than usual, as far as the system lets it.

    Raises:
        StorageRefusedError: The system does not; says both numbers.
    """
    wanted += _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= wanted or soft == resource.RLIM_INFINITY:
        return
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise StorageRefusedError(
            f"cannot write: so many arrays need {wanted:,} open files, and this system allows {hard:,}; "
            "raise that limit (`ulimit -n`), or store fewer hooks"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class PartWriter:
    """Takes the rows of one part in any order, then commits the part as a whole.

    Rows go straight into files of their final size, so memory does not grow with the part. Compressing
    and quantising happen at the commit, part by part, so that they do not depend on the batches.

    Args:
        folder: The corpus.
        manifest: What the store holds.
        part: The rows that will come.
        fsync: When bytes are forced to the disk: `none`, `commit` or `always`.
    """

    def __init__(self, folder: RunFolder, manifest: StoreManifest, part: Part, *, fsync: Fsync) -> None:
        self._folder = folder
        self._manifest = manifest
        self._part = part
        self._fsync = fsync
        self._partial = folder.new_partial(f"part-{part.index:08d}")
        self._arrays = {array.path: array for array in manifest.arrays}
        self._row_bytes = {
            array.path: math.prod(array.row_shape) * numpy_dtype(array.dtype).itemsize for array in manifest.arrays
        }
        self._rows_written = dict.fromkeys(self._arrays, 0)
        self._n_clipped: dict[str, int] = {}
        self._marked = (self._rows_written, self._n_clipped)
        self._files: dict[str, RawFile] = {}
        self._beside = ThreadPoolExecutor(1, thread_name_prefix="actpipe-checksum")
        try:
            for path, row_bytes in self._row_bytes.items():
                name = self._partial / path.replace("/", "%")
                self._files[path] = RawFile(name, manifest.rows_per_part * row_bytes)
        except OSError:
            self.abandon()
            raise

    def write(self, array: str, first_row: int, rows: npt.NDArray[Any]) -> int:
        """Write consecutive rows of one array; `first_row` counts from the start of the store.

        Returns:
            Bytes written.
        """
        offset = first_row - self._part.row_start
        assert 0 <= offset <= self._part.n_rows - len(rows), "rows must lie within the part"
        data = np.ascontiguousarray(rows).view(np.uint8).data.cast("B")
        assert len(data) == len(rows) * self._row_bytes[array], f"rows of {array} have the wrong shape or type"
        file = self._files[array]
        file.write(data, offset * self._row_bytes[array], self._beside)
        if self._fsync == "always":
            file.force()
        self._rows_written[array] += len(rows)
        return len(data)

    def count_clipped(self, array: str, count: int) -> None:
        """Note that values were clipped, for the commit record."""
        self._n_clipped[array] = self._n_clipped.get(array, 0) + count

    def mark(self) -> None:
        """Note what is written: it is final."""
        self._marked = dict(self._rows_written), dict(self._n_clipped)

    def undo(self) -> None:
        """Count as written what was so at the mark; what came since will be written over."""
        self._rows_written, self._n_clipped = map(dict, self._marked)

    def commit(self) -> None:
        """Put every chunk in its place, then the record that makes the part count.

        Where another worker has committed the same part meanwhile, its bytes stay and these go.

        Raises:
            DtypeOverflowError: A value is not finite, and quantised arrays keep finite ones only.
        """
        for array, rows in self._rows_written.items():
            assert rows == self._part.n_rows, f"{array}: {rows} of {self._part.n_rows} rows were written"
        fidelity: dict[str, Fidelity] = {}
        finished = [chunk for array in self._arrays.values() for chunk in self._finish(array, fidelity)]
        records = tuple(record for _, record in finished)
        commit = Commit(
            schema_version=2 if fidelity else 1,
            part=self._part.index,
            row_start=self._part.row_start,
            row_stop=self._part.row_stop,
            n_clipped=dict(sorted(self._n_clipped.items())),
            fidelity=fidelity,
            chunks=records,
        )
        record = self._folder.part_commit(self._part.index)
        with alone_at(self._folder, self._part.index):
            if not is_committed(record):
                self._place(finished)
                publish(self._folder.store / chunk.path for chunk in records)
                write_whole(record, commit.to_json().encode(), force=self._fsync != "none")
                publish([record])
        self.abandon()

    def _finish(self, array: ArrayManifest, fidelity: dict[str, Fidelity]) -> Iterator[tuple[Path, ChunkRecord]]:
        """Yield the finished chunk files of one array, on the disk as far as the policy asks for."""
        raw = self._files[array.path]
        plain = array.quantisation is None and self._manifest.codec == "none"
        if plain and self._fsync != "none":
            raw.force()
        raw.close()
        files: tuple[Path, ...] = (raw.path,)
        if array.quantisation is not None:
            files, fidelity[array.path] = quantise_file(
                raw.path, array, self._part.n_rows, self._manifest.rows_per_part
            )
        for file, each in zip(files, zarr_arrays(self._manifest, array), strict=True):
            chunk = compress(self._manifest.codec, file, numpy_dtype(each.dtype))
            if not plain and self._fsync != "none":
                sync(chunk)
            checksum = raw.checksum() if plain else crc32c_of(chunk)
            path = each.chunk_path(self._part.index)
            yield chunk, ChunkRecord(path=path, n_bytes=chunk.stat().st_size, crc32c=checksum)

    def _place(self, finished: list[tuple[Path, ChunkRecord]]) -> None:
        places = [self._folder.store / record.path for _, record in finished]
        for (file, _), place in zip(finished, places, strict=True):
            place.parent.mkdir(parents=True, exist_ok=True)
            file.replace(place)
        if self._fsync != "none":
            new = (parent for place in places for parent in (place.parent, place.parent.parent))
            for parent in dict.fromkeys(new):
                sync(parent)

    def abandon(self) -> None:
        """Close and remove what was not committed."""
        self._beside.shutdown()
        for file in self._files.values():
            file.close()
        shutil.rmtree(self._partial, ignore_errors=True)


def read_commit(path: Path) -> Commit:
    """Read one commit record."""
    return Commit.from_json(path.read_bytes())


def withdraw(record: Path) -> None:
    """Remove the record that makes something count, at once and for good; what it spoke of will be done again."""
    record.unlink(missing_ok=True)
    sync(record.parent)
    if (remote := remote_of(record.parent)) is not None:
        remote.delete(record)


def committed_parts(folder: RunFolder) -> set[int]:
    """Return the numbers of the parts that are done."""
    return parts_named(path.name for path in folder.commits.glob("part-*.json"))


def parts_named(names: Iterable[str]) -> set[int]:
    """Return the numbers of the parts whose commit records are among some names of files."""
    return {int(found[1]) for name in names if (found := _PART_RECORD.fullmatch(name))}


def missing_parts(folder: RunFolder, parts: Iterable[Part]) -> list[Part]:
    """Return the parts that have no commit record, in order."""
    done = committed_parts(folder)
    return [part for part in parts if part.index not in done]

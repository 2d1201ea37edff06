"""What the analyses found: labelled arrays as Zarr, tables as Parquet, and a record beside them."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import xarray as xr
import zarr

from actpipe.errors import IncompleteStoreError, did_you_mean
from actpipe.schemas.results import FileRecord, ResultRecord
from actpipe.stores.layout import RunFolder, crc32c_of, move, sync, sync_tree, write_whole


@dataclass(frozen=True)
class Result:
    """One result, open for reading."""

    folder: RunFolder
    record: ResultRecord

    @cached_property
    def dataset(self) -> xr.Dataset:
        """The labelled arrays, read when they are used.

        Raises:
            IncompleteStoreError: The result is a table only.
        """
        if self.record.dataset is None:
            raise IncompleteStoreError(f"the result {self.record.name!r} has no arrays; use .table")
        return xr.open_zarr(self.folder.results / self.record.dataset, consolidated=False, chunks=None)

    @cached_property
    def table(self) -> pd.DataFrame:
        """The table.

        Raises:
            IncompleteStoreError: The result is arrays only.
        """
        if self.record.table is None:
            raise IncompleteStoreError(f"the result {self.record.name!r} has no table; use .dataset")
        return pd.read_parquet(self.folder.results / self.record.table)

    @property
    def files(self) -> Path:
        """The folder of files that other tools take, such as directions; it is there where the result has any."""
        return self.folder.results / f"{self.record.name}.files"


def list_results(folder: RunFolder) -> list[Result]:
    """Return every finished result of a corpus, by name."""
    records = [ResultRecord.from_json(path.read_bytes()) for path in sorted(folder.results.glob("*.json"))]
    return [Result(folder, record) for record in records]


def find_result(folder: RunFolder, name: str) -> Result:
    """Return a result by its name.

    Raises:
        IncompleteStoreError: There is none; names those that there are.
    """
    results = {result.record.name: result for result in list_results(folder)}
    if name not in results:
        raise IncompleteStoreError(
            f"{folder.root} has no result {name!r}, it has {', '.join(results) or 'none'}{did_you_mean(name, results)}"
        )
    return results[name]


def current_result(folder: RunFolder, wanted: ResultRecord) -> Result | None:
    """Return the result that is there already, if it was made by the same settings from the same model."""
    path = folder.results / f"{wanted.name}.json"
    if not path.is_file():
        return None
    found = ResultRecord.from_json(path.read_bytes())
    same = (found.settings, found.model_fingerprint, found.kind) == (
        wanted.settings,
        wanted.model_fingerprint,
        wanted.kind,
    )
    return Result(folder, found) if same else None


class ResultWriter:
    """Writes one result beside its place and puts it there when it is whole.

    Args:
        folder: The corpus.
        wanted: Name, kind and origin; the files and the summary are filled in.
    """

    def __init__(self, folder: RunFolder, wanted: ResultRecord) -> None:
        self._folder = folder
        self._wanted = wanted
        self._partial = folder.new_partial(f"result-{wanted.name}")
        self._arrays = self._partial / f"{wanted.name}.zarr"
        self._lock = threading.Lock()

    def open_rows(
        self, name: str, shape: tuple[int, ...], *, axes: tuple[str, ...], chunk_rows: int, dtype: str = "float32"
    ) -> Callable[[int, npt.NDArray[Any]], None]:
        """Return a function that writes a block of rows, given its first row; any thread may call it."""
        group = zarr.open_group(self._arrays, mode="a", zarr_format=3)
        array = group.create_array(
            name,
            shape=shape,
            chunks=(min(chunk_rows, max(1, shape[0])), *shape[1:]),
            dtype=dtype,
            compressors=None,
            fill_value=float("nan") if dtype == "float32" else -1,
            dimension_names=axes,
        )

        def write(start: int, rows: npt.NDArray[Any]) -> None:
            with self._lock:
                array[start : start + len(rows)] = rows

        return write

    def commit(
        self,
        *,
        dataset: xr.Dataset | None = None,
        table: pd.DataFrame | None = None,
        summary: Mapping[str, float | int | str] | None = None,
        files: Mapping[str, bytes] | None = None,
    ) -> Result:
        """Put the files in their places, then the record that makes them count, with their sizes and checksums.

        Args:
            dataset: Labelled arrays; those of `open_rows` are there already.
            table: The table.
            summary: The few numbers worth a line.
            files: Files for other tools by name, which go into `NAME.files`.
        """
        results, name = self._folder.results, self._wanted.name
        results.mkdir(exist_ok=True)
        (results / f"{name}.json").unlink(missing_ok=True)
        shutil.rmtree(results / f"{name}.zarr", ignore_errors=True)
        (results / f"{name}.parquet").unlink(missing_ok=True)
        if dataset is not None:
            dataset.to_zarr(self._arrays, mode="a", zarr_format=3, consolidated=False)
            sync_tree(self._arrays)
            move(self._arrays, results / f"{name}.zarr")
        if table is not None:
            table.to_parquet(self._partial / "table", index=False)
            sync(self._partial / "table")
            move(self._partial / "table", results / f"{name}.parquet")
        self._put_files(files or {})
        shutil.rmtree(self._partial)
        record = self._wanted.model_copy(
            update={
                "dataset": None if dataset is None else f"{name}.zarr",
                "table": None if table is None else f"{name}.parquet",
                "summary": dict(summary or {}),
                "files": tuple(_recorded(results, name)),
            }
        )
        write_whole(results / f"{name}.json", record.to_json().encode())
        return Result(self._folder, record)

    def _put_files(self, files: Mapping[str, bytes]) -> None:
        """Put files for other tools into `NAME.files`, in the place of those that were there."""
        place, partial = self._folder.results / f"{self._wanted.name}.files", self._partial / "files"
        shutil.rmtree(place, ignore_errors=True)
        for name, content in files.items():
            write_whole(partial / name, content)
        if files:
            move(partial, place)


def files_of(results: Path, name: str) -> list[Path]:
    """Return the files that are there of a result: its arrays, its table and those in `NAME.files`, by path."""
    folders = (results / f"{name}.zarr", results / f"{name}.files")
    found = [path for folder in folders for path in folder.rglob("*") if not path.is_dir()]
    table = results / f"{name}.parquet"
    return sorted([*found, table] if table.is_file() else found)


def _recorded(results: Path, name: str) -> Iterator[FileRecord]:
    for path in files_of(results, name):
        size = path.stat().st_size
        yield FileRecord(path=path.relative_to(results).as_posix(), n_bytes=size, crc32c=crc32c_of(path))


def labels(values: list[str]) -> npt.NDArray[Any]:
    """Return text labels in the form that Zarr v3 specifies (variable-length UTF-8)."""
    return np.array(values, dtype=object)

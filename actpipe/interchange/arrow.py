"""Folders as `datasets.load_from_disk` reads them: Arrow streams, `state.json`, `dataset_info.json`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from actpipe.errors import InterchangeError
from actpipe.interchange.formats import Column, Values
from actpipe.stores.dtypes import numpy_dtype

_FILE_BYTES = 512 * 2**20
_BATCH_BYTES = 4 * 2**20
_NUMBERS = {"bool", "int8", "uint8", "int16", "uint16", "int32", "int64", "float16", "float32", "float64"}


def feature_of(column: Column) -> Any:
    """Return the feature whose value is `row_shape` numbers: `Value`, a list of fixed length, `Array2D` to `Array5D`.

    Raises:
        InterchangeError: It has more axes than `datasets` knows.
    """
    rank = len(column.row_shape)
    if rank == 0:
        return datasets.Value(column.dtype)
    if rank == 1:
        return datasets.Sequence(datasets.Value(column.dtype), length=column.row_shape[0])
    if rank > 5:
        raise InterchangeError(f"datasets hold arrays of at most 5 axes, not of {rank}")
    return getattr(datasets, f"Array{rank}D")(shape=column.row_shape, dtype=column.dtype)


def column_of(feature: Any) -> Column | None:
    """Return what a feature holds, or None where it is not numbers of one shape."""
    if isinstance(feature, datasets.Value):
        return Column(feature.dtype, ()) if feature.dtype in _NUMBERS else None
    inner, length = getattr(feature, "feature", None), getattr(feature, "length", -1)
    if inner is not None:
        values = column_of(inner)
        return None if values is None or length < 1 else Column(values.dtype, (length, *values.row_shape))
    shape, dtype = getattr(feature, "shape", None), getattr(feature, "dtype", None)
    fixed = shape is not None and None not in shape and dtype in _NUMBERS
    return Column(str(dtype), tuple(shape)) if fixed and shape is not None else None


class ArrowWriter:
    """Writes rows of columns into files of bounded size; a reader maps them.

    Args:
        folder: Where to.
        columns: By name, what one row of the dataset holds.
    """

    def __init__(self, folder: Path, columns: Mapping[str, Column]) -> None:
        self._folder = folder
        self._columns = columns
        self._features = datasets.Features({name: feature_of(column) for name, column in columns.items()})
        self._schema = self._features.arrow_schema
        row_bytes = sum(column.row_bytes for column in columns.values())
        self._batch_rows = max(1, _BATCH_BYTES // max(1, row_bytes))
        self._files: list[str] = []
        self._stream: Any = None
        self._left = 0

    def write(self, rows: Mapping[str, Values]) -> None:
        """Append rows, by the name of the column."""
        arrays = [_nest(rows[name], self._schema.field(name).type) for name in self._columns]
        table = pa.Table.from_arrays(arrays, schema=self._schema)
        if self._stream is None or self._left <= 0:
            self._next_file()
        self._stream.write_table(table, max_chunksize=self._batch_rows)
        self._left -= table.nbytes

    def _next_file(self) -> None:
        self._close_stream()
        name = f"data-{len(self._files):05d}.arrow"
        self._files.append(name)
        self._stream = pa.ipc.new_stream(str(self._folder / name), self._schema)
        self._left = _FILE_BYTES

    def _close_stream(self) -> None:
        if self._stream is not None:
            self._stream.close()

    def close(self, identity: str) -> None:
        """Close the files and describe them; `identity` settles the dataset's fingerprint."""
        self._close_stream()
        datasets.DatasetInfo(features=self._features).write_to_directory(str(self._folder))
        state: dict[str, Any] = {
            "_data_files": [{"filename": name} for name in self._files],
            "_fingerprint": hashlib.sha256(identity.encode()).hexdigest()[:16],
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": None,
        }
        (self._folder / "state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")


def _nest(values: Values, kind: Any) -> Any:
    """Return an Arrow array of the type that a feature has."""
    shape = values.shape[1:]
    array = pa.array(np.ascontiguousarray(values).reshape(-1))
    if len(shape) == 1:
        return pa.FixedSizeListArray.from_arrays(array, shape[0])
    for size in reversed(shape):
        array = pa.ListArray.from_arrays(np.arange(0, len(array) + 1, int(size), dtype=np.int32), array)
    return pa.ExtensionArray.from_storage(kind, array) if shape else array


class ArrowReader:
    """A dataset on the disk, mapped; columns that are not numbers of one shape are passed over.

    Raises:
        InterchangeError: There is none, or it has no row or no such column.
    """

    def __init__(self, source: Path) -> None:
        try:
            loaded = datasets.load_from_disk(str(source))
        except (OSError, ValueError, LookupError) as error:
            raise InterchangeError(f"{source} is no dataset that `load_from_disk` reads ({error})") from error
        if not isinstance(loaded, datasets.Dataset):
            raise InterchangeError(f"{source} has the splits {', '.join(loaded)}; give the folder of one of them")
        found = {name: column_of(feature) for name, feature in loaded.features.items()}
        self.columns = {name: column for name, column in found.items() if column is not None}
        self.n_rows = len(loaded)
        if not self.columns or not self.n_rows:
            raise InterchangeError(f"{source} has no rows of numbers; its columns are {', '.join(found) or 'none'}")
        self._dataset = loaded.with_format("arrow")

    def read(self, name: str, start: int, stop: int) -> Values:
        """Return rows of one column."""
        array = self._dataset.select_columns(name)[start:stop][name].combine_chunks()
        if isinstance(array, pa.ExtensionArray):
            array = array.storage
        while hasattr(array, "flatten") and pa.types.is_nested(array.type):
            array = array.flatten()
        values: Values = array.to_numpy(zero_copy_only=False)
        column = self.columns[name]
        if len(values) != (stop - start) * np.prod(column.row_shape, dtype=np.int64) or values.dtype.kind == "O":
            raise InterchangeError(f"column {name!r} has missing values among rows {start} to {stop}")
        return values.astype(numpy_dtype(column.dtype), copy=False).reshape(stop - start, *column.row_shape)

"""safetensors: shards of consecutive rows, every array in each, in the order of their names."""

from __future__ import annotations

import json
import math
import struct
from bisect import bisect_right
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from actpipe.errors import InterchangeError
from actpipe.interchange.formats import Column, Format, Values, path_of, public_name
from actpipe.schemas.interchange import ExportRecord
from actpipe.stores.dtypes import numpy_dtype

_CODES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "uint16": "U16",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
}
_DTYPES = {code: dtype for dtype, code in _CODES.items()}
_MOST_HEADER_BYTES = 100_000_000
"""What the format allows."""


class ShardWriter:
    """Writes every block as a shard of its own."""

    def __init__(self, folder: Path, columns: Mapping[str, Column], record: ExportRecord) -> None:
        del record
        self._folder = folder
        self._names = sorted(columns, key=lambda path: -numpy_dtype(columns[path].dtype).itemsize)
        self._n_shards = 0
        self._n_rows = 0

    def write(self, rows: Mapping[str, Values]) -> None:
        """Write the next shard; wider types come first, so that all are aligned."""
        arrays = {path: np.ascontiguousarray(rows[path]) for path in self._names}
        n_rows = len(arrays[self._names[0]])
        header: dict[str, Any] = {
            "__metadata__": {"format": "pt", "row_start": str(self._n_rows), "row_stop": str(self._n_rows + n_rows)}
        }
        ends = list(accumulate((array.nbytes for array in arrays.values()), initial=0))
        for (path, array), start, stop in zip(arrays.items(), ends, ends[1:], strict=False):
            code = _CODES[array.dtype.name]
            header[public_name(path)] = {"dtype": code, "shape": array.shape, "data_offsets": [start, stop]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (self._folder / f"rows-{self._n_shards:06d}.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for array in arrays.values():
                file.write(array.view(np.uint8).data if array.nbytes else b"")
        self._n_rows += n_rows
        self._n_shards += 1

    def close(self) -> None:
        """Every shard is whole already."""


class ShardReader:
    """One file, or all of a folder by the order of their names.

    Raises:
        InterchangeError: There are none, or one cannot be read, or they differ in what they hold.
    """

    context_length = None

    def __init__(self, source: Path) -> None:
        files = [source] if source.is_file() else sorted(source.glob("*.safetensors"))
        if not files:
            raise InterchangeError(f"{source} holds no .safetensors file")
        self._shards = [_map(file) for file in files]
        self.columns = {path: Column(a.dtype.name, a.shape[1:]) for path, a in self._shards[0].items()}
        counts = []
        for file, shard in zip(files, self._shards, strict=True):
            found = {path: Column(a.dtype.name, a.shape[1:]) for path, a in shard.items()}
            rows = {len(array) for array in shard.values()}
            if found != self.columns or len(rows) != 1:
                raise InterchangeError(f"{file} does not hold the same arrays as {files[0]}, each with as many rows")
            counts.append(rows.pop())
        self._stops = list(accumulate(counts))
        self.n_rows = self._stops[-1]

    def read(self, path: str, start: int, stop: int) -> Values:
        """Return rows of one array."""
        pieces = []
        for number in range(bisect_right(self._stops, start), len(self._shards)):
            array = self._shards[number][path]
            offset = self._stops[number] - len(array)
            if offset >= stop:
                break
            pieces.append(array[max(0, start - offset) : stop - offset])
        return np.concatenate(pieces)


def _map(file: Path) -> dict[str, Values]:
    """Map every tensor of a file, by its path in a store."""
    try:
        with file.open("rb") as opened:
            (size,) = struct.unpack("<Q", opened.read(8))
            header: Any = json.loads(opened.read(size)) if size <= _MOST_HEADER_BYTES else None
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        return {path_of(name): _map_tensor(file, 8 + size, entry) for name, entry in tensors.items()}
    except (ValueError, LookupError, TypeError, AttributeError, struct.error) as error:
        raise InterchangeError(f"{file} is no safetensors file with rows of numbers ({error})") from error


def _map_tensor(file: Path, offset: int, entry: Mapping[str, Any]) -> Values:
    dtype, shape = numpy_dtype(_DTYPES[entry["dtype"]]), tuple(entry["shape"])
    start, stop = entry["data_offsets"]
    if not shape or stop - start != math.prod(shape) * dtype.itemsize:
        raise ValueError("a tensor has no rows, or another size than its shape")
    if not stop - start:
        return np.empty(shape, dtype)
    return np.memmap(file, np.uint8, "r", offset + start, (stop - start,)).view(dtype).reshape(shape)


FORMAT = Format(ShardWriter, ShardReader, has_bfloat16=True)

"""`.npy` files, one for each array, to be memory-mapped."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from actpipe.errors import InterchangeError
from actpipe.interchange.formats import SIDECAR, Column, Format, Values, path_of, public_name
from actpipe.schemas.interchange import ExportRecord
from actpipe.stores.writing import allow_open_files


class NpyWriter:
    """One open file for each array; blocks are appended."""

    def __init__(self, folder: Path, columns: Mapping[str, Column], record: ExportRecord) -> None:
        allow_open_files(len(columns))
        self._files: dict[str, BinaryIO] = {}
        for path, column in columns.items():
            file = folder / f"{public_name(path)}.npy"
            file.parent.mkdir(parents=True, exist_ok=True)
            self._files[path] = file.open("wb")
            shape = (record.store.n_rows, *column.row_shape)
            header = {"descr": np.dtype(column.dtype).str, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(self._files[path], header)

    def write(self, rows: Mapping[str, Values]) -> None:
        """Append rows to every file."""
        for path, values in rows.items():
            self._files[path].write(np.ascontiguousarray(values).data)

    def close(self) -> None:
        """Close every file."""
        for file in self._files.values():
            file.close()


class NpyReader:
    """One file, or all of a folder, mapped.

    Raises:
        InterchangeError: There are none, or they cannot be read, or differ in length.
    """

    context_length = None

    def __init__(self, source: Path) -> None:
        files = [source] if source.is_file() else sorted(source.rglob("*.npy"))
        root = source.parent if source.is_file() else source
        self._arrays: dict[str, Values] = {}
        for file in files:
            name = file.relative_to(root).with_suffix("") if file.suffix == ".npy" else file.relative_to(root)
            if name.parts[0] != SIDECAR:
                self._arrays[path_of(name.as_posix())] = _map(file)
        if not self._arrays:
            raise InterchangeError(f"{source} holds no .npy file")
        lengths = {len(array) for array in self._arrays.values()}
        if len(lengths) > 1:
            raise InterchangeError(f"the files of {source} hold different numbers of rows: {sorted(lengths)}")
        self.n_rows = lengths.pop()
        self.columns = {path: Column(a.dtype.name, a.shape[1:]) for path, a in self._arrays.items()}

    def read(self, path: str, start: int, stop: int) -> Values:
        """Return rows of one array."""
        return np.asarray(self._arrays[path][start:stop])


def _map(file: Path) -> Values:
    try:
        array: Values = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise InterchangeError(f"{file} is no .npy file that can be mapped ({error})") from error
    if not array.ndim:
        raise InterchangeError(f"{file} holds one number, not rows")
    return array


FORMAT = Format(NpyWriter, NpyReader)

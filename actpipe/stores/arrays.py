"""One array of a store: parts mapped or unpacked, rows gathered from them."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from io import FileIO
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from actpipe.compute.quantising import dequantise
from actpipe.errors import IncompleteStoreError
from actpipe.schemas.manifest import ArrayManifest, Quantisation
from actpipe.stores.dtypes import numpy_dtype
from actpipe.stores.encoding import Codec, decompress, row_bytes
from actpipe.stores.fetching import Chunk
from actpipe.stores.mapping import map_file
from actpipe.stores.remote import remote_of
from actpipe.stores.uncached import UncachedReader, cut_short, open_uncached

_LONG_RUN = 16
"""Rows that follow one another, from which on reading them beats copying them out of a map."""
_HINT_BYTES = 2**19
"""Most bytes of one hint: the operating system cuts longer ones short."""
_OPEN_FILES = 64
"""Most files that are open at once to be read past the page cache."""
_TRIES = 8
"""How often a chunk is fetched again where others make room of it before it is opened."""
_UNPACKED_CHUNKS = 8
"""Decompressed chunks that stay in memory, so that neighbouring rows are not unpacked again and again."""

Opened = TypeVar("Opened")


def _open_chunk(path: str, dtype: str, shape: tuple[int, ...], codec: Codec) -> npt.NDArray[Any]:
    """Open a chunk file: mapped, so that only what is touched is read, or decompressed whole."""
    status = os.stat(path)  # noqa: PTH116 - a Path takes longer to make than the rest to do
    version = (status.st_ino, status.st_mtime_ns)
    opened = map_file(path, version) if codec == "none" else _unpack_file(path, codec, version)
    return opened.view(numpy_dtype(dtype)).reshape(shape)


@lru_cache(maxsize=_UNPACKED_CHUNKS)
def _unpack_file(path: str, codec: Codec, version: tuple[int, int]) -> npt.NDArray[np.uint8]:
    del version
    return decompress(codec, Path(path))


def _read_run(file: FileIO, offset: int, wanted: memoryview) -> None:
    """Read bytes of a file that follow one another."""
    file.seek(offset)
    while wanted and (n_read := file.readinto(wanted)):
        wanted = wanted[n_read:]
    if wanted:
        raise cut_short(file)


@dataclass(frozen=True)
class StoredArray:
    """One array of a store as numpy sees arrays: shape, element type, slices. Small, and can be sent to workers."""

    store: Path
    manifest: ArrayManifest
    n_rows: int
    rows_per_part: int
    codec: Codec = "none"

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows first."""
        return (self.n_rows, *self.manifest.row_shape)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Element type that is read; on disk too, unless the array is quantised."""
        return numpy_dtype(self.manifest.dtype)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row on disk, before compression."""
        return row_bytes(self.manifest)

    def part(self, index: int) -> npt.NDArray[Any]:
        """Return one part: mapped and not yet read where it is neither compressed nor quantised.

        Raises:
            IncompleteStoreError: The part is not there.
        """
        return self._rows_of(index, slice(0, self.n_rows - index * self.rows_per_part))

    def _rows_of(self, part: int, rows: slice | npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """Return rows of one part, counted from its first."""
        kept, shape = self.manifest.quantisation, self.manifest.row_shape
        if kept is None:
            return self._chunk(self.manifest.path, part, self.manifest.dtype, (self.rows_per_part, *shape))[rows]
        code = "int8" if kept.code == "int8" else "uint8"
        codes = self._chunk(self.manifest.path, part, code, (self.rows_per_part, *shape))[rows]
        return self._scaled(kept, part, rows, codes)

    def _scaled(
        self, kept: Quantisation, part: int, rows: slice | npt.NDArray[np.int64], codes: npt.NDArray[Any]
    ) -> npt.NDArray[np.float32]:
        """Return codes of rows of one part times their scales."""
        shape = self.manifest.row_shape
        values = math.prod(shape)
        scales = self._chunk(kept.row_scales, part, "float32", (self.rows_per_part, -(-values // kept.block)))
        channels = self._chunk(kept.channel_scales, part, "float32", (1, *shape)).reshape(values)
        return dequantise(codes.reshape(-1, values), scales[rows], channels, kept.block).reshape(-1, *shape)

    def step(self, row: int) -> npt.NDArray[np.float32] | None:
        """Return by how much each value of a row changes with its code by 1; None where it is not quantised."""
        kept = self.manifest.quantisation
        if kept is None:
            return None
        part, offset = divmod(row, self.rows_per_part)
        ones = np.ones((1, *self.manifest.row_shape), np.int8)
        return self._scaled(kept, part, slice(offset, offset + 1), ones)[0]

    def _chunk(self, path: str, part: int, dtype: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        """Open a chunk of an array."""
        return self._open(path, part, len(shape), lambda file: _open_chunk(file, dtype, shape, self.codec))

    def _open(self, path: str, part: int, n_axes: int, opened: Callable[[str], Opened]) -> Opened:
        """Open a chunk file, which an object store behind the folder may have to give first."""
        file = self._file(path, part, n_axes)
        for _ in range(_TRIES):
            try:
                return opened(file)
            except FileNotFoundError:  # not fetched yet, or removed in between to make room for another
                remote = remote_of(self.store)
                if remote is None or not remote.chunks.fetch(Path(file)):
                    break
        raise IncompleteStoreError(
            f"part {part} of {path} is not there: {file} is missing; run the recipe again to finish the store"
        )

    def _file(self, path: str, part: int, n_axes: int) -> str:
        return f"{self.store}/{path}/c/{part}{'/0' * (n_axes - 1)}"

    def chunks(self, parts: Iterable[int]) -> Iterator[Chunk]:
        """Yield the chunks of some parts that an object store has; none where the store is on this machine alone."""
        remote = remote_of(self.store)
        if remote is None:
            return
        kept, values = self.manifest.quantisation, math.prod(self.manifest.row_shape)
        itemsize = self.dtype.itemsize if kept is None else 1
        arrays = [(self.manifest.path, self.ndim, self.rows_per_part * values * itemsize)]
        if kept is not None:
            arrays.append((kept.row_scales, 2, 4 * self.rows_per_part * -(-values // kept.block)))
            arrays.append((kept.channel_scales, self.ndim, 4 * values))
        for part in parts:
            for path, n_axes, n_bytes in arrays:
                yield Chunk(remote.chunks, Path(self._file(path, part, n_axes)), n_bytes)

    def read(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Return rows `[start, stop)`; a view of the mapped file where one part holds them all."""
        first, last = start // self.rows_per_part, max(start, stop - 1) // self.rows_per_part
        pieces = []
        for part in range(first, last + 1):
            offset = part * self.rows_per_part
            pieces.append(self._rows_of(part, slice(max(0, start - offset), min(stop - offset, self.rows_per_part))))
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def take(self, indices: npt.ArrayLike) -> npt.NDArray[Any]:
        """Return the rows at `indices`, in that order, repeated where an index is.

        Raises:
            IndexError: An index is not a row of the store.
        """
        wanted = np.asarray(indices)
        if wanted.dtype == np.bool_:
            raise IndexError("give row numbers, not a mask; np.flatnonzero(mask) makes them")
        wanted = wanted.astype(np.int64, casting="same_kind") if wanted.size else wanted.astype(np.int64)
        if wanted.ndim != 1:
            raise IndexError(f"row numbers must be one list, got shape {wanted.shape}")
        if wanted.size and not (wanted.min() >= 0 and wanted.max() < self.n_rows):
            wrong = wanted.min() if wanted.min() < 0 else wanted.max()
            raise IndexError(f"row {wrong} is not one of the {self.n_rows} rows of {self.manifest.path}")
        result = np.empty((len(wanted), *self.manifest.row_shape), self.dtype)
        order = np.argsort(wanted, kind="stable")
        self.gather(wanted[order], result)
        if (order[1:] > order[:-1]).all():
            return result
        unsorted = np.empty_like(result)
        unsorted[order] = result
        return unsorted

    def gather(
        self, rows: npt.NDArray[np.int64], into: npt.NDArray[Any], uncached: UncachedReader | None = None
    ) -> None:
        """Read rows whose numbers ascend into an array of as many rows, part by part.

        Rows that mostly follow one another are read, by `uncached` where there is one; others are copied out of the
        mapped file.
        """
        if not len(rows):
            return
        assert rows[0] >= 0, "rows must be in the store"
        assert rows[-1] < self.n_rows, "rows must be in the store"
        n_runs = 1 + np.count_nonzero(np.diff(rows) != 1)
        if self._is_bare and (n_runs - 1) * _LONG_RUN < len(rows):
            data = into.reshape(-1).view(np.uint8).data
            if uncached is not None:
                self._read_uncached(rows, data, uncached)
                return
            self.announce(rows)  # all of it is under way before the first is waited for
            for part, here in self._pieces(rows):
                with self._open(self.manifest.path, part, self.ndim, FileIO) as file:
                    for offset, where in self._runs(rows, part, here):
                        _read_run(file, offset, data[where])
            return
        for part, here in self._pieces(rows):
            chosen = rows[here] - part * self.rows_per_part
            if self.manifest.quantisation is None:
                np.take(self.part(part), chosen, axis=0, out=into[here], mode="clip")  # other modes copy twice
            else:
                into[here] = self._rows_of(part, chosen)

    def _read_uncached(self, rows: npt.NDArray[np.int64], data: memoryview, reader: UncachedReader) -> None:
        pieces = self._pieces(rows)
        while some := list(islice(pieces, _OPEN_FILES)):
            with ExitStack() as files:
                runs = []
                for part, here in some:
                    file = files.enter_context(self._open(self.manifest.path, part, self.ndim, open_uncached))
                    runs += [(file, offset, data[where]) for offset, where in self._runs(rows, part, here)]
                reader.read(runs)

    def announce(self, rows: npt.NDArray[np.int64]) -> None:
        """Let the operating system begin to read rows whose numbers ascend; only a hint, for bare files."""
        if not hasattr(os, "posix_fadvise"):
            return
        for part, here in self._pieces(rows):
            with self._open(self.manifest.path, part, self.ndim, FileIO) as file:
                for offset, where in self._runs(rows, part, here):
                    stop = offset + where.stop - where.start
                    for start in range(offset, stop, _HINT_BYTES):
                        n_bytes = min(_HINT_BYTES, stop - start)
                        os.posix_fadvise(file.fileno(), start, n_bytes, os.POSIX_FADV_WILLNEED)

    def _pieces(self, rows: npt.NDArray[np.int64]) -> Iterator[tuple[int, slice]]:
        """Yield the parts that rows come from, which ascend, each with where its rows stand among them."""
        first, last = int(rows[0]) // self.rows_per_part, int(rows[-1]) // self.rows_per_part
        bounds = np.searchsorted(rows, np.arange(first, last + 2) * self.rows_per_part).tolist()
        return ((first + n, slice(*bound)) for n, bound in enumerate(pairwise(bounds)) if bound[0] < bound[1])

    def _runs(self, rows: npt.NDArray[np.int64], part: int, here: slice) -> Iterator[tuple[int, slice]]:
        """Yield runs of rows that follow one another in a part: the byte of its file, the bytes among all of `rows`."""
        ends = (np.flatnonzero(np.diff(rows[here]) != 1) + 1 + here.start).tolist()
        for start, stop in pairwise([here.start, *ends, here.stop]):
            offset = (int(rows[start]) - part * self.rows_per_part) * self.row_bytes
            yield offset, slice(start * self.row_bytes, stop * self.row_bytes)

    @property
    def is_mapped(self) -> bool:
        """Whether rows are read from files of this machine that hold them as they are."""
        return self._is_bare and not self.is_far

    @property
    def is_far(self) -> bool:
        """Whether an object store is behind the folder."""
        return remote_of(self.store) is not None

    @property
    def n_parts(self) -> int:
        """Parts, the last of which may be shorter."""
        return -(-self.n_rows // self.rows_per_part)

    @property
    def _is_bare(self) -> bool:
        """Whether chunk files hold the array's own bytes and nothing else."""
        return self.codec == "none" and self.manifest.quantisation is None

    def __getitem__(self, key: Any) -> npt.NDArray[Any]:
        """Index as numpy does: slices and row numbers on the first axis, anything numpy takes on the others."""
        rows, rest = (key[0], key[1:]) if isinstance(key, tuple) else (key, ())
        if rows is Ellipsis:
            rows, rest = slice(None), (Ellipsis, *rest)
        if isinstance(rows, slice):
            start, stop, step = rows.indices(self.n_rows)
            block = self.read(start, max(start, stop)) if step == 1 else self.take(np.arange(start, stop, step))
            return block[(slice(None), *rest)] if rest else block
        if isinstance(rows, int | np.integer):
            return self.take([int(rows)])[(0, *rest)]
        block = self.take(np.asarray(rows))
        return block[(slice(None), *rest)] if rest else block

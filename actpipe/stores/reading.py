"""Read a store: Dask arrays, single rows, whole documents."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from io import FileIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from actpipe.compute.quantising import dequantise
from actpipe.errors import IncompleteStoreError, UnknownHookError, did_you_mean
from actpipe.hooks import BlockShape, ModelShape
from actpipe.planning import count_parts, plan_parts
from actpipe.schemas.manifest import ArrayManifest, Quantisation, StoreManifest
from actpipe.stores.dtypes import numpy_dtype
from actpipe.stores.encoding import Codec, decompress, row_bytes
from actpipe.stores.fidelity import FidelitySummary, read_fidelity
from actpipe.stores.layout import RunFolder
from actpipe.stores.token_table import TokenTable
from actpipe.stores.writing import missing_parts, read_manifest

_OPEN_CHUNKS = 512
_LONG_RUN = 16
"""Rows that follow one another, from which on reading them beats copying them out of a map."""
_UNPACKED_CHUNKS = 8
"""Decompressed chunks that stay in memory, so that neighbouring rows are not unpacked again and again."""


def _open_chunk(path: Path, dtype: str, shape: tuple[int, ...], codec: Codec) -> npt.NDArray[Any]:
    """Open a chunk file: mapped, so that only what is touched is read, or decompressed whole."""
    status = path.stat()
    version = (status.st_ino, status.st_mtime_ns)
    opened = _map_file(path, version) if codec == "none" else _unpack_file(path, codec, version)
    return opened.view(numpy_dtype(dtype)).reshape(shape)


@lru_cache(maxsize=_OPEN_CHUNKS)
def _map_file(path: Path, version: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """Map one version of a file: a chunk that was written anew is mapped anew."""
    del version
    return decompress("none", path)


@lru_cache(maxsize=_UNPACKED_CHUNKS)
def _unpack_file(path: Path, codec: Codec, version: tuple[int, int]) -> npt.NDArray[np.uint8]:
    del version
    return decompress(codec, path)


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
        return _open_chunk(self._file(path, part, len(shape)), dtype, shape, self.codec)

    def _file(self, path: str, part: int, n_axes: int) -> Path:
        file = self.store.joinpath(path, "c", str(part), *("0" for _ in range(n_axes - 1)))
        if not file.is_file():
            raise IncompleteStoreError(
                f"part {part} of {path} is not there: {file} is missing; run the recipe again to finish the store"
            )
        return file

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

    def gather(self, rows: npt.NDArray[np.int64], into: npt.NDArray[Any]) -> None:
        """Read rows whose numbers ascend into an array of as many rows, part by part.

        Rows that mostly follow one another are read, others are copied out of the mapped file.
        """
        if not len(rows):
            return
        assert rows[0] >= 0, "rows must be in the store"
        assert rows[-1] < self.n_rows, "rows must be in the store"
        first, last = int(rows[0]) // self.rows_per_part, int(rows[-1]) // self.rows_per_part
        bounds = np.searchsorted(rows, np.arange(first, last + 2) * self.rows_per_part).tolist()
        pieces = [(first + n, slice(*bound)) for n, bound in enumerate(pairwise(bounds)) if bound[0] < bound[1]]
        runs = np.flatnonzero(np.diff(rows) != 1) + 1
        if self._is_bare and len(runs) * _LONG_RUN < len(rows):
            for reads in (self._announce, self._read_run):  # all of it is under way before the first is waited for
                for part, here in pieces:
                    inside = runs[slice(*np.searchsorted(runs, [here.start + 1, here.stop]))].tolist()
                    path = self._file(self.manifest.path, part, 1 + len(self.manifest.row_shape))
                    with FileIO(path) as file:
                        for start, stop in pairwise([here.start, *inside, here.stop]):
                            reads(file, int(rows[start]) - part * self.rows_per_part, into[start:stop])
            return
        for part, here in pieces:
            chosen = rows[here] - part * self.rows_per_part
            if self.manifest.quantisation is None:
                np.take(self.part(part), chosen, axis=0, out=into[here], mode="clip")  # other modes copy twice
            else:
                into[here] = self._rows_of(part, chosen)

    @property
    def _is_bare(self) -> bool:
        """Whether chunk files hold the array's own bytes and nothing else."""
        return self.codec == "none" and self.manifest.quantisation is None

    def _announce(self, file: FileIO, row: int, into: npt.NDArray[Any]) -> None:
        """Let the operating system begin to read rows of a part; only a hint."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), row * self.row_bytes, into.nbytes, os.POSIX_FADV_WILLNEED)

    def _read_run(self, file: FileIO, row: int, into: npt.NDArray[Any]) -> None:
        """Read rows of a part that follow one another."""
        file.seek(row * self.row_bytes)
        wanted = into.reshape(-1).view(np.uint8).data
        while wanted and (n_read := file.readinto(wanted)):
            wanted = wanted[n_read:]
        if wanted:
            raise IncompleteStoreError(f"{file.name!s} is cut short; `actpipe verify` says what else is")

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


@dataclass(frozen=True)
class StoredDocument:
    """One document: its tokens, its text, and its rows of every array."""

    index: int
    columns: Mapping[str, Any]
    """Its row of documents.parquet."""
    rows: npt.NDArray[np.int64]
    """Row numbers of its tokens, in order; empty where it was left out."""
    store: ActivationStore = field(repr=False)

    @property
    def id(self) -> str:
        """The document's own name in the dataset."""
        return str(self.columns["id"])

    @cached_property
    def input_ids(self) -> npt.NDArray[np.int32]:
        """Its token ids."""
        return self.store.array("tokens/input_ids").take(self.rows)

    @property
    def text(self) -> str:
        """Its tokens as text, decoded with the tokenizer kept in the run folder."""
        return self.store.decode(self.input_ids)

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        """Return the document's rows of one array."""
        return self.store.array(name).take(self.rows)


def is_complete(folder: RunFolder) -> bool:
    """Whether a corpus has a store with every part committed."""
    if not folder.has_store:
        return False
    try:
        manifest = read_manifest(folder)
    except IncompleteStoreError:
        return False
    return not missing_parts(folder, plan_parts(manifest.n_rows, manifest.rows_per_part))


class ActivationStore:
    """An activation store, open for reading.

    `store["blocks.3.hook_resid_post"]` is a Dask array `(n_rows, d_model)`; the names `tokens/input_ids`,
    `tokens/position`, `tokens/sequence` and `metrics/loss` work in the same way.
    """

    def __init__(self, folder: RunFolder, decode: Callable[[RunFolder, npt.NDArray[Any]], str] | None = None) -> None:
        if not folder.has_store:
            raise IncompleteStoreError(f"{folder.root} holds no activation store; it has no store.zarr")
        self.folder = folder
        self.manifest: StoreManifest = read_manifest(folder)
        self._decode = decode
        self._by_name = {array.path: array for array in self.manifest.arrays}
        self._by_name |= {array.path.removeprefix("activations/"): array for array in self.manifest.arrays}

    def require_complete(self) -> None:
        """Refuse to go on where parts are missing.

        Raises:
            IncompleteStoreError: Says how many, and what to do.
        """
        missing = missing_parts(self.folder, plan_parts(self.n_rows, self.manifest.rows_per_part))
        if missing:
            raise IncompleteStoreError(
                f"{self.folder.store} has {self.n_parts - len(missing)} of {self.n_parts} parts; "
                "run its recipe again to finish it, or open it with partial=True and read committed rows only"
            )

    @property
    def shape(self) -> ModelShape:
        """Sizes of the model that it came from."""
        recorded = self.manifest.shape.model_dump()
        blocks = tuple(BlockShape(**block) for block in recorded.pop("blocks"))
        return ModelShape(**recorded, blocks=blocks)

    @property
    def n_rows(self) -> int:
        """Tokens stored."""
        return self.manifest.n_rows

    @property
    def n_parts(self) -> int:
        """Parts that hold them."""
        return count_parts(self.manifest.n_rows, self.manifest.rows_per_part)

    @property
    def hook_names(self) -> tuple[str, ...]:
        """The stored activations, in firing order."""
        prefix = "activations/"
        return tuple(a.path.removeprefix(prefix) for a in self.manifest.arrays if a.path.startswith(prefix))

    @property
    def array_names(self) -> tuple[str, ...]:
        """Every array, by its path in the Zarr group."""
        return tuple(array.path for array in self.manifest.arrays)

    @cached_property
    def fidelity(self) -> dict[str, FidelitySummary]:
        """What quantising did to the values, by array; empty where nothing is quantised."""
        return read_fidelity(self.folder)

    @cached_property
    def tokens(self) -> TokenTable:
        """The token table that the store was made from."""
        return TokenTable(self.folder)

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def __iter__(self) -> Iterator[str]:
        return iter(self.array_names)

    def array(self, name: str) -> StoredArray:
        """Return one array, lazily, with numpy's indexing.

        Raises:
            UnknownHookError: The store has no such array.
        """
        if name not in self._by_name:
            raise UnknownHookError(
                f"{self.folder.store} has no array {name!r} among its {len(self.array_names)}, which "
                f"`actpipe info {self.folder.root}` lists{did_you_mean(name, self._by_name)}"
            )
        manifest = self._by_name[name]
        rows_per_part, codec = self.manifest.rows_per_part, self.manifest.codec
        return StoredArray(self.folder.store.resolve(), manifest, self.n_rows, rows_per_part, codec)

    def __getitem__(self, name: str) -> Any:
        """Return one array as a Dask array whose blocks are the parts, mapped from disk."""
        import dask.array as da
        from dask.tokenize import tokenize

        array = self.array(name)
        chunks = (self.manifest.rows_per_part, *array.manifest.row_shape)
        key = f"{array.manifest.path}-{tokenize(str(array.store), array.manifest.path, array.shape)}"
        return da.from_array(array, chunks=chunks, name=key, asarray=False, fancy=True)

    def rows(self, name: str, indices: npt.ArrayLike) -> npt.NDArray[Any]:
        """Return rows of one array by number, fast and in the order asked for."""
        return self.array(name).take(indices)

    def document(self, index: int) -> StoredDocument:
        """Return one document.

        Raises:
            IndexError: There is no such document.
        """
        columns = self.tokens.read_document(index)
        return StoredDocument(index, columns, self._rows_of(columns), self)

    def _rows_of(self, columns: Mapping[str, Any]) -> npt.NDArray[np.int64]:
        if self.tokens.manifest.layout in ("tl2", "tl3"):
            raise IncompleteStoreError(
                f"{self.folder.root} was tokenized as TransformerLens does, which keeps no track of documents"
            )
        if columns["row_start"] is None:
            return np.empty(0, np.int64)
        rows = np.arange(columns["row_start"], columns["row_stop"], dtype=np.int64)
        table = self.tokens.manifest
        if table.bos_id is not None:
            rows = rows[self.array("tokens/position").take(rows) != 0]
        if table.separator_id is not None and len(rows) > columns["n_tokens"]:
            rows = rows[: columns["n_tokens"]]
        return rows

    def decode(self, ids: npt.NDArray[Any]) -> str:
        """Turn token ids into text with the tokenizer kept in the run folder.

        Raises:
            IncompleteStoreError: The run has no tokenizer.
        """
        if self._decode is None or not self.folder.tokenizer.is_dir():
            raise IncompleteStoreError(f"{self.folder.root} keeps no tokenizer, so ids cannot be turned into text")
        return self._decode(self.folder, ids)

"""What stands behind one array of a store: its Zarr arrays, and how rows become chunk files and rows again."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numcodecs.blosc
import numcodecs.zstd
import numpy as np
import numpy.typing as npt
from zarr.codecs import BloscCodec, ZstdCodec

from actpipe.compute.quantising import channel_scales, dequantise, quantise
from actpipe.errors import DtypeOverflowError
from actpipe.planning import count_parts
from actpipe.schemas.commit import Fidelity
from actpipe.schemas.manifest import ArrayManifest, Quantisation, StoreManifest
from actpipe.stores.dtypes import fill_value, numpy_dtype

Codec = Literal["none", "zstd", "blosc"]
BLOCK = 64
"""Values of a row that share a scale: 1/16 of a byte more for each."""
MOST_BLOSC_BYTES = 2**31 - 17
"""Largest chunk that blosc takes."""
_LEVEL = 3
_SLICE_BYTES = 2**20


@dataclass(frozen=True)
class ZarrArray:
    """One Zarr array; its chunks are the parts."""

    path: str
    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    dtype: str
    axes: tuple[str, ...]
    fill_value: float | int
    attributes: dict[str, Any] = field(default_factory=dict)

    def chunk_path(self, part: int) -> str:
        """Return the path of one part's chunk, relative to the Zarr group."""
        return "/".join([self.path, "c", str(part), *("0" for _ in self.chunk[1:])])


def quantisation_of(path: str, code: Literal["int8", "float8_e4m3"]) -> Quantisation:
    """Say how an array is kept in one byte per value."""
    name = path.removeprefix("activations/")
    return Quantisation(
        code=code, block=BLOCK, row_scales=f"scales/{name}/row", channel_scales=f"scales/{name}/channel"
    )


def zarr_arrays(manifest: StoreManifest, array: ArrayManifest) -> tuple[ZarrArray, ...]:
    """Return the Zarr arrays behind an array: itself, and after it the scales of a quantised one."""
    n_rows, rows_per_part = manifest.n_rows, manifest.rows_per_part
    shape, chunk = (n_rows, *array.row_shape), (rows_per_part, *array.row_shape)
    kept = array.quantisation
    if kept is None:
        fill = fill_value(numpy_dtype(array.dtype))
        return (ZarrArray(array.path, shape, chunk, array.dtype, array.axes, fill),)
    n_blocks = math.ceil(math.prod(array.row_shape) / kept.block)
    parts = (count_parts(n_rows, rows_per_part), *array.row_shape)
    codes = ZarrArray(
        array.path,
        shape,
        chunk,
        "int8" if kept.code == "int8" else "uint8",
        array.axes,
        fill_value=0,
        attributes={"actpipe_quantisation": {**kept.model_dump(mode="json"), "value": _HOW_TO_UNDO}},
    )
    nan = float("nan")
    row_scales = ZarrArray(
        kept.row_scales, (n_rows, n_blocks), (rows_per_part, n_blocks), "float32", ("row", "block"), nan
    )
    channels = ZarrArray(kept.channel_scales, parts, (1, *array.row_shape), "float32", ("part", *array.axes[1:]), nan)
    return codes, row_scales, channels


_HOW_TO_UNDO = (
    "code[row, i] * row_scales[row, i // block] * channel_scales[row // rows_per_chunk, i], where i counts the values "
    "of a row in order and a float8_e4m3 code is the bits of such a float (no infinity, largest 448)"
)


def chunk_paths(manifest: StoreManifest, array: ArrayManifest, part: int) -> tuple[str, ...]:
    """Return the paths of all chunks that hold one part of an array, relative to the Zarr group."""
    return tuple(each.chunk_path(part) for each in zarr_arrays(manifest, array))


def row_bytes(array: ArrayManifest) -> int:
    """Return the bytes of one row on disk, before compression; the scales of whole parts do not count."""
    values = math.prod(array.row_shape)
    if array.quantisation is None:
        return values * numpy_dtype(array.dtype).itemsize
    return values + 4 * math.ceil(values / array.quantisation.block)


def zarr_codec(codec: Codec) -> Any:
    """Return Zarr's own codec of that name, or None."""
    if codec == "zstd":
        return ZstdCodec(level=_LEVEL)
    if codec == "blosc":
        return BloscCodec(cname="zstd", clevel=_LEVEL, shuffle="bitshuffle")
    return None


def compress(codec: Codec, path: Path, dtype: np.dtype[Any]) -> Path:
    """Compress a chunk file into another beside it, and remove the first; the same bytes give the same bytes.

    Args:
        codec: How; `none` leaves the file as it is.
        path: The row-major array.
        dtype: Its element type.
    """
    if codec == "none":
        return path
    data = np.memmap(path, mode="r", dtype=np.uint8)
    packed = numcodecs.zstd.compress(data, _LEVEL) if codec == "zstd" else _blosc(data, dtype.itemsize)
    to = path.with_name(f"{path.name}.packed")
    to.write_bytes(packed)
    path.unlink()
    return to


def _blosc(data: npt.NDArray[np.uint8], itemsize: int) -> bytes:
    """Compress with blosc in this thread alone: its own threads put blocks in the order in which they end."""
    before = numcodecs.blosc.use_threads
    numcodecs.blosc.use_threads = False
    try:
        return bytes(numcodecs.blosc.compress(data, b"zstd", _LEVEL, numcodecs.blosc.BITSHUFFLE, 0, itemsize))
    finally:
        numcodecs.blosc.use_threads = before


def decompress(codec: Codec, path: Path) -> npt.NDArray[np.uint8]:
    """Return the bytes of a chunk that is compressed."""
    raw = np.asarray(np.memmap(path, mode="r", dtype=np.uint8))
    unpacked = numcodecs.zstd.decompress(raw) if codec == "zstd" else numcodecs.blosc.decompress(raw)
    return np.frombuffer(unpacked, np.uint8)


def quantise_file(
    path: Path, array: ArrayManifest, n_rows: int, rows_per_part: int
) -> tuple[tuple[Path, Path, Path], Fidelity]:
    """Turn the float32 rows of one part into codes, row scales and channel scales, a piece at a time.

    Args:
        path: The rows, filled up to `rows_per_part`; removed at the end.
        array: How they are kept.
        n_rows: Rows of this part; those after them are no rows.
        rows_per_part: Rows of a full part.

    Returns:
        The three files, in the order of `zarr_arrays`, and what it did to the values.

    Raises:
        DtypeOverflowError: A value is not finite.
    """
    kept = array.quantisation
    assert kept is not None
    values = math.prod(array.row_shape)
    rows = np.memmap(path, mode="r", dtype=np.float32).reshape(rows_per_part, values)
    sizes = _mean_sizes(rows, n_rows)
    if not np.isfinite(sizes).all():
        raise DtypeOverflowError(
            f"{np.count_nonzero(~np.isfinite(sizes)):,} of {values:,} values per row of {array.path} are not finite "
            f"somewhere, and {kept.code} keeps finite ones only; store it with `dtype: bfloat16`"
        )
    channels = channel_scales(sizes)
    files = tuple(path.with_name(path.name + suffix) for suffix in (".codes", ".row", ".channel"))
    sums = np.zeros(4)
    with files[0].open("wb") as codes_file, files[1].open("wb") as scales_file:
        for start, stop in _slices(n_rows, values):
            codes, scales = quantise(rows[start:stop], channels, kept.block, kept.code)
            codes_file.write(codes.data)
            scales_file.write(scales.data)
            sums += _sums(rows[start:stop], dequantise(codes, scales, channels, kept.block))
        codes_file.truncate(rows_per_part * values)
        scales_file.truncate(rows_per_part * 4 * math.ceil(values / kept.block))
    files[2].write_bytes(channels.tobytes())
    path.unlink()
    squared, squared_stored, product, squared_error = map(float, sums)
    fidelity = Fidelity(squared=squared, squared_stored=squared_stored, product=product, squared_error=squared_error)
    return (files[0], files[1], files[2]), fidelity


def _slices(n_rows: int, values: int) -> Iterator[tuple[int, int]]:
    step = max(1, _SLICE_BYTES // (4 * values))
    return ((start, min(n_rows, start + step)) for start in range(0, n_rows, step))


def _mean_sizes(rows: npt.NDArray[np.float32], n_rows: int) -> npt.NDArray[np.float64]:
    """Return the mean size of every channel, summed in float64 in the order of the rows."""
    total = np.zeros(rows.shape[1])
    for start, stop in _slices(n_rows, rows.shape[1]):
        total += np.abs(rows[start:stop]).sum(axis=0, dtype=np.float64)
    return total / max(1, n_rows)


def _sums(values: npt.NDArray[np.float32], stored: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Return the sums of `Fidelity`, in its order."""
    wide, read = values.astype(np.float64), stored.astype(np.float64)
    pairs = ((wide, wide), (read, read), (wide, read), (wide - read, wide - read))
    return np.array([np.sum(one * other) for one, other in pairs])  # not BLAS: its sums depend on the threads

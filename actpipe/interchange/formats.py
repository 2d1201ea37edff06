"""What a format must be able to do, and which formats there are."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from actpipe.errors import InterchangeError, did_you_mean
from actpipe.schemas.interchange import ExportRecord
from actpipe.stores.dtypes import numpy_dtype

Values = npt.NDArray[Any]
IDS = "tokens/input_ids"
SIDECAR = "actpipe"
"""Folder in an export with what other programs do not read: the record, the token table, the tokenizer."""
BLOCK_BYTES = 64 * 2**20
"""Bytes of rows that are in memory at once, unless one sequence is more."""
_MODULES = {
    "sae_lens": "actpipe.interchange.sae_lens",
    "safetensors": "actpipe.interchange.safetensors_shards",
    "datasets": "actpipe.interchange.token_datasets",
    "npy": "actpipe.interchange.npy",
}


@dataclass(frozen=True)
class Column:
    """One array as a format holds it."""

    dtype: str
    """Element type in the files."""
    row_shape: tuple[int, ...]
    """Shape of what it holds of one token."""

    @property
    def row_bytes(self) -> int:
        """Bytes of one token."""
        return math.prod(self.row_shape) * numpy_dtype(self.dtype).itemsize


class Writer(Protocol):
    """Takes blocks of rows in order."""

    def write(self, rows: Mapping[str, Values]) -> None:
        """Take the next rows of every array, by path."""

    def close(self) -> None:
        """Finish all files."""


class Reader(Protocol):
    """Gives rows of any array."""

    @property
    def n_rows(self) -> int:
        """How many rows there are."""

    @property
    def columns(self) -> Mapping[str, Column]:
        """Arrays by path in a store: `activations/NAME`, `tokens/input_ids`."""

    @property
    def context_length(self) -> int | None:
        """Length of every sequence, where the format says it."""

    def read(self, path: str, start: int, stop: int) -> Values:
        """Return rows `[start, stop)` of an array."""


@dataclass(frozen=True)
class Format:
    """How one format is written and read."""

    open_writer: Callable[[Path, Mapping[str, Column], ExportRecord], Writer]
    open_reader: Callable[[Path], Reader]
    has_bfloat16: bool = False
    whole_sequences: bool = False
    """Whether it holds sequences of one length, and of each the ids and activations only."""


def find_format(name: str) -> Format:
    """Return a format by its name.

    Raises:
        InterchangeError: There is none of this name.
    """
    if name not in _MODULES:
        raise InterchangeError(f"there is no format {name!r}, only {', '.join(_MODULES)}{did_you_mean(name, _MODULES)}")
    found: Format = importlib.import_module(_MODULES[name]).FORMAT
    return found


def cut(start: int, stop: int, *, row_bytes: int, multiple_of: int = 1) -> Iterator[tuple[int, int]]:
    """Cut rows into blocks of at most `BLOCK_BYTES`, each a multiple of so many rows but for the last."""
    step = max(1, BLOCK_BYTES // max(1, row_bytes) // multiple_of) * multiple_of
    for first in range(start, stop, step):
        yield first, min(first + step, stop)


def public_name(path: str) -> str:
    """Return the name under which others find an array: hooks under their own."""
    return path.removeprefix("activations/")


def path_of(name: str) -> str:
    """Return the path in a store of an array that others call `name`."""
    if name in ("token_ids", "input_ids", "tokens"):
        return IDS
    return name if name.startswith(("tokens/", "metrics/")) else f"activations/{name}"


def to_written(values: Values, dtype: str) -> Values:
    """Return values as the files hold them: as they are, widened, or as the bits of bfloat16."""
    if values.dtype.name == "bfloat16" and dtype == "uint16":
        return values.view(np.uint16)
    return values.astype(numpy_dtype(dtype), copy=False)


def from_written(values: Values, dtype: str) -> Values:
    """Undo `to_written`, to the bit."""
    if dtype == "bfloat16" and values.dtype == np.uint16:
        return values.view(numpy_dtype(dtype))
    return values.astype(numpy_dtype(dtype), copy=False)

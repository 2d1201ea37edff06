"""Element types on disk, by the names that the manifest and Zarr use."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from actpipe.stores.bfloat16 import NATIVE as BFLOAT16


def numpy_dtype(name: str) -> np.dtype[Any]:
    """Return numpy's element type for a name such as `float16`, `bfloat16` or `int32`."""
    return BFLOAT16 if name == "bfloat16" else np.dtype(name)


def fill_value(dtype: np.dtype[Any]) -> float | int:
    """Return what a reader sees where no part is committed yet: NaN, or -1 in arrays of integers, False in flags."""
    return {"i": -1, "b": False}.get(dtype.kind, float("nan"))


def as_float32(array: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Widen to float32 for computing; no copy where it is that already."""
    return array.astype(np.float32, copy=False)

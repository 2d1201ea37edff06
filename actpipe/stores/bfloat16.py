"""The Zarr v3 data type `bfloat16`, which zarr-python does not bring: importing this module registers it.

It also stands under the entry point `zarr.data_type`; zarr-python 3.1 collects those but never loads them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
from zarr.core.dtype import data_type_registry
from zarr.dtype import DataTypeValidationError, Float16

NATIVE = np.dtype(ml_dtypes.bfloat16)


@dataclass(frozen=True, kw_only=True)
class BFloat16(Float16):  # type: ignore[misc]
    """Two bytes, little-endian: the upper half of a float32. Zarr v3 only."""

    dtype_cls: ClassVar[Any] = type(NATIVE)
    _zarr_v3_name: ClassVar[Any] = "bfloat16"
    _zarr_v2_names: ClassVar[Any] = ()

    @classmethod
    def from_native_dtype(cls, dtype: Any) -> BFloat16:
        """Return the data type for numpy's `bfloat16`, and refuse others."""
        if dtype != NATIVE:
            raise DataTypeValidationError(f"{dtype} is not bfloat16")
        return cls()

    def to_native_dtype(self) -> Any:
        """Return numpy's `bfloat16`."""
        return NATIVE


data_type_registry.register("bfloat16", BFloat16)

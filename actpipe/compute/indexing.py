"""Indices of a matrix that is kept as two factors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float

Index = Any
"""What stands in square brackets: integers, slices, tensors, `None` and `...`, or a tuple of them."""


def split_index(index: Index, shape: Sequence[int]) -> tuple[tuple[Any, ...], Any, Any]:
    """Return the index of the leading dimensions, of the rows and of the columns.

    Args:
        index: What stood in the brackets.
        shape: Of the matrix, leading dimensions included.

    Raises:
        IndexError: More indices than dimensions, a row or column that there is not, or a new axis after them.
    """
    ndim = len(shape)
    parts = index if isinstance(index, tuple) else (index,)
    length = sum(part is not None and part is not Ellipsis for part in parts)
    if length > ndim:
        raise IndexError(f"{len(parts)} indices are too many for a matrix of {ndim} dimensions")
    if any(part is Ellipsis for part in parts):
        at = next(number for number, part in enumerate(parts) if part is Ellipsis)
        parts = (*parts[:at], *(slice(None),) * (ndim - length), *parts[at + 1 :])
        length = ndim
    n_matrix = max(0, length - (ndim - 2))
    leading, matrix = parts[: len(parts) - n_matrix], parts[len(parts) - n_matrix :]
    row, column = (*matrix, slice(None), slice(None))[:2]
    return leading, _keeping_axis(row, shape[-2]), _keeping_axis(column, shape[-1])


def _keeping_axis(part: Any, length: int) -> Any:
    """Return an integer as a slice of length one; others as they are."""
    if isinstance(part, slice | Sequence | bool) or getattr(part, "ndim", 0) > 0:
        return part
    if part is None:
        raise IndexError("a new axis must stand before those of rows and columns")
    number = int(part)
    if not -length <= number < length:
        raise IndexError(f"index {number} is out of bounds for an axis of length {length}")
    return slice(number, number + 1 or None)


def select_rows(A: Float[torch.Tensor, "..."], leading: tuple[Any, ...], row: Any) -> Float[torch.Tensor, "..."]:
    """Return the left factor's share of an indexed matrix."""
    return A[leading][..., row, :]


def select_columns(B: Float[torch.Tensor, "..."], leading: tuple[Any, ...], column: Any) -> Float[torch.Tensor, "..."]:
    """Return the right factor's share of an indexed matrix."""
    return B[leading][..., column]

"""Detection patterns in files: one matrix in `.npy` or `.safetensors`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from actpipe.compute.patterns import check_matrix
from actpipe.errors import RecipeError


def read_pattern(path: Path, context_length: int, what: str) -> npt.NDArray[np.float64]:
    """Read a detection pattern.

    Args:
        path: A `.npy` file with a matrix, or a `.safetensors` file with one tensor.
        context_length: Tokens of the longest sequence.
        what: What needs it, for errors.

    Returns:
        The matrix `(query_position, key_position)`, in float64.

    Raises:
        RecipeError: It cannot be read, or is no detection pattern.
    """
    try:
        values = _read_npy(path) if path.suffix == ".npy" else _read_safetensors(path)
        matrix = values.astype(np.float64)
        check_matrix(matrix, context_length)
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise RecipeError(f"{what}: cannot take {path} as a detection pattern: {error}") from error
    return matrix


def _read_npy(path: Path) -> npt.NDArray[Any]:
    found: npt.NDArray[Any] = np.load(path, allow_pickle=False)
    return found


def _read_safetensors(path: Path) -> npt.NDArray[Any]:
    if path.suffix != ".safetensors":
        raise ValueError("its name ends neither in .npy nor in .safetensors")
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
        if len(names) != 1:
            raise ValueError(f"it holds {', '.join(names) or 'nothing'}, and a pattern is one tensor")
        found: npt.NDArray[Any] = file.get_tensor(names[0]).double().numpy()
    return found

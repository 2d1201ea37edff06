"""Directions of activations in safetensors files, as `derive: {matrix: ...}` takes them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from actpipe.errors import RecipeError

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Directions:
    """A matrix that rows are multiplied with, one column for each direction."""

    W: Floats
    """`(d_in, direction)`."""
    mean: Floats
    """Subtracted first, `(d_in,)`."""
    b: Floats
    """Added last, `(direction,)`."""
    labels: tuple[str, ...]
    """What the directions are called."""

    def __call__(self, rows: npt.NDArray[np.float32]) -> Floats:
        """Return `(x - mean) W + b`, `(..., direction)`."""
        found: Floats = (rows.astype(np.float64) - self.mean) @ self.W + self.b
        return found


def read_directions(path: Path, what: str) -> Directions:
    """Read a file of directions.

    Args:
        path: A safetensors file with `W (d_in, n)`, and perhaps `mean (d_in,)` and `b (n,)`.
        what: The analysis that needs it, for errors.

    Raises:
        RecipeError: It cannot be read, has no such matrix, or the sizes differ.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            tensors = {name: file.get_tensor(name).double().numpy() for name in names & {"W", "mean", "b"}}
            written = (file.metadata() or {}).get("labels")
    except (OSError, SafetensorError) as error:
        raise RecipeError(f"{what}: cannot read {path} as a safetensors file: {error}") from error
    if "W" not in tensors or tensors["W"].ndim != 2:
        shape = f" of shape {tensors['W'].shape}" if "W" in tensors else ""
        raise RecipeError(
            f"{what}: {path} holds {', '.join(sorted(names)) or 'nothing'}{shape}, and needs a matrix W (d_in, n)"
        )
    W = tensors["W"]
    mean, b = tensors.get("mean", np.zeros(W.shape[0])), tensors.get("b", np.zeros(W.shape[1]))
    if mean.shape != W.shape[:1] or b.shape != W.shape[1:]:
        raise RecipeError(f"{what}: W of {path} is {W.shape}, its mean {mean.shape} and its b {b.shape}")
    labels = tuple(map(str, json.loads(written))) if written else ()
    return Directions(W, mean, b, labels if len(labels) == W.shape[1] else tuple(map(str, range(W.shape[1]))))


def directions_bytes(W: Floats, mean: Floats, b: Floats, labels: Sequence[str]) -> bytes:
    """Return a file of directions, in float32."""
    tensors = {name: np.ascontiguousarray(array, np.float32) for name, array in (("W", W), ("mean", mean), ("b", b))}
    return save(tensors, metadata={"labels": json.dumps(list(labels))})

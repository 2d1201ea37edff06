"""Bring activations to a common size before training on them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

Normalize = Literal["mean_norm", "standardize"] | None
Statistics = dict[str, dict[str, torch.Tensor]]
"""By array: `scale`, and for `standardize` `mean`; float32, of the shape of a row or a single number."""
NORMALIZATIONS = ("mean_norm", "standardize")


def estimate_statistics(kind: Normalize, pieces: Iterable[Mapping[str, torch.Tensor]]) -> Statistics:
    """Estimate what `normalize` needs from a sample of rows, summing in float64.

    `mean_norm`: one `scale` for the array, `sqrt(n) / mean(|x|)`, where `|x|` is the Euclidean norm of a row over
    all its `n` numbers; normalized rows have the norm `sqrt(n)` on average.

    `standardize`: for each of the `n` numbers `mean`, and `scale = 1 / std` with the population's standard
    deviation; a number that never changes has the scale 1.

    Source:
        Conerly et al. (2024), "Update on how we train SAEs", Circuits Updates April 2024: mean norm sqrt(n).
    """
    sums: dict[str, _Sums] = {}
    for piece in pieces:
        for name, rows in piece.items():
            if name not in sums:
                sums[name] = _Sums(rows.shape[1:])
            sums[name].add(rows)
    return {name: _statistics(kind, total) for name, total in sums.items()}


class _Sums:
    """Number of rows, sums of their norms, and sums and sums of squares of what they differ from the first by."""

    def __init__(self, row_shape: torch.Size) -> None:
        self.n_rows, self.norms = 0, 0.0
        self.first = torch.zeros(row_shape, dtype=torch.float64)
        self.values = torch.zeros(row_shape, dtype=torch.float64)
        self.squares = torch.zeros(row_shape, dtype=torch.float64)

    def add(self, rows: torch.Tensor) -> None:
        """Take more rows."""
        rows = rows.to("cpu", torch.float64)
        if not self.n_rows:
            self.first = rows[0].clone()
        self.n_rows += len(rows)
        self.norms += float(rows.reshape(len(rows), -1).norm(dim=1).sum())
        rows = rows - self.first
        self.values += rows.sum(0)
        self.squares += rows.square().sum(0)


def _statistics(kind: Normalize, total: _Sums) -> dict[str, torch.Tensor]:
    if kind == "mean_norm":
        mean_norm = total.norms / total.n_rows
        if not (math.isfinite(mean_norm) and mean_norm > 0):
            raise ValueError(f"the mean norm of {total.n_rows} sampled rows is {mean_norm}; they cannot be normalized")
        return {"scale": torch.tensor(math.sqrt(total.first.numel()) / mean_norm, dtype=torch.float32)}
    mean = total.values / total.n_rows
    variance = total.squares / total.n_rows - mean.square()
    constant = variance <= 1e-12 * total.squares / total.n_rows
    scale = torch.where(constant, 1.0, variance.clamp_min(0).rsqrt())
    return {"mean": (total.first + mean).float(), "scale": scale.float()}


@dataclass(frozen=True)
class Normalizer:
    """Applies statistics: `(x - mean) * scale`, in float32."""

    statistics: Statistics

    def normalize_(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Return rows `(row, ...)` of an array normalized, float32 in place; as they are without statistics."""
        if name not in self.statistics:
            return rows
        known = {key: value.to(rows.device) for key, value in self.statistics[name].items()}
        rows = rows.float()
        if "mean" in known:
            rows -= known["mean"]
        return rows.mul_(known["scale"])

    def denormalize(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Return what `normalize_` made these rows of, in float32."""
        if name not in self.statistics:
            return rows
        known = {key: value.to(rows.device) for key, value in self.statistics[name].items()}
        rows = rows.float() / known["scale"]
        return rows + known["mean"] if "mean" in known else rows

"""Directions that tell classes apart, or along which rows vary most, from sums over rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int


@dataclass(frozen=True)
class ClassSums:
    """Rows of each class, and their sums in float64; they add up."""

    count: Int[np.ndarray, " class"]
    total: Float[np.ndarray, "class channel"]

    def __add__(self, other: ClassSums) -> ClassSums:
        return ClassSums(self.count + other.count, self.total + other.total)


def sum_classes(rows: Float[np.ndarray, "row channel"], number: Int[np.ndarray, " row"], n_classes: int) -> ClassSums:
    """Sum rows by class."""
    member = (number[:, None] == np.arange(n_classes)).astype(np.float64)
    return ClassSums(member.sum(0).astype(np.int64), member.T @ rows.astype(np.float64))


def mean_differences(sums: ClassSums) -> Float[np.ndarray, "class channel"]:
    """Return, for each class, the mean of its rows less the mean of all others, in the units of the activation.

    Source:
        Marks and Tegmark (2023), "The Geometry of Truth": mass-mean directions.
    """
    own = sums.total / sums.count[:, None]
    others = (sums.total.sum(0) - sums.total) / (sums.count.sum() - sums.count)[:, None]
    return own - others


def principal_axes(
    covariance: Float[np.ndarray, "channel channel"], n_axes: int
) -> tuple[Float[np.ndarray, "channel axis"], Float[np.ndarray, " axis"]]:
    """Return the axes of largest variance, of length 1, and their shares of all variance.

    The sign is that which makes the entry of largest modulus positive.
    """
    variances, axes = np.linalg.eigh(covariance)
    axes = axes[:, ::-1][:, :n_axes]
    largest = np.take_along_axis(axes, np.abs(axes).argmax(0)[None], 0)
    shares = np.maximum(variances[::-1][:n_axes], 0.0) / max(float(np.maximum(variances, 0.0).sum()), 1e-300)
    return axes * np.where(largest < 0, -1.0, 1.0), shares


def unit_columns(W: Float[np.ndarray, "channel direction"]) -> Float[np.ndarray, "channel direction"]:
    """Return columns scaled to length 1; those of zeros stay so."""
    length = np.linalg.norm(W, axis=0)
    return W / np.where(length > 0, length, 1.0)


def cosines(
    one: Float[np.ndarray, "channel direction"], other: Float[np.ndarray, "channel direction"]
) -> Float[np.ndarray, " direction"]:
    """Return the cosine of each direction with its counterpart; NaN where one of them is zero."""
    found: Float[np.ndarray, " direction"] = (unit_columns(one) * unit_columns(other)).sum(0)
    empty = ~(one.any(0) & other.any(0))
    return np.where(empty, np.nan, found)

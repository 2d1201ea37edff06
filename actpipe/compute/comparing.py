"""How far two versions of the same activations are apart, row by row."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

MEASURES = ("relative_error", "cosine")


def compare_rows(
    ours: Float[np.ndarray, "row channel"], theirs: Float[np.ndarray, "row channel"]
) -> Float[np.ndarray, "row 4"]:
    """Compare each row with its counterpart, over the channels in which both are finite.

    Returns:
        Per row, in float64: the relative error `|ours - theirs| / |theirs|`, the cosine, the squared error, and
        the squared length of `theirs`. NaN where a length that is divided by is zero.
    """
    finite = np.isfinite(ours) & np.isfinite(theirs)
    if not finite.all():
        ours, theirs = np.where(finite, ours, 0.0), np.where(finite, theirs, 0.0)

    def dot(
        one: Float[np.ndarray, "row channel"], other: Float[np.ndarray, "row channel"]
    ) -> Float[np.ndarray, " row"]:
        return np.einsum("rc,rc->r", one, other, dtype=np.float64)

    gap = ours - theirs
    error, own, length = dot(gap, gap), dot(ours, ours), dot(theirs, theirs)
    with np.errstate(invalid="ignore", divide="ignore"):
        relative = np.where(length > 0, np.sqrt(error / length), np.nan)
        cosine = np.where((own > 0) & (length > 0), dot(ours, theirs) / np.sqrt(own * length), np.nan)
    return np.stack([relative, np.clip(cosine, -1.0, 1.0), error, length], axis=-1)

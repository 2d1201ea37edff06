"""What quantising did to the values of a store, by array."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

from actpipe.stores.layout import RunFolder
from actpipe.stores.writing import read_commit


@dataclass(frozen=True)
class FidelitySummary:
    """How close what is read is to what the model gave."""

    relative_error: float
    """Root mean square of the difference over that of the values."""
    cosine: float
    """Cosine similarity of all values with what is read back."""


def read_fidelity(folder: RunFolder) -> dict[str, FidelitySummary]:
    """Add up the commit records of a store: one entry per quantised array, none where nothing is quantised."""
    sums: defaultdict[str, list[float]] = defaultdict(lambda: [0.0] * 4)
    for path in sorted(folder.commits.glob("part-*.json")):
        for array, part in read_commit(path).fidelity.items():
            values = (part.squared, part.squared_stored, part.product, part.squared_error)
            sums[array] = [total + value for total, value in zip(sums[array], values, strict=True)]
    return {array: _summary(*total) for array, total in sums.items()}


def _summary(squared: float, squared_stored: float, product: float, squared_error: float) -> FidelitySummary:
    if squared == 0:
        return FidelitySummary(relative_error=0.0, cosine=1.0)
    size = math.sqrt(squared) * math.sqrt(squared_stored)
    return FidelitySummary(math.sqrt(squared_error / squared), product / size if size else 0.0)

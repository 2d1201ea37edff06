"""Run some sequences of a finished store through the model again, and compare with what is stored."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from actpipe.extraction.deriving import Derivation
from actpipe.extraction.worker import ExtractionWorker
from actpipe.models.hooked_model import HookedModel
from actpipe.records import Part
from actpipe.schemas.manifest import ArrayManifest
from actpipe.schemas.recipe import ExtractActivationsConfig
from actpipe.stores.arrays import StoredArray
from actpipe.stores.dtypes import numpy_dtype
from actpipe.stores.reading import ActivationStore
from actpipe.telemetry import Meter

_TOLERANCES = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 6e-2}
"""Largest difference that is rounding, as a share of the row's root mean square plus the value's own size.

A sequence is run alone here and ran in a batch there, so that sums were taken in another order;
each type is given eight to sixteen times its own rounding, float32 what many layers add up to.
"""
_CHANCE = 0.05
"""Share of an array of integers, or of right and wrong, that rounding may turn over in a half-precision model."""


@dataclass
class Difference:
    """How far one array is from what the model gives now."""

    array: str
    n_values: int = 0
    n_wrong: int = 0
    """Values that differ by more than rounding, or are not both finite."""
    largest: float = 0.0
    """Largest absolute difference of two finite values."""
    largest_share: float = 0.0
    """Largest difference as a share of what rounding may do there; above 1 is wrong. 0 for integers."""
    chance: float = 0.0
    """Share of the values that may be wrong."""

    @property
    def holds(self) -> bool:
        """Whether all that differs is rounding."""
        return self.n_wrong <= self.chance * self.n_values


def recheck(
    store: ActivationStore,
    model: HookedModel,
    config: ExtractActivationsConfig,
    sequences: Sequence[Part],
    meter: Meter,
    derivations: Iterable[Derivation] = (),
) -> list[Difference]:
    """Compare stored rows with fresh ones.

    Args:
        store: A store; the parts that hold the rows must be committed.
        model: The model that it was made from.
        config: The settings that it was made with.
        sequences: The rows of each sequence to run.
        meter: Told of every row.
        derivations: Those of the store.

    Returns:
        One entry per array, in the order of the store.
    """
    computed_in = store.manifest.model.dtype
    differences = {a.path: Difference(a.path, chance=_chance_of(a, computed_in)) for a in store.manifest.arrays}

    def open_part(_: Part) -> _Comparison:
        return _Comparison(store, differences, _TOLERANCES[computed_in])

    with ExtractionWorker.open(config, model, store.folder, store.manifest, meter, open_part, derivations) as worker:
        for rows in sequences:
            worker(rows)
    return list(differences.values())


def _chance_of(array: ArrayManifest, computed_in: str) -> float:
    """Return the share of an array that rounding may turn over: of what is one thing or another, but no input."""
    discrete = numpy_dtype(array.dtype).kind == "i" or array.path == "metrics/correct"
    return _CHANCE if discrete and computed_in != "float32" and not array.path.startswith("tokens/") else 0.0


@dataclass(frozen=True, eq=False)
class _Comparison:
    """Takes rows as a part's writer does, and compares them with those that are stored."""

    store: ActivationStore
    differences: dict[str, Difference]
    tolerance: float
    """That of the type in which the model computes."""
    _marked: dict[str, Difference] = field(default_factory=dict)

    def write(self, array: str, first_row: int, rows: npt.NDArray[Any]) -> int:
        """Compare consecutive rows of one array."""
        stored = self.store.array(array)
        fresh = np.ascontiguousarray(rows).view(numpy_dtype(stored.manifest.dtype)).reshape(len(rows), -1)
        _compare(stored, first_row, fresh, self.differences[array], self.tolerance)
        return rows.nbytes

    def count_clipped(self, array: str, count: int) -> None:
        """Clipped values are compared as they are stored."""

    def mark(self) -> None:
        """Note what was found until now."""
        self._marked.update({name: replace(found) for name, found in self.differences.items()})

    def undo(self) -> None:
        """Forget what was found since."""
        self.differences.update({name: replace(found) for name, found in self._marked.items()})

    def commit(self) -> None:
        """Nothing is left to do."""

    def abandon(self) -> None:
        """Nothing is left to do."""


def _compare(array: StoredArray, first_row: int, fresh: npt.NDArray[Any], found: Difference, tolerance: float) -> None:
    stored = array.read(first_row, first_row + len(fresh)).reshape(len(fresh), -1).astype(np.float64)
    given = fresh.astype(np.float64)
    finite = np.isfinite(stored) & np.isfinite(given)
    gap = np.abs(np.subtract(stored, given, out=np.zeros_like(stored), where=finite))
    allowed = np.zeros_like(stored)
    if array.dtype.kind != "i":
        tolerance = max(tolerance, _TOLERANCES[array.manifest.dtype])
        size = np.where(finite, np.abs(stored), 0.0)
        alone = size.shape[1] == 1  # one number per token: its scale is that of the sequence
        allowed = tolerance * (size + np.sqrt(np.mean(size**2, axis=None if alone else 1, keepdims=True)))
    allowed += _room_of_codes(array, first_row, stored)
    wrong = np.where(finite, gap > allowed, ~((stored == given) | (np.isnan(stored) & np.isnan(given))))
    found.n_values += stored.size
    found.n_wrong += int(wrong.sum())
    found.largest = max(found.largest, float(gap.max(initial=0.0)))
    share = np.divide(gap, allowed, out=np.zeros_like(gap), where=allowed > 0)
    found.largest_share = max(found.largest_share, float(share.max(initial=0.0)))


def _room_of_codes(array: StoredArray, first_row: int, stored: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return how far a value may lie from what its code gives: a step of int8, an eighth of a float8."""
    room = np.zeros_like(stored)
    kept = array.manifest.quantisation
    for row in range(len(stored) if kept is not None else 0):
        step = array.step(first_row + row)
        assert step is not None
        room[row] = step.reshape(-1)
    if kept is not None and kept.code == "float8_e4m3":
        room = room * 2.0**-9 + np.abs(stored) / 8
    return room

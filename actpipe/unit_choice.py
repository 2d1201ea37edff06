"""Which units of stored activations an analysis means, and what they are called."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np
import numpy.typing as npt

from actpipe.activation_choice import Choice
from actpipe.errors import RecipeError
from actpipe.jobs.units import Units, count_latents
from actpipe.schemas.choosing import expand_ranges
from actpipe.stores.directions import Directions
from actpipe.stores.reading import ActivationStore

_VECTORS = ("d_head", "d_qk", "d_model")
"""Axes that are spaces: where others stand before them, a unit is the norm along them."""
_CALLED = {"d_mlp": "neuron", "d_model": "channel", "d_head": "channel", "d_qk": "channel", "kv_head": "kv head"}
_MOST_EXAMPLES = 2_000_000


@dataclass(frozen=True)
class UnitChoice:
    """Some units of one activation."""

    units: Units
    numbers: npt.NDArray[np.int64]
    """Which of them, in ascending order, counted through all their axes."""
    labels: tuple[str, ...]
    """What they are called: `neuron 12`, `head 3`."""

    @property
    def only_active(self) -> bool:
        """Whether a value of zero says that the unit is not active."""
        return self.units.n_latents is not None or self.units.axes[-1:] == ("latent",)


def plan_units(choice: Choice, directions: Directions | None) -> Units:
    """Say what the units of an activation are.

    Raises:
        RecipeError: The directions are of another size, or a SAE's largest latents are stored for several axes.
    """
    if choice.sparse:
        if directions is not None or len(choice.row_shape) != 1:
            raise RecipeError(
                f"top_examples: {choice.name} holds the largest latents only, of which units are the latents of one "
                "encoder for the row; leave out `directions`, or store all latents"
            )
        return Units(choice.name, choice.row_shape, ("latent",), n_latents=0)
    if directions is None:
        norms = len(choice.row_shape) > 1 and choice.axes[-1] in _VECTORS
        return Units(choice.name, choice.row_shape, choice.axes, norms=norms)
    d_in = len(directions.W)
    if d_in not in (choice.row_shape[-1], choice.row_size):
        raise RecipeError(
            f"top_examples: {choice.name} has rows {choice.row_shape}, and the directions take {d_in} values; name the "
            "activation that they were made for"
        )
    return Units(choice.name, choice.row_shape, choice.axes, directions)


def choose_units(
    units: Units,
    wanted: Sequence[int | str] | None,
    store: ActivationStore | None = None,
    *,
    block_bytes: int = 2**20,
) -> UnitChoice:
    """Return the units that a list with ranges names, or all.

    Args:
        units: What there is.
        wanted: Numbers and ranges, ends included.
        store: To count the latents in, where only the largest of each row are stored.
        block_bytes: Memory of a block of it, in bytes.

    Raises:
        RecipeError: There is no such unit.
    """
    numbers = None if wanted is None else _numbers(wanted)
    if units.n_latents == 0 and store is not None:
        n_latents = max(1, count_latents(store, units.name, block_bytes=block_bytes))
        units = replace(units, n_latents=max(n_latents, 0 if numbers is None else int(numbers.max()) + 1))
    n_units = prod(units.shape)
    if numbers is None:
        numbers = np.arange(n_units)
    elif units.n_latents is None and numbers.max() >= n_units:
        raise RecipeError(f"top_examples: {units.name} has {n_units} units, numbered from 0; got {list(wanted or ())}")
    return UnitChoice(units, numbers, _labels(units, numbers))


def _numbers(wanted: Sequence[int | str]) -> npt.NDArray[np.int64]:
    numbers = set(expand_ranges(wanted))
    if not numbers:
        raise RecipeError(
            f"top_examples: `units` {list(wanted)} names none; write ranges from the smaller to the larger"
        )
    return np.array(sorted(numbers), np.int64)


def _labels(units: Units, numbers: npt.NDArray[np.int64]) -> tuple[str, ...]:
    shape, axes = units.shape, units.unit_axes
    places = np.unravel_index(numbers, shape) if prod(shape) else ()
    names = []
    for place in zip(*places, strict=True):
        parts = [f"{_CALLED.get(axis, axis)} {number}" for axis, number in zip(axes, place, strict=True)]
        if units.directions is not None:
            parts[-1] = units.directions.labels[place[-1]]
        names.append(", ".join(parts))
    return tuple(names)


def refuse_too_many(chosen: Sequence[UnitChoice], examples: int) -> None:
    """Refuse a table that no one could read, or hold.

    Raises:
        RecipeError: Says how many lines it would have.
    """
    n_lines = sum(len(one.numbers) for one in chosen) * examples
    if n_lines > _MOST_EXAMPLES:
        raise RecipeError(
            f"top_examples would list {n_lines:,} examples, at most {_MOST_EXAMPLES:,} are; choose `units`, or fewer "
            "`examples`"
        )

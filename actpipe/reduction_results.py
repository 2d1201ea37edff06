"""Statistics of activations as labelled arrays, channels laid out as in the activation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import xarray as xr

from actpipe.compute.accumulators import Arrays, Histogram
from actpipe.compute.heads import MEASURES
from actpipe.extraction.reducing import Reduced
from actpipe.stores.results import labels

_AXES: dict[str, tuple[str, ...]] = {
    "count": (),
    "covariance": ("channel", "other_channel"),
    "bin_edge": ("edge",),
    "bin_count": ("bin",),
    "quantile": ("level",),
    "token": ("token",),
    "token_count": ("token",),
    "position": ("position",),
    "position_count": ("position",),
}
_LEADING = {"top_": "rank", "mean_by_token": "token", "mean_by_position": "position"}
"""Axis before those of the activation, by how the statistic's name begins."""


def called(array: str) -> str:
    """Return what a stored array is called among the results: itself, or `HOOK.NAME` for `derived/NAME/HOOK`."""
    if not array.startswith("derived/"):
        return array
    _, name, hook = array.split("/", 2)
    return f"{hook}.{name}"


def reduction_dataset(arrays: Mapping[str, Arrays], reduced: Iterable[Reduced]) -> xr.Dataset:
    """Return the statistics of each activation as `HOOK.STATISTIC`, with the names of their axes.

    Args:
        arrays: Statistics over flat channels, by activation; see `actpipe.compute.accumulators`.
        reduced: What the activations are, in the order of the dataset.
    """
    variables: dict[str, tuple[tuple[str, ...], np.ndarray]] = {}
    for one in reduced:
        for name, values in arrays.get(one.name, {}).items():
            variables[f"{one.name}.{name}"] = _labelled(name, values, one)
    dataset = xr.Dataset(_with_sizes(variables))
    known = {"measure": labels(list(MEASURES)), "level": np.array(Histogram().levels)}
    return dataset.assign_coords({axis: values for axis, values in known.items() if axis in dataset.dims})


def _labelled(name: str, values: np.ndarray, reduced: Reduced) -> tuple[tuple[str, ...], np.ndarray]:
    """Return a statistic with the names of its axes, channels laid out as in the activation."""
    if name in _AXES:
        return _AXES[name], values
    if name.startswith("score_"):
        return ("head", "measure"), values
    leading = next((axis for start, axis in _LEADING.items() if name.startswith(start)), None)
    if leading is not None:
        return (leading, *reduced.axes), values.reshape(-1, *reduced.shape)
    return reduced.axes, values.reshape(reduced.shape)


def _with_sizes(
    variables: dict[str, tuple[tuple[str, ...], np.ndarray]],
) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
    """Return them with the size in the name of an axis that another variable has with another size."""
    sizes: dict[str, int] = {}
    named = {}
    for name, (axes, values) in variables.items():
        dims = [
            axis if sizes.setdefault(axis, size) == size else f"{axis}_{size}"
            for axis, size in zip(axes, values.shape, strict=True)
        ]
        named[name] = (tuple(dims), values)
    return named

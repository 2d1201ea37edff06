"""Directions and probes as files, tables and labelled arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
import xarray as xr

from actpipe.compute.directions import cosines, mean_differences, principal_axes, unit_columns
from actpipe.compute.probing import Fit
from actpipe.jobs.directions import Judged, TrainingSums
from actpipe.jobs.labels import ClassLabels
from actpipe.stores.directions import directions_bytes
from actpipe.stores.results import labels

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class DirectionsOf:
    """The directions of one activation."""

    name: str
    mean: Floats
    """Mean of the rows that fits saw, `(channel,)`."""
    differences: Floats
    """Of the means of each class and all others, `(channel, class)`."""
    probe: Floats
    """Weights for rows as they are, less the mean, `(channel, class)`."""
    intercepts: Floats
    axes: Floats
    """Principal axes, `(channel, component)`."""
    shares: Floats
    """Of variance, along each."""


@dataclass(frozen=True)
class Found:
    """Everything of one activation."""

    directions: DirectionsOf
    fit: Fit
    judged: Judged
    control: Judged | None


def directions_of(name: str, sums: TrainingSums, fit: Fit, n_components: int) -> DirectionsOf:
    """Return the directions that sums and a fit give."""
    axes, shares = principal_axes(sums.moments.covariance, n_components)
    return DirectionsOf(
        name=name,
        mean=sums.moments.mean,
        differences=mean_differences(sums.by_class).T,
        probe=fit.weights[:-1] / sums.scale[:, None],
        intercepts=fit.weights[-1],
        axes=axes,
        shares=shares,
    )


def direction_files(found: Sequence[Found], of: ClassLabels) -> dict[str, bytes]:
    """Return `HOOK.METHOD.safetensors` for each activation and method, as `derive: {matrix: ...}` takes them.

    Of two classes there is one direction, towards the second; the probe's then gives its log odds, of more classes it
    gives logits. Mean differences have length 1.
    """
    files = {}
    for one in found:
        these = one.directions
        named, stem = list(of.classes), these.name.replace("/", "_")
        W, b, differences = these.probe, these.intercepts, unit_columns(these.differences)
        if len(named) == 2:
            named, W, b = named[1:], W[:, 1:] - W[:, :1], b[1:] - b[:1]
            differences = differences[:, 1:]
        files[f"{stem}.probe.safetensors"] = directions_bytes(W, these.mean, b, named)
        files[f"{stem}.mean_difference.safetensors"] = directions_bytes(
            differences, these.mean, np.zeros(len(named)), named
        )
        if these.axes.shape[1]:
            components = [f"component {number}" for number in range(these.axes.shape[1])]
            files[f"{stem}.pca.safetensors"] = directions_bytes(
                these.axes, these.mean, np.zeros(len(components)), components
            )
    return files


def results_table(found: Sequence[Found], of: ClassLabels) -> pd.DataFrame:
    """Return one line for each activation."""
    n_held_out = of.count_samples(held_out=True)
    lines = []
    for one in found:
        judged, control = one.judged, one.control
        lines.append(
            {
                "hook": one.directions.name,
                "n_train": int(of.count_samples(held_out=False).sum()),
                "n_validation": int(n_held_out.sum()),
                "accuracy": judged.probe.accuracy,
                "balanced_accuracy": judged.probe.balanced_accuracy,
                "majority": float(n_held_out.max() / n_held_out.sum()),
                "auc": float(judged.odds.auc.mean()),
                "loss": judged.probe.loss / int(n_held_out.sum()),
                "calibration_error": judged.probe.error,
                "mean_difference_auc": float(judged.projections.auc.mean()),
                "control_accuracy": float("nan") if control is None else control.probe.accuracy,
                "control_balanced_accuracy": float("nan") if control is None else control.probe.balanced_accuracy,
                "control_auc": float("nan") if control is None else float(control.odds.auc.mean()),
                "iterations": one.fit.n_iterations,
                "slope": one.fit.slope,
            }
        )
    return pd.DataFrame(lines)


def results_dataset(found: Sequence[Found], of: ClassLabels) -> xr.Dataset:
    """Return the arrays: by class, by bin of confidence, and how alike directions of two activations are."""
    probes = [one.judged.probe for one in found]
    counts = np.stack([probe.count for probe in probes])
    with np.errstate(invalid="ignore", divide="ignore"):
        right, sure = (
            np.stack([getattr(probe, name) for probe in probes]) / counts for name in ("correct", "confidence")
        )
    names = labels([one.directions.name for one in found])
    arrays: dict[str, tuple[tuple[str, ...], np.ndarray]] = {
        "auc": (("hook", "class"), np.stack([one.judged.odds.auc for one in found])),
        "mean_difference_auc": (("hook", "class"), np.stack([one.judged.projections.auc for one in found])),
        "n_train": (("class",), of.count_samples(held_out=False)),
        "n_validation": (("class",), of.count_samples(held_out=True)),
        "bin_count": (("hook", "bin"), counts.astype(np.int64)),
        "bin_confidence": (("hook", "bin"), sure),
        "bin_accuracy": (("hook", "bin"), right),
    }
    for method, parts, axis in (
        ("mean_difference", [one.directions.differences for one in found], "class"),
        ("probe", [one.directions.probe for one in found], "class"),
        ("pca", [one.directions.axes for one in found], "component"),
    ):
        if parts[0].shape[1]:
            arrays[f"cosine_{method}"] = ((axis, "hook", "other_hook"), _alike(parts))
    if "cosine_pca" in arrays:
        arrays["explained"] = (("hook", "component"), _padded([one.directions.shares for one in found]))
        arrays["cosine_pca"] = (arrays["cosine_pca"][0], np.abs(arrays["cosine_pca"][1]))
    return xr.Dataset(arrays, coords={"hook": names, "other_hook": names, "class": labels(list(of.classes))})


def _alike(parts: Sequence[Floats]) -> Floats:
    """Return the cosines of directions of every two activations; NaN where these are of different widths."""
    n_directions = max(part.shape[1] for part in parts)
    found = np.full((n_directions, len(parts), len(parts)), np.nan)
    for i, one in enumerate(parts):
        for j, other in enumerate(parts):
            if one.shape == other.shape:
                found[: one.shape[1], i, j] = cosines(one, other)
    return found


def _padded(rows: Sequence[Floats]) -> Floats:
    width = max(map(len, rows))
    return np.stack([np.pad(row, (0, width - len(row)), constant_values=np.nan) for row in rows])

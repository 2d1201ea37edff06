"""Directions of a label, and probes, over a store: each sum is a pass that holds a few blocks at a time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from actpipe.compute.directions import ClassSums, sum_classes
from actpipe.compute.geometry import CrossMoments, cross_moments
from actpipe.compute.probing import (
    Fit,
    LossSums,
    Reliability,
    ScoreCounts,
    bound_of_hessian,
    class_scores,
    count_scores,
    log_softmax,
    logits_of,
    minimize,
    penalized,
    reliability,
    softmax_loss,
)
from actpipe.jobs.blocks import Done, RowBlock, even_blocks, map_and_sum
from actpipe.jobs.geometry import flat_rows
from actpipe.jobs.labels import ClassLabels, Numbers
from actpipe.stores.reading import ActivationStore

Floats = npt.NDArray[np.float64]
_ROOM = 5
"""A row takes the room of so many copies in float32: as it is, and twice in float64."""


@dataclass(frozen=True)
class TrainingSums:
    """What is known of the rows that fits may see."""

    moments: CrossMoments
    by_class: ClassSums

    def __add__(self, other: TrainingSums) -> TrainingSums:
        return TrainingSums(self.moments + other.moments, self.by_class + other.by_class)

    @property
    def scale(self) -> Floats:
        """Standard deviation of each channel; 1 for channels that do not vary."""
        deviation: Floats = np.sqrt(np.diag(self.moments.covariance))
        return np.where(deviation > 1e-12 * max(float(deviation.max(initial=0.0)), 1e-300), deviation, 1.0)


@dataclass(frozen=True)
class Judged:
    """How well predictions and projections of held-out rows do."""

    probe: Reliability
    odds: ScoreCounts
    """Log odds of each class."""
    projections: ScoreCounts
    """Of each other direction, a class's own."""

    def __add__(self, other: Judged) -> Judged:
        return Judged(self.probe + other.probe, self.odds + other.odds, self.projections + other.projections)


@dataclass(frozen=True)
class Rows:
    """The labelled rows of one activation, a block at a time."""

    store: ActivationStore
    name: str
    labels: ClassLabels
    block_bytes: int
    done: Done = lambda _: None

    def blocks(self) -> list[RowBlock]:
        """Return the blocks of rows."""
        return even_blocks(self.store, [self.name] * _ROOM, self.block_bytes)

    def read(self, block: RowBlock, *, held_out: bool) -> tuple[npt.NDArray[np.float32], Numbers]:
        """Return labelled rows of one side, and their classes."""
        wanted, number = self.labels.rows_of(block, held_out=held_out)
        if not len(wanted):
            return np.empty((0, self.width), np.float32), number
        return flat_rows(block, self.name)[wanted], number

    @property
    def width(self) -> int:
        """Values of a row."""
        return int(np.prod(self.store.array(self.name).manifest.row_shape, dtype=np.int64))


def sum_training(rows: Rows) -> TrainingSums:
    """Sum the moments of the rows that fits may see, and the rows of each class."""

    def summed(block: RowBlock) -> TrainingSums:
        values, number = rows.read(block, held_out=False)
        return TrainingSums(cross_moments(values), sum_classes(values, number, len(rows.labels.classes)))

    return map_and_sum(summed, rows.blocks(), rows.done, fan_in=2)


def fit_probe(rows: Rows, sums: TrainingSums, *, penalty: float, tolerance: float, max_iterations: int) -> Fit:
    """Fit a softmax regression on standardized rows; one pass over the store for each evaluation.

    Returns:
        Weights for standardized rows, the intercepts last, `(channel + 1, class)`.
    """
    mean, scale = sums.moments.mean, sums.scale

    def evaluate(weights: Floats) -> tuple[float, Floats]:
        def summed(block: RowBlock) -> LossSums:
            values, number = rows.read(block, held_out=False)
            return softmax_loss((values - mean) / scale, number, weights)

        return penalized(map_and_sum(summed, rows.blocks(), rows.done), weights, penalty)

    correlation = sums.moments.covariance / np.outer(scale, scale)
    start = np.zeros((rows.width + 1, len(rows.labels.classes)))
    return minimize(
        evaluate, start, bound_of_hessian(correlation, penalty), tolerance=tolerance, max_iterations=max_iterations
    )


def judge(rows: Rows, sums: TrainingSums, weights: Floats, directions: Floats, n_bins: int) -> Judged:
    """Say how well a probe, and each class's direction, do on held-out rows.

    Args:
        rows: The labelled rows.
        sums: Of the rows that the fit saw.
        weights: The probe's, for standardized rows.
        directions: One for each class, `(channel, class)`.
        n_bins: Bins of confidence.
    """
    mean, scale = sums.moments.mean, sums.scale
    covariance = sums.moments.covariance
    deviation = np.sqrt(np.maximum(np.einsum("cd,ce,ed->d", directions, covariance, directions), 0.0))
    ruler = directions / np.where(deviation > 0, deviation, 1.0)

    def judged(block: RowBlock) -> Judged:
        values, number = rows.read(block, held_out=True)
        centred = values - mean
        logs = log_softmax(logits_of(centred / scale, weights))
        own = number[:, None] == np.arange(weights.shape[1])
        return Judged(
            reliability(logs, number, n_bins),
            count_scores(class_scores(logs), own),
            count_scores(centred @ ruler, own),
        )

    return map_and_sum(judged, rows.blocks(), rows.done, fan_in=2)

"""Directions of a label, and probes, over a store: each sum is a pass that holds a few blocks at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from actpipe.compute.directions import ClassSums, sum_classes
from actpipe.compute.geometry import CrossMoments, cross_moments
from actpipe.compute.probing import (
    Fit,
    LossSums,
    Reliability,
    balanced_weights,
    bound_of_hessian,
    class_scores,
    count_scores,
    list_scores,
    log_softmax,
    logits_of,
    minimize,
    penalized,
    reliability,
    softmax_loss,
)
from actpipe.jobs.blocks import map_and_sum
from actpipe.jobs.labels import ClassLabels
from actpipe.jobs.samples import Samples

Floats = npt.NDArray[np.float64]


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


class Scores(Protocol):
    """Scores of samples of each class and of all others, exact or by bins."""

    @property
    def auc(self) -> Floats:
        """Area under the ROC curve of each class."""

    def __add__(self, other: Any) -> Any:
        """Return those of all samples."""


@dataclass(frozen=True)
class Judged:
    """How well predictions and projections of held-out rows do."""

    probe: Reliability
    odds: Scores
    """Log odds of each class."""
    projections: Scores
    """Of each other direction, a class's own."""

    def __add__(self, other: Judged) -> Judged:
        return Judged(self.probe + other.probe, self.odds + other.odds, self.projections + other.projections)


def sum_training(rows: Samples) -> TrainingSums:
    """Sum the moments of the rows that fits may see, and the rows of each class."""

    def summed(block: Any) -> TrainingSums:
        values, number = rows.read(block, held_out=False)
        return TrainingSums(cross_moments(values), sum_classes(values, number, len(rows.labels.classes)))

    return map_and_sum(summed, rows.blocks(), rows.done, fan_in=2)


def fit_probe(
    rows: Samples, sums: TrainingSums, *, is_balanced: bool, penalty: float, tolerance: float, max_iterations: int
) -> Fit:
    """Fit a softmax regression on standardized rows; one pass over the samples for each evaluation.

    Args:
        rows: The labelled samples.
        sums: Of those that the fit may see.
        is_balanced: Whether all classes count the same in the loss.
        penalty: See `penalized`.
        tolerance: See `minimize`.
        max_iterations: See `minimize`.

    Returns:
        Weights for standardized rows, the intercepts last, `(channel + 1, class)`.
    """
    mean, scale = sums.moments.mean, sums.scale
    class_weights = balanced_weights(rows.labels.count_samples(held_out=False)) if is_balanced else None

    def evaluate(weights: Floats) -> tuple[float, Floats]:
        def summed(block: Any) -> LossSums:
            values, number = rows.read(block, held_out=False)
            return softmax_loss((values - mean) / scale, number, weights, class_weights)

        return penalized(map_and_sum(summed, rows.blocks(), rows.done), weights, penalty)

    correlation = sums.moments.covariance / np.outer(scale, scale)
    start = np.zeros((rows.width + 1, len(rows.labels.classes)))
    return minimize(
        evaluate, start, bound_of_hessian(correlation, penalty), tolerance=tolerance, max_iterations=max_iterations
    )


def is_exact(labels: ClassLabels, exact_scores: int) -> bool:
    """Whether held-out samples are few enough for an exact AUC."""
    return int(labels.count_samples(held_out=True).sum()) * len(labels.classes) <= exact_scores


def judge(
    rows: Samples, sums: TrainingSums, weights: Floats, directions: Floats, *, n_bins: int, exact_scores: int
) -> Judged:
    """Say how well a probe, and each class's direction, do on held-out rows.

    Args:
        rows: The labelled rows.
        sums: Of the rows that the fit saw.
        weights: The probe's, for standardized rows.
        directions: One for each class, `(channel, class)`.
        n_bins: Bins of confidence.
        exact_scores: Up to so many scores, samples times classes, are kept; more are counted by bins.
    """
    mean, scale = sums.moments.mean, sums.scale
    covariance = sums.moments.covariance
    deviation = np.sqrt(np.maximum(np.einsum("cd,ce,ed->d", directions, covariance, directions), 0.0))
    ruler = directions / np.where(deviation > 0, deviation, 1.0)

    exact = is_exact(rows.labels, exact_scores)

    def judged(block: Any) -> Judged:
        values, number = rows.read(block, held_out=True)
        centred = values - mean
        logs = log_softmax(logits_of(centred / scale, weights))
        own = number[:, None] == np.arange(weights.shape[1])
        both = (class_scores(logs), centred @ ruler)
        by_side = (list_scores(scores, number) if exact else count_scores(scores, own) for scores in both)
        return Judged(reliability(logs, number, n_bins), *by_side)

    return map_and_sum(judged, rows.blocks(), rows.done, fan_in=2)

"""Linear probes: softmax regression by L-BFGS, whose sums over rows add up, so that rows may stay on disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float32, Int

Evaluate = Callable[[Float[np.ndarray, "input class"]], tuple[float, Float[np.ndarray, "input class"]]]
"""From weights to the objective and its gradient."""
Precondition = Callable[[Float[np.ndarray, "input class"]], Float[np.ndarray, "input class"]]
"""Multiplies with an approximate inverse of the Hessian."""

_MEMORY = 12
_ENOUGH = 1e-4
"""Armijo's share of the decrease that the slope promises."""
_ROUNDING = 1e-14
_HALVINGS = 40


@dataclass(frozen=True)
class LossSums:
    """Negative log likelihood of some rows (nats), and its gradient; they add up."""

    weight: float
    """Sum of the rows' weights; without these, their number."""
    loss: float
    gradient: Float[np.ndarray, "input class"]

    def __add__(self, other: LossSums) -> LossSums:
        return LossSums(self.weight + other.weight, self.loss + other.loss, self.gradient + other.gradient)


def log_softmax(logits: Float[np.ndarray, "row class"]) -> Float[np.ndarray, "row class"]:
    """Return logarithms of probabilities, in nats."""
    shifted = logits - logits.max(-1, keepdims=True, initial=-np.inf)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def logits_of(
    rows: Float[np.ndarray, "row channel"], weights: Float[np.ndarray, "input class"]
) -> Float[np.ndarray, "row class"]:
    """Return `x W + b`; the last of `weights` is b."""
    return rows @ weights[:-1] + weights[-1]


def softmax_loss(
    rows: Float[np.ndarray, "row channel"],
    number: Int[np.ndarray, " row"],
    weights: Float[np.ndarray, "input class"],
    class_weights: Float[np.ndarray, " class"] | None = None,
) -> LossSums:
    """Sum the loss of a softmax regression over rows.

    Args:
        rows: Standardized inputs.
        number: The class of each row.
        weights: One line for each channel, and the intercepts last.
        class_weights: How much a row of each class counts; by default one.
    """
    logs = log_softmax(logits_of(rows, weights))
    these = np.arange(len(rows))
    counts = np.ones(len(rows)) if class_weights is None else class_weights[number]
    loss = -float((counts * logs[these, number]).sum())
    wrong = np.exp(logs)
    wrong[these, number] -= 1.0
    wrong *= counts[:, None]
    return LossSums(float(counts.sum()), loss, np.concatenate([rows.T @ wrong, wrong.sum(0, keepdims=True)]))


def balanced_weights(count: Int[np.ndarray, " class"]) -> Float[np.ndarray, " class"]:
    """Return class weights with which all classes count the same and the sum over rows is their number.

    Source:
        King and Zeng (2001), "Logistic Regression in Rare Events Data"; scikit-learn's `class_weight="balanced"`.
    """
    return count.sum() / (len(count) * count.astype(np.float64))


def penalized(
    sums: LossSums, weights: Float[np.ndarray, "input class"], penalty: float
) -> tuple[float, Float[np.ndarray, "input class"]]:
    """Return the mean loss plus `penalty / 2` times the squares of weights, not of intercepts; and its gradient."""
    free = weights.copy()
    free[-1] = 0.0
    value = sums.loss / sums.weight + penalty / 2 * float((free * free).sum())
    return value, sums.gradient / sums.weight + penalty * free


def bound_of_hessian(correlation: Float[np.ndarray, "channel channel"], penalty: float) -> Precondition:
    """Return what multiplies with the inverse of `correlation / 2 + penalty`, a bound of the Hessian.

    Source:
        Boehning (1992), "Multinomial logistic regression algorithm".
    """
    curvature, axes = np.linalg.eigh(correlation)
    scale = 1.0 / (np.maximum(curvature, 0.0) / 2 + max(penalty, 1e-12))

    def solve(gradient: Float[np.ndarray, "input class"]) -> Float[np.ndarray, "input class"]:
        inner = axes @ (scale[:, None] * (axes.T @ gradient[:-1]))
        return np.concatenate([inner, 2.0 * gradient[-1:]])

    return solve


@dataclass(frozen=True)
class Fit:
    """Where a fit ended."""

    weights: Float[np.ndarray, "input class"]
    n_iterations: int
    slope: float
    """Largest entry of the gradient there."""


def minimize(
    evaluate: Evaluate,
    start: Float[np.ndarray, "input class"],
    precondition: Precondition,
    *,
    tolerance: float,
    max_iterations: int,
) -> Fit:
    """Minimize a smooth convex function; deterministic, one evaluation for most iterations.

    Args:
        evaluate: The function; each call may be a pass over all rows.
        start: Where to begin.
        precondition: Approximate inverse of the Hessian.
        tolerance: Ends where no entry of the gradient is larger.
        max_iterations: Ends there in any case.

    Source:
        Nocedal and Wright, "Numerical Optimization", algorithm 7.5, with steps halved until Armijo's condition holds.
    """
    weights, history = start, list[tuple[np.ndarray, np.ndarray]]()
    value, gradient = evaluate(weights)
    for iteration in range(max_iterations):
        if np.abs(gradient).max() <= tolerance:
            return Fit(weights, iteration, float(np.abs(gradient).max()))
        step = -_two_loops(gradient, history, precondition)
        slope = float((step * gradient).sum())
        length = 1.0
        for _ in range(_HALVINGS):
            there = weights + length * step
            new_value, new_gradient = evaluate(there)
            if new_value <= value + _ENOUGH * length * slope + _ROUNDING * abs(value):
                break
            length /= 2
        else:  # rounding is all that is left
            return Fit(weights, iteration, float(np.abs(gradient).max()))
        change = (there - weights, new_gradient - gradient)
        if (change[0] * change[1]).sum() > 0:
            history = [*history[1 - _MEMORY :], change]
        weights, value, gradient = there, new_value, new_gradient
    return Fit(weights, max_iterations, float(np.abs(gradient).max()))


def _two_loops(
    gradient: np.ndarray, history: list[tuple[np.ndarray, np.ndarray]], precondition: Precondition
) -> np.ndarray:
    """Return the inverse Hessian, as steps so far tell it, times the gradient."""
    direction, shares = gradient.copy(), []
    for moved, turned in reversed(history):
        share = (moved * direction).sum() / (moved * turned).sum()
        direction -= share * turned
        shares.append(share)
    scaled = precondition(direction)
    if history:
        moved, turned = history[-1]
        scaled *= (moved * turned).sum() / (turned * precondition(turned)).sum()
    for (moved, turned), share in zip(history, reversed(shares), strict=True):
        scaled += (share - (turned * scaled).sum() / (moved * turned).sum()) * moved
    return scaled


_HALF_RANGE, _STEP = 32.0, 1 / 128


@dataclass(frozen=True)
class ScoreCounts:
    """How often scores of rows of a class, and of the others, fall into fixed bins; they add up exactly."""

    counts: Int[np.ndarray, "score side bin"]

    def __add__(self, other: ScoreCounts) -> ScoreCounts:
        return ScoreCounts(self.counts + other.counts)

    @property
    def auc(self) -> Float[np.ndarray, " score"]:
        """Area under the ROC curve: how often a row of the class has the larger score, ties counting half.

        Scores that are in one bin (1/128 wide, from -32 to 32) are ties. NaN where either side is empty.
        """
        others, own = (self.counts[:, side].astype(np.float64) for side in (0, 1))
        below = np.cumsum(others, -1) - others / 2
        pairs = own.sum(-1) * others.sum(-1)
        return np.divide((own * below).sum(-1), pairs, out=np.full(len(pairs), np.nan), where=pairs > 0)


@dataclass(frozen=True)
class ScoreLists:
    """All scores of rows, in float32; they add up, and take 4 bytes each."""

    scores: Float32[np.ndarray, "row score"]
    number: Int[np.ndarray, " row"]
    """Of each row, which score is that of its class."""

    def __add__(self, other: ScoreLists) -> ScoreLists:
        both = np.concatenate([self.scores, other.scores]), np.concatenate([self.number, other.number])
        return ScoreLists(*both)

    @property
    def auc(self) -> Float[np.ndarray, " score"]:
        """Area under the ROC curve: how often a row of the class has the larger score, ties counting half.

        Scores that are equal in float32 are ties. NaN where either side is empty.
        """
        found = np.full(self.scores.shape[1], np.nan)
        for place, scores in enumerate(self.scores.T):
            own, others = scores[self.number == place], np.sort(scores[self.number != place])
            if len(own) and len(others):
                below = sum(np.searchsorted(others, own, side).sum(dtype=np.int64) for side in ("left", "right"))
                found[place] = float(below) / 2 / (len(own) * len(others))
        return found


def list_scores(scores: Float[np.ndarray, "row score"], number: Int[np.ndarray, " row"]) -> ScoreLists:
    """Keep scores as they are, but for rounding to float32."""
    return ScoreLists(scores.astype(np.float32), number)


def count_scores(scores: Float[np.ndarray, "row score"], own: Bool[np.ndarray, "row score"]) -> ScoreCounts:
    """Count scores by bin, those of rows of the class apart; scores out of range are in the outermost bins."""
    n_bins = int(2 * _HALF_RANGE / _STEP)
    places = np.clip(np.floor((scores + _HALF_RANGE) / _STEP), 0, n_bins - 1).astype(np.int64)
    n_scores = scores.shape[1]
    flat = (np.arange(n_scores) * 2 + own) * n_bins + places
    counts = np.bincount(flat.ravel(), minlength=n_scores * 2 * n_bins)
    return ScoreCounts(counts.reshape(n_scores, 2, n_bins))


def class_scores(logs: Float[np.ndarray, "row class"]) -> Float[np.ndarray, "row class"]:
    """Return the log odds of each class against all others, from log probabilities."""
    others = []
    for number in range(logs.shape[1]):
        rest = np.delete(logs, number, axis=1)
        largest = rest.max(-1, keepdims=True, initial=-np.inf)
        others.append(largest[:, 0] + np.log(np.exp(rest - largest).sum(-1)))
    return logs - np.stack(others, -1)


@dataclass(frozen=True)
class Reliability:
    """Of predictions by bin of confidence: how many, their confidence, and how many are right; they add up."""

    count: Float[np.ndarray, " bin"]
    confidence: Float[np.ndarray, " bin"]
    correct: Float[np.ndarray, " bin"]
    loss: float
    """Sum of negative log likelihoods, in nats."""
    by_class: Float[np.ndarray, "what class"]
    """Right predictions of each class, and its rows."""

    def __add__(self, other: Reliability) -> Reliability:
        return Reliability(
            self.count + other.count,
            self.confidence + other.confidence,
            self.correct + other.correct,
            self.loss + other.loss,
            self.by_class + other.by_class,
        )

    @property
    def balanced_accuracy(self) -> float:
        """Mean over classes of the share of right predictions; NaN where a class has no rows."""
        right, count = self.by_class
        return float((right / np.where(count > 0, count, np.nan)).mean())

    @property
    def accuracy(self) -> float:
        """Share of right predictions; NaN without any."""
        return float(self.correct.sum() / self.count.sum()) if self.count.sum() else float("nan")

    @property
    def error(self) -> float:
        """Expected calibration error: mean distance of accuracy and confidence over bins, by their counts.

        Source:
            Guo et al. (2017), "On Calibration of Modern Neural Networks", equation 3.
        """
        total = self.count.sum()
        return float(np.abs(self.correct - self.confidence).sum() / total) if total else float("nan")


def reliability(logs: Float[np.ndarray, "row class"], number: Int[np.ndarray, " row"], n_bins: int) -> Reliability:
    """Sum predictions by confidence, the probability of the most probable class, in bins of equal width."""
    confidence = np.exp(logs.max(-1, initial=-np.inf))
    right = (logs.argmax(-1) == number).astype(np.float64)
    place = np.clip(np.ceil(confidence * n_bins).astype(np.int64) - 1, 0, n_bins - 1)
    count, sure, correct = (
        np.bincount(place, values, minlength=n_bins).astype(np.float64)
        for values in (np.ones(len(place)), confidence, right)
    )
    n_classes = logs.shape[1]
    by_class = np.stack([np.bincount(number, values, minlength=n_classes) for values in (right, np.ones(len(right)))])
    by_class = by_class.astype(np.float64)
    return Reliability(count, sure, correct, -float(logs[np.arange(len(logs)), number].sum()), by_class)

"""How sure a mean is whose rows come in clusters, such as the tokens of one document.

Source:
    Cameron and Miller (2015), "A Practitioner's Guide to Cluster-Robust Inference": the sandwich estimate of a
    mean's variance, t with one degree of freedom less than clusters, and the bootstrap that draws whole clusters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

_NODES = 200


@dataclass(frozen=True)
class ClusterIntervals:
    """Means over all rows with their intervals, in the unit of the rows; NaN where there are too few clusters."""

    mean: Float[np.ndarray, " column"]
    standard_error: Float[np.ndarray, " column"]
    low: Float[np.ndarray, " column"]
    """Bootstrap interval, by percentiles."""
    high: Float[np.ndarray, " column"]
    t_low: Float[np.ndarray, " column"]
    """Interval by Student's t."""
    t_high: Float[np.ndarray, " column"]


def cluster_intervals(
    total: Float[np.ndarray, "cluster column"],
    count: Float[np.ndarray, "cluster column"],
    *,
    confidence: float,
    n_resamples: int,
    seed: int,
) -> ClusterIntervals:
    """Return the mean over all rows and two intervals of it, clusters taken as independent.

    Args:
        total: Sum of each cluster's rows.
        count: Number of each cluster's rows; may be zero.
        confidence: Share of intervals that should hold the true mean.
        n_resamples: How often clusters are drawn, with replacement.
        seed: Seed of numpy's PCG64 generator; the same draws serve all columns.
    """
    columns = [
        _one_column(total[there, index], count[there, index], confidence, n_resamples, seed)
        for index, there in enumerate((count > 0).T)
    ]
    return ClusterIntervals(*(np.array(values) for values in zip(*columns, strict=True)))


def _one_column(
    total: Float[np.ndarray, " cluster"],
    count: Float[np.ndarray, " cluster"],
    confidence: float,
    n_resamples: int,
    seed: int,
) -> tuple[float, ...]:
    n_clusters = len(count)
    if not n_clusters:
        return (math.nan,) * 6
    mean = float(total.sum() / count.sum())
    if n_clusters < 2:
        return (mean, *(math.nan,) * 5)
    residual = total - mean * count
    error = math.sqrt(n_clusters / (n_clusters - 1) * float(residual @ residual)) / float(count.sum())
    reach = t_quantile(confidence, n_clusters - 1) * error
    drawn = _resampled_means(total, count, n_resamples, seed)
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    return mean, error, float(low), float(high), mean - reach, mean + reach


def _resampled_means(
    total: Float[np.ndarray, " cluster"], count: Float[np.ndarray, " cluster"], n_resamples: int, seed: int
) -> Float[np.ndarray, " resample"]:
    generator = np.random.Generator(np.random.PCG64(seed))
    means = np.empty(n_resamples)
    for index in range(n_resamples):
        chosen = generator.integers(0, len(count), len(count))
        means[index] = total[chosen].sum() / count[chosen].sum()
    return means


def t_quantile(confidence: float, degrees: int) -> float:
    """Return how many standard errors either side of the mean hold `confidence` of Student's t distribution.

    Args:
        confidence: Between 0 and 1.
        degrees: Degrees of freedom, one or more.
    """
    low, high = 0.0, 1.0
    while _t_within(high, degrees) < confidence:
        low, high = high, 2 * high
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_within(middle, degrees) < confidence else (low, middle)
    return (low + high) / 2


def _t_within(reach: float, degrees: int) -> float:
    """Return the probability of values within `reach` of zero: an integral over angles, `t = sqrt(degrees) tan`."""
    angle = math.atan(reach / math.sqrt(degrees))
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    at = (nodes + 1) * angle / 2
    integral = float((weights * np.cos(at) ** (degrees - 1)).sum() * angle / 2)
    scale = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)
    return 2 * integral * math.exp(scale) / math.sqrt(math.pi)

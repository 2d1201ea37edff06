"""The geometry of rows: how long, how aligned, of how many dimensions, how alike two activations are.

Everything rests on sums in float64 that add up, so that rows may come in any blocks and in any order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float


@dataclass(frozen=True)
class CrossMoments:
    """Means of two activations of the same rows, and the products of what is left without them.

    Source:
        Chan, Golub and LeVeque (1979): products about the means, merged without cancellation.
    """

    n_rows: int
    mean: Float[np.ndarray, " channel"]
    other_mean: Float[np.ndarray, " other_channel"]
    products: Float[np.ndarray, "channel other_channel"]

    def __add__(self, other: CrossMoments) -> CrossMoments:
        n_rows = self.n_rows + other.n_rows
        if not self.n_rows or not other.n_rows:
            return self if self.n_rows else other
        gap, other_gap = other.mean - self.mean, other.other_mean - self.other_mean
        share = other.n_rows / n_rows
        products = self.products + other.products
        products += np.outer(gap * (self.n_rows * share), other_gap)
        return CrossMoments(n_rows, self.mean + gap * share, self.other_mean + other_gap * share, products)

    @property
    def covariance(self) -> Float[np.ndarray, "channel other_channel"]:
        """Covariances, divided by the number of rows."""
        return self.products / max(1, self.n_rows)


def cross_moments(
    rows: Float[np.ndarray, "row channel"], other: Float[np.ndarray, "row other_channel"] | None = None
) -> CrossMoments:
    """Sum two activations of the same rows; by default one with itself."""
    wide = rows.astype(np.float64)
    mean = wide.mean(0) if len(wide) else np.zeros(wide.shape[1])
    wide -= mean
    if other is None:
        return CrossMoments(len(rows), mean, mean, wide.T @ wide)
    right = other.astype(np.float64)
    other_mean = right.mean(0) if len(right) else np.zeros(right.shape[1])
    right -= other_mean
    return CrossMoments(len(rows), mean, other_mean, wide.T @ right)


@dataclass(frozen=True)
class UnitSums:
    """Sum of rows scaled to length 1, and how many there are; rows of zeros have no direction and do not count."""

    n_rows: int
    total: Float[np.ndarray, " channel"]

    def __add__(self, other: UnitSums) -> UnitSums:
        return UnitSums(self.n_rows + other.n_rows, self.total + other.total)

    @property
    def anisotropy(self) -> float:
        """Mean cosine of all pairs of different rows, exact: `(|sum|^2 - n) / (n (n - 1))`; NaN of fewer than two.

        Source:
            Ethayarajh (2019), "How Contextual are Contextualized Word Representations?", over all pairs in the place of
            a sample.
        """
        if self.n_rows < 2:
            return float("nan")
        return float((self.total @ self.total - self.n_rows) / (self.n_rows * (self.n_rows - 1.0)))


def row_norms(rows: Float[np.ndarray, "row channel"]) -> Float[np.ndarray, " row"]:
    """Return Euclidean norms, in the units of the activation."""
    wide = rows.astype(np.float64)
    return np.sqrt(np.einsum("rc,rc->r", wide, wide))


def unit_sums(rows: Float[np.ndarray, "row channel"], norms: Float[np.ndarray, " row"]) -> UnitSums:
    """Sum rows scaled to length 1, given their norms."""
    there = norms > 0
    scale = np.divide(1.0, norms, out=np.zeros(len(norms)), where=there)
    return UnitSums(int(there.sum()), scale @ rows.astype(np.float64))


def spectrum(covariance: Float[np.ndarray, "channel channel"]) -> Float[np.ndarray, " channel"]:
    """Return the variances along the principal axes, largest first; what rounding makes negative is 0."""
    return np.maximum(np.linalg.eigvalsh(covariance)[::-1], 0.0)


def participation_ratio(variances: Float[np.ndarray, " channel"]) -> float:
    """Return `(sum v)^2 / sum v^2`: how many dimensions of equal variance would be spread as much; NaN without any.

    Source:
        Gao et al. (2017), "A theory of multineuronal dimensionality, dynamics and measurement".
    """
    squares = float(variances @ variances)
    return float(variances.sum() ** 2 / squares) if squares else float("nan")


def effective_rank(variances: Float[np.ndarray, " channel"]) -> float:
    """Return the exponential of the entropy (in nats) of the shares of variance; NaN without any.

    Source:
        Roy and Vetterli (2007), "The effective rank", of the covariance matrix.
    """
    total = float(variances.sum())
    if not total:
        return float("nan")
    shares = variances[variances > 0] / total
    return float(np.exp(-(shares * np.log(shares)).sum()))


def linear_cka(across: Float[np.ndarray, "channel other_channel"], own_norm: float, other_norm: float) -> float:
    """Return the linear centred kernel alignment of two activations, from 0 to 1; NaN where one does not vary.

    Args:
        across: Their cross-covariance, or products about their means.
        own_norm: Frobenius norm of the one's own covariance, in the same units.
        other_norm: That of the other.

    Source:
        Kornblith et al. (2019), "Similarity of Neural Network Representations Revisited", equation 4.
    """
    scale = own_norm * other_norm
    return float((across * across).sum() / scale) if scale else float("nan")

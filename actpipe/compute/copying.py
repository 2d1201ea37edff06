"""Copying by a head's output: how far it raises the logits of the tokens that it attends to.

Source:
    After the copying heads of Elhage et al. (2021), "A Mathematical Framework for Transformer Circuits", and the
    copying score of Olsson et al. (2022), "In-context Learning and Induction Heads", with direct logit attribution
    (`actpipe.compute.attribution`) in place of a ratio of logits that are cut off below their mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

MEASURES = ("raised", "standardized")
_ROWS = 4096


@dataclass(frozen=True)
class CopyingWeights:
    """What copying by the heads of one layer is computed with."""

    W_O: Float[np.ndarray, "head d_head d_model"]
    """From a head's `z` to what it adds to the residual stream."""
    spread: Float[np.ndarray, "head d_head d_head"]
    """`z spread z` is the variance over the vocabulary of the logits that `z` adds, times the final norm's square."""


@dataclass(frozen=True)
class CopyingSums:
    """Sums over queries, in float64; they add up."""

    attention: Float[np.ndarray, " head"]
    """Attention that counts."""
    raised: Float[np.ndarray, " head"]
    standardized: Float[np.ndarray, " head"]

    def __add__(self, other: CopyingSums) -> CopyingSums:
        return CopyingSums(
            self.attention + other.attention, self.raised + other.raised, self.standardized + other.standardized
        )

    @property
    def means(self) -> Float[np.ndarray, "head measure"]:
        """Return `MEASURES`, weighted by attention; NaN where none counts."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.stack([self.raised, self.standardized], -1) / self.attention[:, None]


def center_directions(directions: Float[np.ndarray, "d_vocab d_model"]) -> Float[np.ndarray, "d_vocab d_model"]:
    """Subtract the mean over the vocabulary, so that logits are counted from their mean."""
    return directions - directions.mean(0, keepdims=True, dtype=np.float64).astype(np.float32)


def spread_of_logits(
    W_O: Float[np.ndarray, "head d_head d_model"], covariance: Float[np.ndarray, "d_model d_model"]
) -> Float[np.ndarray, "head d_head d_head"]:
    """Return the quadratic form of a head's `z` that gives the variance of its logits over the vocabulary.

    Args:
        W_O: Output weights.
        covariance: Of the directions of the vocabulary; see `covariance_of`.
    """
    return np.einsum("hdm,mn,hen->hde", W_O, covariance, W_O, optimize=True).astype(np.float32)


def covariance_of(directions: Float[np.ndarray, "d_vocab d_model"]) -> Float[np.ndarray, "d_model d_model"]:
    """Return the covariance of centred directions over the vocabulary, in float64."""
    total = np.zeros((directions.shape[1],) * 2)
    for start in range(0, len(directions), _ROWS):
        rows = directions[start : start + _ROWS].astype(np.float64)
        total += rows.T @ rows
    return total / len(directions)


def score_copying(
    attention: Float[np.ndarray, "query_position head key_position"],
    z: Float[np.ndarray, "query_position head d_head"],
    scale: Float[np.ndarray, " query_position"],
    directions: Float[np.ndarray, "key_position d_model"],
    weights: CopyingWeights,
    counted: Bool[np.ndarray, "query_position key_position"],
) -> CopyingSums:
    """Sum up, over the queries of one sequence, how far heads raise the logits of the tokens they attend to.

    Of a query, `raised` is `sum_k a_k (l(t_k) - mean_v l(v))`, where `a_k` is its attention to key k, `t_k` the token
    there and `l` the logits that the head itself adds, `z W_O` over the final norm's scale times the folded
    unembedding, in nats. `standardized` is the same over the standard deviation of `l` over the vocabulary, which
    leaves out how much the head writes; 0 where it writes nothing.

    Args:
        attention: What each query attends to.
        z: Values mixed by each head's pattern.
        scale: What each row is divided by on its way to the logits.
        directions: Centred folded direction of the token at each key.
        weights: Of the layer.
        counted: Which pairs count.
    """
    n_heads, d_head, d_model = weights.W_O.shape
    seen = (attention * counted[:, None]).transpose(1, 0, 2)
    of_keys = (directions @ weights.W_O.reshape(-1, d_model).T).reshape(-1, n_heads, d_head).transpose(1, 0, 2)
    mixed, by_head = seen @ of_keys, z.transpose(1, 0, 2)
    on_tokens = (mixed * by_head).sum(-1, dtype=np.float64)
    variance = ((by_head @ weights.spread) * by_head).sum(-1, dtype=np.float64)
    deviation = np.sqrt(np.maximum(variance, 0.0))
    standardized = np.divide(on_tokens, deviation, out=np.zeros_like(on_tokens), where=deviation != 0)
    return CopyingSums(seen.sum((1, 2), dtype=np.float64), (on_tokens / scale).sum(-1), standardized.sum(-1))

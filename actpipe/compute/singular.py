"""Singular vectors of weights, and the tokens that they point to.

Source:
    Millidge and Black 2022, "The Singular Value Decompositions of Transformer Weight Matrices are Highly
    Interpretable"; TransformerLens 2.16, `SVDInterpreter`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int

from actpipe.compute.factored import FactoredMatrix, reduced_svd


@dataclass(frozen=True)
class SingularVectors:
    """The first singular vectors of a matrix, or of several, as rows of length 1, and all singular values."""

    values: Float[torch.Tensor, "*leading rank"]
    """The largest first."""
    left: Float[torch.Tensor, "*leading vector d_left"]
    right: Float[torch.Tensor, "*leading vector d_right"]

    @property
    def there(self) -> Bool[torch.Tensor, "*leading vector"]:
        """Whether the singular value is more than rounding of float32 weights; of others any vector would do."""
        size = max(self.left.shape[-1], self.right.shape[-1])
        limit = self.values[..., :1] * torch.finfo(torch.float32).eps * size
        return self.values[..., : self.left.shape[-2]] > limit


def singular_vectors(
    matrix: FactoredMatrix | Float[torch.Tensor, "*leading d_left d_right"], n_vectors: int
) -> SingularVectors:
    """Return the singular vectors with the largest singular values, computed in float64.

    A pair may be turned round, left and right together, without a change of the matrix. The sign is that which makes
    the entry of largest modulus of the right vector positive, as with principal axes.

    Args:
        matrix: Rows are multiplied with it from the left; a factored one is never formed.
        n_vectors: How many, at most the rank.
    """
    if isinstance(matrix, FactoredMatrix):
        left, values, right = FactoredMatrix(matrix.A.double(), matrix.B.double()).svd()
    else:
        left, values, right = reduced_svd(matrix.double())
    left, right = left.mT[..., :n_vectors, :], right.mT[..., :n_vectors, :]
    sign = right.gather(-1, right.abs().argmax(-1, keepdim=True)).sign()
    return SingularVectors(values, left * sign, right * sign)


def outermost_tokens(
    scores: Float[torch.Tensor, "vector d_vocab"], n_tokens: int
) -> tuple[Int[torch.Tensor, "vector end rank"], Float[torch.Tensor, "vector end rank"]]:
    """Return the ids and scores of the tokens with the highest scores, and of those with the lowest.

    The outermost comes first; among equal scores the lower id does.
    """
    n_tokens = min(n_tokens, scores.shape[-1])
    ids = torch.empty((len(scores), 2, n_tokens), dtype=torch.long, device=scores.device)
    for place, row in enumerate(scores):
        ids[place, 0], ids[place, 1] = _highest(row, n_tokens), _highest(-row, n_tokens)
    return ids, scores[torch.arange(len(scores), device=scores.device)[:, None, None], ids]


def _highest(row: torch.Tensor, n_tokens: int) -> torch.Tensor:
    candidates = (row >= row.topk(n_tokens).values[-1]).nonzero()[:, 0]
    return candidates[row[candidates].argsort(descending=True, stable=True)][:n_tokens]

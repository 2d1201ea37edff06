"""What weights alone say of attention heads: copying and composition. Nothing of the size of the product is formed.

Source:
    Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; TransformerLens 2.16,
    `utils.composition_scores` and `HookedTransformer.all_composition_scores`.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int

from actpipe.compute.factored import FactoredMatrix

MODES = ("Q", "K", "V")


def composition_scores(left: FactoredMatrix, right: FactoredMatrix) -> Float[torch.Tensor, "..."]:
    """Return `|L R| / (|L| |R|)` in Frobenius norms, for every leading index of both: `(*left, *right)`; no unit.

    Raises:
        ValueError: `L R` has no meaning.
    """
    if left.rdim != right.ldim:
        raise ValueError(f"there is no product of {tuple(left.shape)} and {tuple(right.shape)}")
    reads, writes = right.collapse_r(), left.collapse_l()
    flat_reads, flat_writes = reads.reshape(-1, *reads.shape[-2:]), writes.reshape(-1, *writes.shape[-2:])
    read_norms = flat_reads.norm(dim=(-2, -1))
    rows = [(one @ flat_reads).norm(dim=(-2, -1)) / one.norm() / read_norms for one in flat_writes]
    return torch.stack(rows).reshape(*writes.shape[:-2], *reads.shape[:-2])


def all_composition_scores(
    QK: FactoredMatrix, OV: FactoredMatrix, mode: str
) -> Float[torch.Tensor, "layer head later_layer later_head"]:
    """Return how much each head's output aligns with what heads of later layers read; zero for other pairs.

    Args:
        QK: Of every layer and head.
        OV: Of every layer and head.
        mode: Into the queries (`Q`), the keys (`K`) or the values (`V`) of the later head.

    Raises:
        ValueError: There is no such mode.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, not {mode!r}")
    scores = composition_scores(OV, {"Q": QK, "K": QK.T, "V": OV}[mode])
    layer = torch.arange(scores.shape[0], device=scores.device)
    earlier = layer[:, None, None, None] < layer[None, None, :, None]
    return torch.where(earlier, scores, torch.zeros_like(scores))


def positive_eigenvalue_share(matrix: FactoredMatrix) -> Float[torch.Tensor, "*leading"]:
    """Return the sum of the eigenvalues over the sum of their moduli: 1 where all are positive, -1 where none is.

    For `W_E W_V W_O W_U` this is the copying score of a head; no unit, NaN for a matrix of zeros.
    """
    values = matrix.eigenvalues
    return values.real.sum(-1) / values.abs().sum(-1)


def token_circuit(
    W_E: Float[torch.Tensor, "d_vocab d_model"], OV: FactoredMatrix, W_U: Float[torch.Tensor, "d_model d_vocab"]
) -> FactoredMatrix:
    """Return a matrix with the eigenvalues of `W_E OV W_U`, but for zeros, at the size of the residual stream."""
    return FactoredMatrix(OV.A, OV.B @ (W_U @ W_E))


def copying_ranks(
    W_E: Float[torch.Tensor, "token d_model"],
    OV: FactoredMatrix,
    W_U: Float[torch.Tensor, "d_model d_vocab"],
    ids: Int[torch.Tensor, " token"],
) -> tuple[Float[torch.Tensor, " head"], Float[torch.Tensor, " head"]]:
    """Return how high a head that attends to a token raises that token's own logit among all tokens.

    Args:
        W_E: Embeddings of some tokens.
        OV: Of the heads of a layer.
        W_U: Unembedding of all tokens.
        ids: Which tokens these are.

    Returns:
        The mean over tokens of `1 - rank / (d_vocab - 1)` (1: always first; 0.5: chance), and the share first.
    """
    mean, first = [], []
    for head in range(OV.shape[0]):
        logits = (W_E @ OV.A[head]) @ (OV.B[head] @ W_U)
        own = logits.gather(1, ids[:, None])
        above = ((logits > own).sum(-1) + ((logits == own).sum(-1) - 1) / 2).double()
        mean.append(1 - above.mean() / max(1, W_U.shape[1] - 1))
        first.append((above == 0).double().mean())
    return torch.stack(mean), torch.stack(first)

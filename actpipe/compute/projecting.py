"""Less than an activation: projections of rows, and what a sparse autoencoder's encoder makes of them."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int


def random_directions(d_in: int, d_out: int, seed: int) -> Float[torch.Tensor, "d_in d_out"]:
    """Return Gaussian directions of variance `1 / d_out`, so that lengths are kept in the mean.

    They are the first `d_in * d_out` draws of numpy's PCG64 under the seed, in float32, row by row.

    Source:
        Johnson and Lindenstrauss (1984).
    """
    drawn = np.random.Generator(np.random.PCG64(seed)).standard_normal((d_in, d_out), np.float32)
    return torch.from_numpy(drawn / np.float32(np.sqrt(d_out)))


def encode(
    rows: Float[torch.Tensor, "row d_in"],
    W_enc: Float[torch.Tensor, "d_in d_sae"],
    b_enc: Float[torch.Tensor, " d_sae"],
    threshold: Float[torch.Tensor, " d_sae"] | None = None,
) -> Float[torch.Tensor, "row latent"]:
    """Return a sparse autoencoder's latents: `relu(x W_enc + b_enc)`, and 0 where that is not above a threshold.

    Source:
        Bricken et al. (2023) for ReLU, Rajamanoharan et al. (2024) for the threshold (JumpReLU).
    """
    before = rows @ W_enc + b_enc
    latents = before.relu()
    return latents if threshold is None else latents * (before > threshold)


def largest(
    latents: Float[torch.Tensor, "row latent"], k: int
) -> tuple[Float[torch.Tensor, "row rank"], Int[torch.Tensor, "row rank"]]:
    """Return the `k` largest latents of each row, the largest first, and which they are.

    Where fewer are above 0, the rest are 0 and their index is -1.
    """
    values, indices = latents.topk(k, dim=-1, sorted=True)
    active = values > 0
    return torch.where(active, values, 0), torch.where(active, indices, -1).to(torch.int32)

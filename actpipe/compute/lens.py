"""What the model would predict from each layer's residual stream, and affine maps that bring it to the last one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int

LENS_METRICS = ("loss", "probability", "rank", "agreement", "kl")
"""`loss` (nats) and `probability` of the next token; `rank`, how many tokens are more probable than it; `agreement`, 1
where the most probable token is the model's own; `kl` (nats) from the model's own distribution to this one."""


@dataclass(frozen=True)
class FinalNorm:
    """The final norm's numbers."""

    kind: Literal["LN", "RMS"]
    weight: Float[torch.Tensor, " d_model"]
    bias: Float[torch.Tensor, " d_model"] | None
    epsilon: float

    def __call__(
        self, rows: Float[torch.Tensor, "row d_model"], scale: Float[torch.Tensor, "row 1"] | None = None
    ) -> Float[torch.Tensor, "row d_model"]:
        """Return rows as the unembedding reads them, divided by `scale` where it is given, else by their own."""
        if self.kind == "LN":
            rows = rows - rows.mean(-1, keepdim=True)
        if scale is None:
            scale = (rows.square().mean(-1, keepdim=True) + self.epsilon).sqrt()
        normed = rows / scale * self.weight
        return normed if self.bias is None else normed + self.bias


def lens_metrics(
    logits: Float[torch.Tensor, "row d_vocab"],
    final: Float[torch.Tensor, "row d_vocab"],
    targets: Int[torch.Tensor, " row"],
) -> Float[torch.Tensor, "row metric"]:
    """Compare what a layer predicts with what comes and with what the model predicts.

    Args:
        logits: Of the layer, in float32.
        final: Log-probabilities of the model itself.
        targets: Id of the next token, -1 where there is none.

    Returns:
        `LENS_METRICS`, in their order; the first three are NaN where there is no next token.

    Source:
        nostalgebraist (2020), "interpreting GPT: the logit lens"; KL as in Belrose et al. (2023).
    """
    log_probabilities = logits.log_softmax(-1)
    at_target = log_probabilities.gather(-1, targets.clamp_min(0)[:, None])
    rank = (log_probabilities > at_target).sum(-1).float()
    share = final.exp()
    kl = torch.where(share == 0, 0.0, share * (final - log_probabilities)).sum(-1).clamp_min(0.0)
    agreement = (log_probabilities.argmax(-1) == final.argmax(-1)).float()
    of_target = torch.stack([-at_target[:, 0], at_target[:, 0].exp(), rank], -1)
    of_target[targets < 0] = torch.nan
    return torch.cat([of_target, agreement[:, None], kl[:, None]], -1)


@dataclass(frozen=True)
class AffineSums:
    """What a least-squares fit of affine maps needs of the rows, in float64; sums of blocks add up."""

    n_rows: int
    source: Float[np.ndarray, "layer d_model"]
    target: Float[np.ndarray, " d_model"]
    squares: Float[np.ndarray, "layer d_model d_model"]
    """Of each layer's rows with themselves."""
    products: Float[np.ndarray, "layer d_model d_model"]
    """Of each layer's rows with the target's."""

    def __add__(self, other: AffineSums) -> AffineSums:
        return AffineSums(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


def sum_affine(sources: Float[np.ndarray, "layer row d_model"], target: Float[np.ndarray, "row d_model"]) -> AffineSums:
    """Sum what a fit of affine maps from each layer's rows to the target's needs."""
    wide: Any = sources.astype(np.float64)
    goal: Any = target.astype(np.float64)
    turned = wide.transpose(0, 2, 1)
    return AffineSums(len(goal), wide.sum(1), goal.sum(0), turned @ wide, turned @ goal)


def fit_affine(
    sums: AffineSums, ridge: float
) -> tuple[Float[np.ndarray, "layer d_model d_model"], Float[np.ndarray, "layer d_model"]]:
    """Fit `x W + b` to the target by least squares, pulled towards the identity.

    Args:
        sums: Of the rows.
        ridge: Weight of `|W - 1|^2`, as a share of the mean variance of a channel; above 0 where rows do not span
            the space.

    Returns:
        `W` and `b` of each layer, float64.

    Source:
        The affine translators of Belrose et al. (2023), "Eliciting Latent Predictions from Transformers with the Tuned
        Lens", in closed form for the squared error in place of the KL divergence.
    """
    if sums.n_rows < 2:
        raise ValueError(f"a fit needs at least two rows, got {sums.n_rows}")
    mean, goal = sums.source / sums.n_rows, sums.target / sums.n_rows
    covariance = sums.squares / sums.n_rows - mean[:, :, None] * mean[:, None, :]
    products = sums.products / sums.n_rows - mean[:, :, None] * goal
    d_model = mean.shape[-1]
    penalty = ridge * np.trace(covariance, axis1=1, axis2=2)[:, None, None] / d_model * np.eye(d_model)
    maps = np.linalg.solve(covariance + penalty, products + penalty)
    return maps, goal - np.einsum("ld,lde->le", mean, maps)

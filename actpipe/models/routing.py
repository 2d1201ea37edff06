"""Compare scores of all experts with what a router makes of them for those it chose."""

from __future__ import annotations

import torch


def shares(chosen: torch.Tensor) -> torch.Tensor:
    """Return how a token's chosen experts share in it: routers scale their weights, or make them add up to one.

    Args:
        chosen: `(token, choice)`, a weight for each chosen expert.

    Returns:
        `(token, choice)` in float32, each row adding up to 1; of one choice, relative to the largest of all tokens.
    """
    wide = chosen.float()
    return wide / (wide.sum(-1, keepdim=True) if wide.shape[-1] > 1 else wide.max())


def of_chosen(weights: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Return a router's weights `(token, choice)`, where some routers give zeros for the experts not chosen."""
    return weights if weights.shape == indices.shape else weights.gather(-1, indices.long())

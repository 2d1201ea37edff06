"""What positions add to scores, computed a second time: ALiBi's slopes and T5's learned bias."""

from __future__ import annotations

import math

import torch

from actpipe.models.hooked_model import HookedModel


def distance_bias(found: torch.Tensor, plain: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """Return each head's fitted slope times the distance between key and query."""
    positions = torch.arange(found.shape[-1], device=found.device)
    distance = (positions - positions.unsqueeze(-1)).float()
    slopes = []
    for head in range(found.shape[1]):
        seen = allowed[:, head]
        columns = torch.stack([plain[:, head][seen], distance.expand_as(seen)[seen]], dim=-1).double().cpu()
        target = found[:, head][seen].double().cpu().unsqueeze(-1)
        slopes.append(torch.linalg.lstsq(columns, target).solution[1, 0])
    return torch.stack(slopes).to(found).reshape(1, -1, 1, 1) * distance


def relative_bias(model: HookedModel, layer: int, size: tuple[int, ...]) -> torch.Tensor:
    """Return `(head, query_position, key_position)`: the bias that a block's stack learned for each distance.

    Source:
        Raffel et al. (2020), "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer".
    """
    block, config = model.shape.blocks[layer], model.native.config
    table = model.weights[f"{block.stack}.0.attn.rel_pos_bias.weight"].float()
    n_queries, n_keys = size
    distance = torch.arange(n_keys) - torch.arange(n_queries).unsqueeze(-1)
    buckets = _buckets(
        distance,
        n_buckets=config.relative_attention_num_buckets,
        max_distance=config.relative_attention_max_distance,
        causal=block.causal,
    )
    return table[buckets.to(table.device)].permute(2, 0, 1)


def _buckets(distance: torch.Tensor, *, n_buckets: int, max_distance: int, causal: bool) -> torch.Tensor:
    """Number distances: one by one up to half of the buckets, then evenly on a logarithmic scale."""
    ahead = torch.zeros_like(distance)
    if not causal:
        n_buckets //= 2
        ahead = (distance > 0) * n_buckets
    steps = (-distance).clamp_min(0) if causal else distance.abs()
    exact = n_buckets // 2
    beyond = (steps / exact).clamp_min(1e-9).log() / math.log(max_distance / exact) * (n_buckets - exact)
    far = (exact + beyond.to(torch.long)).clamp_max(n_buckets - 1)
    return ahead + torch.where(steps < exact, steps, far)

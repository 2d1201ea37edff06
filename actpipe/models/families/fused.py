"""Cut a projection out of a fused module's output: one rule for activations, weights and biases."""

from __future__ import annotations

from typing import Literal

import torch

from actpipe.hooks import BlockShape
from actpipe.models.families.entry import Layout

Part = Literal["q", "k", "v"]


def split_heads(fused: torch.Tensor, layout: Layout, part: Part, block: BlockShape) -> torch.Tensor:
    """Cut the last axis of `fused` into heads of queries, keys or values.

    Args:
        fused: `(..., d_out)`: the module's output, its bias, or its weight with the input axis first.
        layout: How the module orders its output.
        part: Which of the three to take.
        block: Sizes of the block; keys and values have `n_kv_heads` heads.

    Returns:
        `(..., n_heads, d_head)`, a view where the layout allows it.
    """
    leading, n_heads, n_kv_heads = fused.shape[:-1], block.n_heads, block.n_kv_heads
    if layout == "grouped":
        groups = fused.reshape(*leading, n_kv_heads, n_heads // n_kv_heads + 2, -1)
        if part == "q":
            return groups[..., :-2, :].reshape(*leading, n_heads, -1)
        return groups[..., -2 if part == "k" else -1, :]
    if layout == "codegen":
        quarters = fused.reshape(*leading, 4, 3, n_heads // 4, -1)
        return quarters[..., "qvk".index(part), :, :].reshape(*leading, n_heads, -1)
    if layout == "columns":
        d_head = fused.shape[-1] // (n_heads + 2 * n_kv_heads)
        fused = torch.split(fused, [d_head * heads for heads in (n_heads, n_kv_heads, n_kv_heads)], dim=-1)[
            "qkv".index(part)
        ]
    return fused.reshape(*leading, n_heads if part == "q" else n_kv_heads, -1)


def split_branch(fused: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Take one branch of a gated MLP from the last axis of a module that may compute both."""
    if layout == "whole":
        return fused
    half = fused.shape[-1] // 2
    return fused[..., :half] if layout == "first_half" else fused[..., half:]

"""Cut the output axis of a projection into heads: one rule for activations, weights and biases."""

from __future__ import annotations

from typing import Literal

import torch

from actpipe.hooks import ModelShape
from actpipe.models.families.entry import Layout

Part = Literal["q", "k", "v"]


def split_heads(fused: torch.Tensor, layout: Layout, part: Part, shape: ModelShape) -> torch.Tensor:
    """Cut the last axis of `fused` into `(n_heads, d_head)` of queries, keys or values.

    Args:
        fused: `(..., d_out)`: the module's output, its bias, or its weight with the input axis first.
        layout: How the module orders its output.
        part: Which of the three to take.
        shape: Sizes of the model; keys and values have `n_kv_heads` heads.

    Returns:
        `(..., n_heads, d_head)`, a view where the layout allows it.
    """
    leading = fused.shape[:-1]
    if layout == "per_head":
        return fused.reshape(*leading, shape.n_heads, 3, shape.d_head)[..., "qkv".index(part), :]
    if layout == "columns":
        sizes = [heads * shape.d_head for heads in (shape.n_heads, shape.n_kv_heads, shape.n_kv_heads)]
        fused = torch.split(fused, sizes, dim=-1)["qkv".index(part)]
    return fused.reshape(*leading, -1, shape.d_head)

"""What one architecture says of itself: where its parts are, and how they are put together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Layout = Literal["whole", "columns", "per_head"]
"""How a projection's output is cut into heads.

`whole`: the module computes this one projection, heads in order.
`columns`: one module computes all q heads, then all k heads, then all v heads (GPT-2).
`per_head`: one module computes q, k, v of head 0, then of head 1, and so on (GPT-NeoX).
"""


@dataclass(frozen=True)
class Projection:
    """Where queries, keys or values come from."""

    module: str
    """Path inside the block."""
    layout: Layout = "whole"


@dataclass(frozen=True)
class Family:
    """One architecture. Paths of `blocks`, `embed`, `pos_embed` and `final_norm` start at the base model."""

    name: str
    model_types: tuple[str, ...]
    """Values of `config.model_type` that this entry is for."""
    norm: Literal["LN", "RMS"]
    embed: str
    blocks: str
    final_norm: str
    ln1: str
    attention: str
    q: Projection
    k: Projection
    v: Projection
    out: str
    ln2: str
    mlp: str
    w_in: str
    w_out: str
    w_gate: str | None = None
    pos_embed: str | None = None
    """Module of the learned position embedding, where there is one."""
    rotary: bool = False
    parallel: bool | str = False
    """True where attention and MLP both read the block's input; a text names the configuration's flag for it."""
    default_prepend_bos: bool = True
    """TransformerLens' `default_prepend_bos`."""

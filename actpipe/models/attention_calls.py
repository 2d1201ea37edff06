"""What one run of one attention layer shows: queries, keys, scores and pattern."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch


class AttentionSeen(Protocol):
    """What one run of one attention layer shows; `(batch, head, position, ...)` all of it."""

    @property
    def query(self) -> torch.Tensor:
        """Queries `(batch, head, position, d_qk)`, after rotary."""

    @property
    def key(self) -> torch.Tensor:
        """Keys `(batch, kv_head, position, d_qk)`, after rotary."""

    @property
    def value(self) -> torch.Tensor | None:
        """Values `(batch, kv_head, position, d_head)`, where they are seen."""

    @property
    def scores(self) -> torch.Tensor:
        """Scores `(batch, head, query_position, key_position)` in float32, -inf where masked."""

    @property
    def pattern(self) -> torch.Tensor:
        """Softmax of the scores over key positions, in float32; zero in rows that may attend to nothing."""

    @property
    def output(self) -> torch.Tensor | None:
        """What the attention function gave, `(batch, position, head, d_head)`, where it is seen."""


@dataclass
class AttentionCall:
    """What one attention function was given.

    `query` is `(batch, head, position, d_head)`, `key` and `value` `(batch, kv_head, position, d_head)`,
    after rotary. `mask` is boolean (True: may attend), additive, or None for plain causal.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor | None
    mask: torch.Tensor | None
    scaling: float
    is_causal: bool
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    alibi: bool = False
    output: torch.Tensor | None = None

    @cached_property
    def scores(self) -> torch.Tensor:
        """Scores after soft cap and bias; ALiBi's bias counted from the query."""
        key = self.key.float().repeat_interleave(self.query.shape[1] // self.key.shape[1], dim=1)
        scores = (self.query.float() @ key.transpose(-1, -2)).mul_(self.scaling)
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        if self.bias is not None:
            scores = scores + self.bias.float()
        return self._masked(scores)

    def _masked(self, scores: torch.Tensor) -> torch.Tensor:
        if self.mask is None:
            if not self.is_causal:
                return scores
            n_queries, n_keys = scores.shape[-2:]
            ahead = torch.arange(n_keys, device=scores.device) - torch.arange(
                n_keys - n_queries, n_keys, device=scores.device
            ).unsqueeze(-1)
            blocked = ahead > 0 if self.window is None else (ahead > 0) | (ahead <= -self.window)
            return scores.masked_fill(blocked, -torch.inf)
        mask = self.mask[..., : scores.shape[-1]]
        if mask.dtype == torch.bool:
            return scores.masked_fill(~mask, -torch.inf)
        blocked = mask <= torch.finfo(mask.dtype).min
        added = mask.float()
        if self.alibi:
            added = added - _own_keys(added.masked_fill(blocked, 0))
        return (scores + added).masked_fill(blocked, -torch.inf)

    @cached_property
    def pattern(self) -> torch.Tensor:
        """Softmax of the scores, a sink taking its share."""
        if self.sinks is None:
            pattern = self.scores.softmax(dim=-1)
            return pattern if self.mask is None else pattern.nan_to_num(nan=0.0)
        sink = self.sinks.float().reshape(1, -1, 1, 1).expand(*self.scores.shape[:-1], 1)
        return torch.cat([self.scores, sink], dim=-1).softmax(dim=-1)[..., :-1]


@dataclass
class SoftmaxCall:
    """What went into, and came out of, the softmax of an attention layer with code of its own."""

    query: torch.Tensor
    key: torch.Tensor
    before: torch.Tensor
    after: torch.Tensor
    least: float
    """Half-precision models mask with the smallest number of their own type."""
    alibi: bool = False
    value: None = None
    output: None = None

    @cached_property
    def scores(self) -> torch.Tensor:
        """What the softmax took; ALiBi's bias counted from the query, as in TransformerLens."""
        scores = self.before.float()
        blocked = scores <= self.least / 64
        if self.alibi:
            own = self.key[:, :, -self.query.shape[2] :]
            plain = (self.query.float() * own.float()).sum(-1) * self.query.shape[-1] ** -0.5
            scores = scores - (_own_keys(scores) - plain.unsqueeze(-1))
        return scores.masked_fill(blocked, -torch.inf)

    @cached_property
    def pattern(self) -> torch.Tensor:
        """What the softmax gave."""
        nothing = torch.isneginf(self.scores).all(dim=-1, keepdim=True)
        return self.after.float().masked_fill(nothing, 0.0)


def _own_keys(scores: torch.Tensor) -> torch.Tensor:
    """Return `(..., query_position, 1)`: what stands at each query's own key; the last keys are the queries' own."""
    n_queries, n_keys = scores.shape[-2:]
    return torch.diagonal(scores, n_keys - n_queries, dim1=-2, dim2=-1).unsqueeze(-1)

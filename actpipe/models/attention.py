"""The attention function that sees queries, keys and the mask, and the numbers read from them.

The model's output always comes from PyTorch's fused kernel, whoever is looking on: scores and
patterns are computed beside it, so asking for them moves no other activation.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from actpipe.errors import UnsupportedModelError

IMPLEMENTATION = "actpipe"
"""The name under which the function is registered with transformers."""

_WITHOUT_EFFECT = {"position_ids", "cache_position"}
"""Tensors that models pass along and that the fused kernel does not use either."""


@dataclass
class AttentionCall:
    """What one attention layer was given.

    `query` is `(batch, head, position, d_head)`, `key` `(batch, kv_head, position, d_head)`, both
    after rotary. `mask` is boolean (True: may attend), additive, or None for plain causal.
    """

    query: torch.Tensor
    key: torch.Tensor
    mask: torch.Tensor | None
    scaling: float
    is_causal: bool

    @cached_property
    def scores(self) -> torch.Tensor:
        """Scaled scores `(batch, head, query_position, key_position)` in float32, -inf where masked."""
        key = self.key.float().repeat_interleave(self.query.shape[1] // self.key.shape[1], dim=1)
        scores = self.query.float() @ key.transpose(-1, -2) * self.scaling
        if self.mask is None:
            if self.is_causal:
                future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
                scores.masked_fill_(future, -torch.inf)
            return scores
        if self.mask.dtype == torch.bool:
            return scores.masked_fill_(~self.mask, -torch.inf)
        blocked = self.mask <= torch.finfo(self.mask.dtype).min
        return (scores + self.mask).masked_fill_(blocked, -torch.inf)

    @cached_property
    def pattern(self) -> torch.Tensor:
        """Softmax of the scores over key positions, in float32; zero in rows that may attend to nothing."""
        return self.scores.softmax(dim=-1).nan_to_num_(nan=0.0)


Observer = Callable[[AttentionCall], None]
_observers: weakref.WeakKeyDictionary[nn.Module, Observer] = weakref.WeakKeyDictionary()


def observe(module: nn.Module, observer: Observer | None) -> None:
    """Call `observer` whenever this attention module runs; None takes it off again."""
    if observer is None:
        _observers.pop(module, None)
    else:
        _observers[module] = observer


def observed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Run the fused kernel, and show the call to the module's observer, if it has one."""
    observer = _observers.get(module)
    if observer is not None:
        unknown = [n for n, v in kwargs.items() if isinstance(v, torch.Tensor) and n not in _WITHOUT_EFFECT]
        if unknown or kwargs.get("softcap") is not None:
            raise UnsupportedModelError(
                f"{type(module).__name__} passes {', '.join(unknown) or 'softcap'} to its attention function, "
                "which scores and patterns would not reflect; leave attention hooks of this model out"
            )
        causal = kwargs.get("is_causal")
        observer(
            AttentionCall(
                query=query,
                key=key,
                mask=attention_mask,
                scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
                is_causal=bool(getattr(module, "is_causal", True) if causal is None else causal),
            )
        )
    output: tuple[torch.Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, **kwargs
    )
    return output


AttentionInterface.register(IMPLEMENTATION, observed_attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)

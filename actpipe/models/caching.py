"""Keys and values of what a model has read already, so that what follows is run without it."""

from __future__ import annotations

import copy
from typing import Any, Self

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from actpipe.errors import UnsupportedModelError
from actpipe.hooks import ModelShape
from actpipe.models.anatomy import Anatomy


class KeyValueCache:
    """What attention needs of the tokens before: all keys and values, those beyond a window too.

    Keeping every key means that a pattern's key positions are those of the whole sequence.

    Args:
        anatomy: The model, a decoder of one stack.

    Raises:
        UnsupportedModelError: The model has no such cache.
    """

    def __init__(self, anatomy: Anatomy) -> None:
        if not anatomy.shape.causal or anatomy.shape.encoder_decoder:
            raise UnsupportedModelError(
                f"a {anatomy.family.name} model has no keys and values to keep: its tokens see what follows them"
            )
        self._shape: ModelShape = anatomy.shape
        self._native = _empty(anatomy.native)
        self._mask: torch.Tensor | None = None
        self.n_tokens = 0
        """Positions held, padding included."""

    def extend(self, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Return what the native model is given so that `inputs` follow what is held; they are then held too.

        Args:
            inputs: `input_ids` `(batch, position)`, and `attention_mask` of the same shape if there is padding.

        Raises:
            ValueError: Together they are longer than what the model has learned, or another batch.
        """
        ids = inputs["input_ids"]
        n_before, n_after = self.n_tokens, self.n_tokens + ids.shape[1]
        if self._shape.learned_positions and n_after > self._shape.n_ctx:
            raise ValueError(
                f"{n_before} positions are held and {ids.shape[1]} follow, but this model has learned only "
                f"{self._shape.n_ctx}"
            )
        given: dict[str, Any] = {**inputs, "past_key_values": self._native, "use_cache": True}
        mask = inputs.get("attention_mask")
        if mask is not None or self._mask is not None:
            before = ids.new_ones((ids.shape[0], n_before)) if self._mask is None else self._mask
            if before.shape[0] != ids.shape[0]:
                raise ValueError(f"a batch of {ids.shape[0]} cannot follow a batch of {before.shape[0]}")
            self._mask = torch.cat([before, torch.ones_like(ids) if mask is None else mask], dim=1)
            given["attention_mask"] = self._mask
            positions = real_positions(self._mask)
            if positions is not None:
                given["position_ids"] = positions[:, n_before:]
        self.n_tokens = n_after
        return given

    def repeated(self, n_sequences: int) -> Self:
        """Return a copy in which what is held stands before each of so many sequences."""
        other = copy.copy(self)
        other._native = copy.deepcopy(self._native)
        other._native.batch_repeat_interleave(n_sequences)
        other._mask = None if self._mask is None else self._mask.repeat_interleave(n_sequences, dim=0)
        return other


def real_positions(attention_mask: torch.Tensor) -> torch.Tensor | None:
    """Return positions that count real tokens, where padding stands before some; None where the model's own do."""
    if not bool((attention_mask[:, 1:] > attention_mask[:, :-1]).any()):
        return None
    return (attention_mask.cumsum(-1) - 1).clamp_min(0)


def _empty(native: PreTrainedModel) -> DynamicCache:
    cache = DynamicCache(config=native.config)
    cache.layers = [DynamicLayer() if type(layer) is DynamicSlidingWindowLayer else layer for layer in cache.layers]
    return cache

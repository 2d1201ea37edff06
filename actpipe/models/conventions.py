"""Activations as a model with processed weights has them, read from the model as it is.

Processing changes no prediction; it moves means and biases around. So the activations of the
processed model are linear functions of the native ones, and no second model is needed.

Source: TransformerLens 2.16, `load_and_process_state_dict` with its defaults; see `processing`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch

from actpipe.errors import UnsupportedModelError
from actpipe.hooks import HookPoint
from actpipe.models.anatomy import Anatomy
from actpipe.models.processing import check_processable
from actpipe.models.taps import Tap, tap_before_affine
from actpipe.models.weights import Weights

Convention = Literal["native", "processed"]

_WRITTEN = {"hook_embed", "hook_pos_embed", "hook_attn_out", "hook_mlp_out"}
_STREAM = {"hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_mlp_in", "hook_attn_in"}
_COPIES = {"hook_q_input", "hook_k_input", "hook_v_input"}


def check_convention(anatomy: Anatomy) -> None:
    """Refuse models whose processed activations cannot be told from their own.

    Raises:
        UnsupportedModelError: Says why, and what to use.
    """
    check_processable(anatomy.shape)
    if anatomy.family.by_structure:
        raise UnsupportedModelError(
            f"the processed convention is not offered for {anatomy.family.name}, which has no entry; "
            "use convention='native'"
        )
    if anatomy.shape.embed_norm:
        raise UnsupportedModelError(
            f"the processed convention is not offered for {anatomy.family.name}: its embedding passes a norm, "
            "so the stream's mean cannot be told from the stream alone; use convention='native'"
        )


class Processed:
    """Turns taps of the native model into taps of the processed one."""

    def __init__(self, anatomy: Anatomy, weights: Weights) -> None:
        check_convention(anatomy)
        self._anatomy = anatomy
        self._weights = weights
        self._centered = anatomy.shape.norm == "LN"

    def tap(self, tap: Tap, point: HookPoint) -> Tap:
        """Return the tap that reads what the processed model has at this point."""
        if point.kind.endswith("hook_normalized"):
            return tap_before_affine(self._anatomy, tap)
        change = self._change(point)
        if change is None:
            return tap
        return replace(tap, read=lambda value: change(tap.read(value)))

    def logits(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the logits of the processed model: their mean over the vocabulary is zero."""
        if self._anatomy.shape.logit_softcap is not None:
            return logits
        return logits - logits.mean(-1, keepdim=True)

    def _change(self, point: HookPoint) -> Callable[[Any], torch.Tensor] | None:
        kind, layer = point.kind, point.layer
        if kind in _WRITTEN | _STREAM | _COPIES:
            return _centre if self._centered else None
        if layer is None or kind not in ("attn.hook_v", "attn.hook_z", "attn.hook_result"):
            return None
        bias = self._folded_bias(layer)
        if kind == "attn.hook_v":
            block = self._anatomy.shape.blocks[layer]
            return lambda v: v - bias[:: block.n_heads // block.n_kv_heads].to(v)
        if kind == "attn.hook_z":
            return lambda z: z - bias.to(z)
        constant = torch.einsum("hd,hdm->hm", bias, self._weights[f"blocks.{layer}.attn.W_O"])
        if not self._centered:
            return lambda result: result - constant.to(result)
        return lambda result: _centre(result - constant.to(result))

    def _folded_bias(self, layer: int) -> torch.Tensor:
        """Return `(head, d_head)`: what folding takes from every head's values."""
        prefix = f"blocks.{layer}."
        if not self._anatomy.shape.blocks[layer].projections:
            block = self._anatomy.shape.blocks[layer]
            return torch.zeros(block.n_heads, block.d_head)
        bias = self._weights[f"{prefix}attn.b_V"]
        if self._centered and self._anatomy.shape.blocks[layer].ln1:
            shift, W_V = self._weights[f"{prefix}ln1.b"], self._weights[f"{prefix}attn.W_V"]
            bias = bias + torch.einsum("m,hmd->hd", shift.to(W_V), W_V)
        return bias


def _centre(tensor: torch.Tensor) -> torch.Tensor:
    return tensor - tensor.mean(-1, keepdim=True)

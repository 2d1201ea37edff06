"""What encoders and encoder-decoders are given beside ids and mask, checked before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from actpipe.models.anatomy import Anatomy

InputIds = torch.Tensor | npt.NDArray[Any] | Sequence[int] | Sequence[Sequence[int]]


def add_encoder_inputs(
    inputs: dict[str, torch.Tensor],
    anatomy: Anatomy,
    token_type_ids: InputIds | None,
    decoder_input_ids: InputIds | None,
) -> None:
    """Add segments and the decoder's input, and positions where padding on the left moves them.

    Args:
        inputs: `input_ids` and, where given, `attention_mask` and `position_ids`; changed in place.
        anatomy: The model.
        token_type_ids: Segment of each token, of the shape of the ids; without it all are 0.
        decoder_input_ids: `(batch, position)`; without it the token with which the decoder starts.

    Raises:
        ValueError: They do not fit the model or the ids.
    """
    ids = inputs["input_ids"]
    if token_type_ids is not None:
        inputs["token_type_ids"] = _segments(anatomy, ids, token_type_ids)
    if anatomy.shape.encoder_decoder:
        inputs["decoder_input_ids"] = _decoder_ids(anatomy, ids, decoder_input_ids)
    elif decoder_input_ids is not None:
        raise ValueError(f"decoder_input_ids are given, but this {anatomy.family.name} model has no decoder")
    if "position_ids" in inputs:
        _place(inputs, anatomy)


def _place(inputs: dict[str, torch.Tensor], anatomy: Anatomy) -> None:
    """Settle the positions of a batch with padding on the left."""
    family = anatomy.family
    if not family.takes_position_ids:
        del inputs["position_ids"]
        if anatomy.shape.learned_positions:
            raise ValueError(
                f"attention_mask has 0 before 1, but {family.name} counts positions from the first token, padding or "
                "not; pad on the right"
            )
    elif family.pads_have_no_position:
        inputs["position_ids"] = inputs["position_ids"] + family.position_offset(anatomy.native.config)


def _segments(anatomy: Anatomy, ids: torch.Tensor, token_type_ids: InputIds) -> torch.Tensor:
    n_types = anatomy.shape.token_types
    if not n_types:
        raise ValueError(f"token_type_ids are given, but this {anatomy.family.name} model tells no segments apart")
    segments = as_batch(token_type_ids)
    if segments.shape != ids.shape:
        raise ValueError(f"token_type_ids are {tuple(segments.shape)}, input_ids are {tuple(ids.shape)}")
    low, high = int(segments.min()), int(segments.max())
    if low < 0 or high >= n_types:
        raise ValueError(f"token_type_ids go from {low} to {high}, but this model has types 0 to {n_types - 1}")
    return segments.to(ids.device, torch.long)


def _decoder_ids(anatomy: Anatomy, ids: torch.Tensor, decoder_input_ids: InputIds | None) -> torch.Tensor:
    if decoder_input_ids is None:
        return ids.new_full((ids.shape[0], 1), _start_token(anatomy))
    decoder_ids = as_batch(decoder_input_ids)
    if decoder_ids.ndim != 2 or decoder_ids.shape[0] != ids.shape[0] or decoder_ids.numel() == 0:
        raise ValueError(
            f"decoder_input_ids must be (batch, position) for a batch of {ids.shape[0]}, got {tuple(decoder_ids.shape)}"
        )
    if anatomy.shape.learned_positions and decoder_ids.shape[1] > anatomy.shape.n_ctx:
        raise ValueError(
            f"{decoder_ids.shape[1]} decoder positions, but this model has learned only {anatomy.shape.n_ctx}"
        )
    low, high = int(decoder_ids.min()), int(decoder_ids.max())
    if low < 0 or high >= anatomy.shape.d_vocab:
        raise ValueError(
            f"decoder token id {low if low < 0 else high} is outside the vocabulary of {anatomy.shape.d_vocab}"
        )
    return decoder_ids.to(ids.device, torch.long)


def _start_token(anatomy: Anatomy) -> int:
    native = anatomy.native
    for config in (native.config, getattr(native, "generation_config", None)):
        start = getattr(config, "decoder_start_token_id", None)
        if start is not None:
            return int(start)
    raise ValueError(
        "this model does not say with which token its decoder starts; give decoder_input_ids, (batch, position)"
    )


def as_batch(ids: InputIds) -> torch.Tensor:
    """Return ids as `(batch, position)`, one sequence as a batch of one; arrays are copied: they may be read-only."""
    tensor = ids if isinstance(ids, torch.Tensor) else torch.from_numpy(np.array(ids))
    return tensor[None] if tensor.ndim == 1 else tensor

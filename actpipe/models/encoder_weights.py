"""Weights around the blocks of encoders and encoder-decoders, under TransformerLens' names.

Source: TransformerLens 2.16, `weight_conversions/bert.py` and `t5.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from actpipe.models.anatomy import Anatomy, matrix

Getters = dict[str, Callable[[], torch.Tensor]]


def outside_blocks(anatomy: Anatomy, norm: Callable[[str, nn.Module], Getters]) -> Getters:
    """Return what reads each weight outside the blocks.

    Args:
        anatomy: The model.
        norm: Gives the weights of a norm by the beginning of their names.
    """
    getters = _embedding(anatomy, norm) if anatomy.embed_norm is not None else _only_tokens(anatomy, "embed.W_E")
    if anatomy.final_norm is not None:
        getters |= norm("encoder_final_ln", anatomy.final_norm)
    if anatomy.decoder is not None and anatomy.decoder.final_norm is not None:
        getters |= norm("decoder_final_ln", anatomy.decoder.final_norm)
    if anatomy.heads is not None:
        getters |= _linear("mlm_head", anatomy.heads.dense) | norm("mlm_head.ln", anatomy.heads.norm)
        if anatomy.heads.pooler is not None and anatomy.heads.next_sentence is not None:
            dense = anatomy.heads.pooler.get_submodule("dense")
            getters |= _linear("pooler", dense) | _linear("nsp_head", anatomy.heads.next_sentence)
    getters["unembed.W_U"] = lambda: matrix(anatomy.unembed)
    getters["unembed.b_U"] = lambda: _logit_bias(anatomy)
    return getters


def _only_tokens(anatomy: Anatomy, name: str) -> Getters:
    scale = float(anatomy.family.embed_scale(anatomy.native.config))
    return {name: lambda: _parameter(anatomy.embed) * scale if scale != 1.0 else _parameter(anatomy.embed)}


def _embedding(anatomy: Anatomy, norm: Callable[[str, nn.Module], Getters]) -> Getters:
    offset = anatomy.family.position_offset(anatomy.native.config)
    getters = _only_tokens(anatomy, "embed.embed.W_E")
    getters["embed.pos_embed.W_pos"] = lambda: _parameter(anatomy.pos_embed)[offset:]
    if anatomy.token_type_embed is not None:
        getters["embed.token_type_embed.W_token_type"] = lambda: _parameter(anatomy.token_type_embed)
    assert anatomy.embed_norm is not None
    getters |= norm("embed.ln", anatomy.embed_norm)
    decoder = anatomy.decoder
    if decoder is not None and decoder.embed_norm is not None:
        getters["decoder_embed.pos_embed.W_pos"] = lambda: _parameter(decoder.pos_embed)[offset:]
        getters |= norm("decoder_embed.ln", decoder.embed_norm)
    return getters


def _linear(name: str, module: nn.Module) -> Getters:
    return {f"{name}.W": lambda: matrix(module), f"{name}.b": lambda: _parameter(module, "bias")}


def _parameter(module: nn.Module | None, name: str = "weight") -> torch.Tensor:
    parameter = getattr(module, name)
    assert isinstance(parameter, torch.Tensor)
    return parameter


def _logit_bias(anatomy: Anatomy) -> torch.Tensor:
    """Return what is added to the logits, zeros where nothing is."""
    bias = getattr(anatomy.unembed, "bias", None)
    if anatomy.family.logit_bias is not None:
        bias = getattr(anatomy.native, anatomy.family.logit_bias).reshape(-1)
    weight = matrix(anatomy.unembed)
    return weight.new_zeros(weight.shape[1]) if bias is None else bias

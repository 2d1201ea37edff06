"""Weights around the blocks of encoders and encoder-decoders, under TransformerLens' names.

Source: TransformerLens 2.16, `weight_conversions/bert.py` and `t5.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from actpipe.models.anatomy import Anatomy, matrix
from actpipe.models.parameters import Reader

Getters = dict[str, Callable[[], torch.Tensor]]


def outside_blocks(anatomy: Anatomy, norm: Callable[[str, nn.Module], Getters], read: Reader) -> Getters:
    """Return what reads each weight outside the blocks.

    Args:
        anatomy: The model.
        norm: Gives the weights of a norm by the beginning of their names.
        read: Reads a parameter of a module.
    """
    getters = _embedding(anatomy, norm, read) if anatomy.embed_norm else _only_tokens(anatomy, "embed.W_E", read)
    if anatomy.final_norm is not None:
        getters |= norm("encoder_final_ln", anatomy.final_norm)
    if anatomy.decoder is not None and anatomy.decoder.final_norm is not None:
        getters |= norm("decoder_final_ln", anatomy.decoder.final_norm)
    if anatomy.heads is not None:
        getters |= _linear("mlm_head", anatomy.heads.dense, read) | norm("mlm_head.ln", anatomy.heads.norm)
        if anatomy.heads.pooler is not None and anatomy.heads.next_sentence is not None:
            dense = anatomy.heads.pooler.get_submodule("dense")
            getters |= _linear("pooler", dense, read) | _linear("nsp_head", anatomy.heads.next_sentence, read)
    getters["unembed.W_U"] = lambda: matrix(anatomy.unembed, read)
    getters["unembed.b_U"] = lambda: _logit_bias(anatomy, read)
    return getters


def _only_tokens(anatomy: Anatomy, name: str, read: Reader) -> Getters:
    scale = float(anatomy.family.embed_scale(anatomy.native.config))
    return {name: lambda: _parameter(read, anatomy.embed) * (scale if scale != 1.0 else 1)}


def _embedding(anatomy: Anatomy, norm: Callable[[str, nn.Module], Getters], read: Reader) -> Getters:
    offset = anatomy.family.position_offset(anatomy.native.config)
    getters = _only_tokens(anatomy, "embed.embed.W_E", read)
    getters["embed.pos_embed.W_pos"] = lambda: _parameter(read, anatomy.pos_embed)[offset:]
    if anatomy.token_type_embed is not None:
        getters["embed.token_type_embed.W_token_type"] = lambda: _parameter(read, anatomy.token_type_embed)
    assert anatomy.embed_norm is not None
    getters |= norm("embed.ln", anatomy.embed_norm)
    decoder = anatomy.decoder
    if decoder is not None and decoder.embed_norm is not None:
        getters["decoder_embed.pos_embed.W_pos"] = lambda: _parameter(read, decoder.pos_embed)[offset:]
        getters |= norm("decoder_embed.ln", decoder.embed_norm)
    return getters


def _linear(name: str, module: nn.Module, read: Reader) -> Getters:
    return {f"{name}.W": lambda: matrix(module, read), f"{name}.b": lambda: _parameter(read, module, "bias")}


def _parameter(read: Reader, module: nn.Module | None, name: str = "weight") -> torch.Tensor:
    assert module is not None
    parameter = read(module, name)
    assert parameter is not None
    return parameter


def _logit_bias(anatomy: Anatomy, read: Reader) -> torch.Tensor:
    """Return what is added to the logits, zeros where nothing is."""
    bias = read(anatomy.unembed, "bias")
    if anatomy.family.logit_bias is not None:
        own = read(anatomy.native, anatomy.family.logit_bias)
        bias = own.reshape(-1) if own is not None else None
    weight = matrix(anatomy.unembed, read)
    return weight.new_zeros(weight.shape[1]) if bias is None else bias

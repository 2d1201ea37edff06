"""The parts around the blocks: one set for each stack of a model, and what encoders have on top."""

from __future__ import annotations

import operator
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from actpipe.models.families.entry import Family, Heads


@dataclass(frozen=True)
class Stack:
    """One stack of blocks, and what stands before and after it."""

    family: Family
    embed: nn.Module
    embed_norm: nn.Module | None
    pos_embed: nn.Module | None
    blocks: tuple[nn.Module, ...]
    final_norm: nn.Module | None


@dataclass(frozen=True)
class HeadParts:
    """What stands above the last block of an encoder."""

    dense: nn.Module
    norm: nn.Module
    activation: str
    pooler: nn.Module | None
    next_sentence: nn.Module | None


def bind_stack(family: Family, base: nn.Module) -> Stack:
    """Find one stack below the base model."""
    return Stack(
        family=family,
        embed=base.get_submodule(family.embed),
        embed_norm=base.get_submodule(family.embed_norm) if family.embed_norm else None,
        pos_embed=base.get_submodule(family.pos_embed) if family.pos_embed else None,
        blocks=tuple(operator.attrgetter(family.blocks)(base)),
        final_norm=base.get_submodule(family.final_norm) if family.final_norm else None,
    )


def bind_heads(heads: Heads, native: PreTrainedModel) -> HeadParts:
    """Find the heads; the one for the next sentence is there only in a model that was loaded with it."""
    parts = dict(native.named_modules())
    return HeadParts(
        dense=native.get_submodule(heads.dense),
        norm=native.get_submodule(heads.norm),
        activation=heads.activation(native.config),
        pooler=parts.get(heads.pooler or "?"),
        next_sentence=parts.get(heads.next_sentence or "?"),
    )

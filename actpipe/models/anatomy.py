"""A family's paths bound to the modules of one model."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from actpipe.errors import UnsupportedModelError
from actpipe.hooks import ModelShape
from actpipe.models.families import family_of
from actpipe.models.families.entry import Family


@dataclass(frozen=True)
class Anatomy:
    """Where the parts of one model are; holds for a skeleton without weights too."""

    family: Family
    native: PreTrainedModel
    shape: ModelShape
    embed: nn.Module
    pos_embed: nn.Module | None
    blocks: tuple[nn.Module, ...]
    final_norm: nn.Module
    unembed: nn.Module

    def part(self, layer: int, path: str) -> nn.Module:
        """Return a module of one block by its path."""
        return self.blocks[layer].get_submodule(path)


def find_anatomy(native: PreTrainedModel) -> Anatomy:
    """Bind the entry for this model's type to its modules.

    Raises:
        UnsupportedModelError: No entry for the type, or a path of the entry leads nowhere.
    """
    family = family_of(native.config.model_type)
    try:
        return _bind(family, native)
    except AttributeError as error:
        raise UnsupportedModelError(
            f"a {native.config.model_type!r} model of this version of transformers is not laid out as the "
            f"entry {family.name!r} says: {error}"
        ) from error


def _bind(family: Family, native: PreTrainedModel) -> Anatomy:
    base = native.base_model
    blocks = tuple(operator.attrgetter(family.blocks)(base))
    unembed = native.get_output_embeddings()
    if unembed is None:
        raise UnsupportedModelError(f"{type(native).__name__} has no unembedding; load a causal language model")
    return Anatomy(
        family=family,
        native=native,
        shape=_measure(family, native, blocks[0]),
        embed=base.get_submodule(family.embed),
        pos_embed=base.get_submodule(family.pos_embed) if family.pos_embed else None,
        blocks=blocks,
        final_norm=base.get_submodule(family.final_norm),
        unembed=unembed,
    )


def _measure(family: Family, native: PreTrainedModel, block: nn.Module) -> ModelShape:
    config = native.config
    d_model, n_heads = int(config.hidden_size), int(config.num_attention_heads)
    parallel = family.parallel if isinstance(family.parallel, bool) else bool(getattr(config, family.parallel))
    return ModelShape(
        n_layers=int(config.num_hidden_layers),
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=int(getattr(config, "num_key_value_heads", None) or n_heads),
        d_head=int(getattr(config, "head_dim", None) or d_model // n_heads),
        d_mlp=input_size(block.get_submodule(family.w_out)),
        d_vocab=int(config.vocab_size),
        n_ctx=int(config.max_position_embeddings),
        norm=family.norm,
        learned_positions=family.pos_embed is not None,
        rotary=family.rotary,
        parallel=parallel,
        gated=family.w_gate is not None,
    )


def matrix(linear: nn.Module) -> torch.Tensor:
    """Return a linear module's weight as `(d_in, d_out)`, so that `x @ W` is what it computes."""
    weight = linear.weight
    assert isinstance(weight, torch.Tensor)
    return weight.T if isinstance(linear, nn.Linear) else weight


def input_size(linear: nn.Module) -> int:
    """Return the length of the vectors that a linear module takes."""
    return int(matrix(linear).shape[0])


def norm_epsilon(norm: nn.Module) -> float:
    """Return the epsilon of a norm, which modules keep under different names."""
    for name in ("eps", "variance_epsilon"):
        if hasattr(norm, name):
            return float(getattr(norm, name))
    raise UnsupportedModelError(f"{type(norm).__name__} does not say its epsilon")

"""A family's paths bound to the modules of one model."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from actpipe.errors import UnsupportedModelError
from actpipe.hooks import BlockShape, ModelShape
from actpipe.models.families import family_of
from actpipe.models.families.entry import Family, Paths, n_heads
from actpipe.models.parameters import Reader, read_parameter


@dataclass(frozen=True)
class Anatomy:
    """Where the parts of one model are; holds for a skeleton without weights too."""

    family: Family
    native: PreTrainedModel
    shape: ModelShape
    embed: nn.Module
    embed_norm: nn.Module | None
    pos_embed: nn.Module | None
    blocks: tuple[nn.Module, ...]
    final_norm: nn.Module
    unembed: nn.Module

    def part(self, layer: int, paths: Paths) -> nn.Module:
        """Return a module of one block by its path, or by the first of several that the block has."""
        found = find_part(self.blocks[layer], paths)
        if found is None:
            raise AttributeError(f"{type(self.blocks[layer]).__name__} has no {paths}")
        return found

    @property
    def branch_scale(self) -> float:
        """What attention's and the MLP's outputs are multiplied with before they are added."""
        return float(self.family.branch_scale(self.native.config))

    @property
    def logit_scale(self) -> float:
        """What the unembedding's output is multiplied with."""
        return float(self.family.logit_scale(self.native.config))

    @property
    def alibi(self) -> bool:
        """Whether scores are lowered by distance."""
        return self.family.is_alibi(self.native.config)


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


def find_part(block: nn.Module, paths: Paths | None) -> nn.Module | None:
    """Return the first of the paths that leads to a module of this block, if one does."""
    for path in (paths,) if isinstance(paths, str) else paths or ():
        try:
            return block.get_submodule(path)
        except AttributeError:
            continue
    return None


def _bind(family: Family, native: PreTrainedModel) -> Anatomy:
    base, config = native.base_model, native.config
    blocks = tuple(operator.attrgetter(family.blocks)(base))
    unembed = native.get_output_embeddings()
    if unembed is None:
        raise UnsupportedModelError(f"{type(native).__name__} has no unembedding; load a causal language model")
    shape = ModelShape(
        d_model=int(config.hidden_size),
        d_vocab=linear_sizes(unembed)[1],
        n_ctx=_context(config),
        norm=family.norm,
        learned_positions=family.pos_embed is not None,
        blocks=tuple(_measure(family, config, block) for block in blocks),
        embed_norm=family.embed_norm is not None,
        logit_softcap=getattr(config, "final_logit_softcapping", None),
    )
    return Anatomy(
        family=family,
        native=native,
        shape=shape,
        embed=base.get_submodule(family.embed),
        embed_norm=base.get_submodule(family.embed_norm) if family.embed_norm else None,
        pos_embed=base.get_submodule(family.pos_embed) if family.pos_embed else None,
        blocks=blocks,
        final_norm=base.get_submodule(family.final_norm),
        unembed=unembed,
    )


def _context(config: Any) -> int:
    """Return the positions that a model was made for; ALiBi models name a length without being bound to it."""
    for name in ("max_position_embeddings", "max_seq_len", "seq_length"):
        if getattr(config, name, None):
            return int(getattr(config, name))
    return 2048


def _measure(family: Family, config: Any, block: nn.Module) -> BlockShape:
    for path in (family.attention, family.out, family.mlp):
        block.get_submodule(path)
    heads = n_heads(config)
    d_head = input_size(block.get_submodule(family.out)) // heads
    dense = find_part(block, family.w_out)
    router = find_part(block, family.router)
    mlp = "experts" if router is not None else "opaque" if dense is None else "gated" if family.w_gate else "plain"
    normed = find_part(block, family.q_norm) is not None
    for name in ("ln1", "ln2", "ln1_post", "ln2_post"):
        paths = getattr(family, name)
        if paths is not None and find_part(block, paths) is None:
            raise AttributeError(f"{type(block).__name__} has no {paths}")
    return BlockShape(
        n_heads=heads,
        n_kv_heads=family.n_kv_heads(config),
        d_head=d_head,
        d_qk=d_head if family.q is not None else config.qk_nope_head_dim + config.qk_rope_head_dim,
        d_mlp=input_size(dense) if dense is not None and router is None else 0,
        mlp=mlp,  # type: ignore[arg-type]
        n_experts=0 if router is None else linear_sizes(router)[1],
        n_experts_per_token=0 if router is None else int(config.num_experts_per_tok),
        projections=family.q is not None,
        rotary=family.is_rotary(config),
        parallel=family.is_parallel(config),
        ln1=family.ln1 is not None,
        ln2=family.ln2 is not None,
        ln1_post=family.ln1_post is not None,
        ln2_post=family.ln2_post is not None,
        qk_norm="none" if not normed else "all" if family.qk_norm_input == "all_heads" else "head",
    )


def matrix(linear: nn.Module, read: Reader = read_parameter) -> torch.Tensor:
    """Return a linear module's weight as `(d_in, d_out)`, so that `x @ W` is what it computes."""
    weight = read(linear, "weight")
    assert weight is not None
    return weight if type(linear).__name__ == "Conv1D" else weight.T


def linear_sizes(linear: nn.Module) -> tuple[int, int]:
    """Return `(d_in, d_out)` of a linear module, whose weight may be packed or offloaded."""
    if isinstance(linear, nn.Linear):
        return linear.in_features, linear.out_features
    weight = linear.weight
    assert isinstance(weight, torch.Tensor)
    first, last = weight.shape
    return (first, last) if type(linear).__name__ == "Conv1D" else (last, first)


def input_size(linear: nn.Module) -> int:
    """Return the length of the vectors that a linear module takes."""
    return linear_sizes(linear)[0]


def norm_epsilon(norm: nn.Module, default: float | None = None) -> float:
    """Return the epsilon of a norm, which modules keep under different names."""
    for name in ("eps", "variance_epsilon"):
        if hasattr(norm, name):
            return float(getattr(norm, name))
    if default is None:
        raise UnsupportedModelError(f"{type(norm).__name__} does not say its epsilon")
    return default

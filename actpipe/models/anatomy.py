"""A family's paths bound to the modules of one model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from actpipe.errors import UnsupportedModelError
from actpipe.hooks import BlockShape, ModelShape
from actpipe.models.families.entry import Family, Paths
from actpipe.models.stacks import HeadParts, Stack, bind_heads, bind_stack


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
    """Those of an encoder and then those of its decoder."""
    final_norm: nn.Module | None
    unembed: nn.Module
    token_type_embed: nn.Module | None = None
    decoder: Stack | None = None
    """What stands around the blocks of the second stack, where there is one."""
    heads: HeadParts | None = None

    def family_at(self, layer: int) -> Family:
        """Return the entry that says where the parts of a block are."""
        if self.family.layers:
            return self.family.layers[layer]
        if self.decoder is not None and self.shape.blocks[layer].stack == "decoder":
            return self.decoder.family
        return self.family

    def part(self, layer: int, paths: Paths | None) -> nn.Module:
        """Return a module of one block by its path, or by the first of several that the block has."""
        found = find_part(self.blocks[layer], paths)
        if found is None:
            raise AttributeError(f"{type(self.blocks[layer]).__name__} has no {paths}")
        return found

    @property
    def config(self) -> Any:
        """The configuration of the language model, which may be one part of a larger one."""
        return language_config(self.native)

    @property
    def branch_scale(self) -> float:
        """What attention's and the MLP's outputs are multiplied with before they are added."""
        return float(self.family.branch_scale(self.config))

    @property
    def logit_scale(self) -> float:
        """What the unembedding's output is multiplied with."""
        return float(self.family.logit_scale(self.config))

    @property
    def alibi(self) -> bool:
        """Whether scores are lowered by distance."""
        return self.family.is_alibi(self.config)


def language_config(native: PreTrainedModel) -> Any:
    """Return the part of a model's configuration that is of its language model: all of it, if it has no parts."""
    return native.config.get_text_config(decoder=True) if native.config.sub_configs else native.config


def find_anatomy(native: PreTrainedModel, family: Family) -> Anatomy:
    """Bind an entry to the modules of a model.

    Raises:
        UnsupportedModelError: A path of the entry leads nowhere.
    """
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
    base, config = native.base_model, language_config(native)
    first = bind_stack(family, base)
    decoder = None if family.decoder is None else bind_stack(family.decoder, base)
    stacks = (first,) if decoder is None else (first, decoder)
    blocks = tuple(block for stack in stacks for block in stack.blocks)
    entries = family.layers or tuple(stack.family for stack in stacks for _ in stack.blocks)
    if len(entries) != len(blocks):
        raise AttributeError(f"{len(entries)} layers were looked at, and the model has {len(blocks)}")
    unembed = native.get_output_embeddings()
    if unembed is None:
        raise UnsupportedModelError(
            f"{type(native).__name__} has no unembedding; load it with its language-modelling head"
        )
    token_types = base.get_submodule(family.token_type_embed) if family.token_type_embed else None
    heads = None if family.heads is None else bind_heads(family.heads, native)
    shape = ModelShape(
        d_model=int(config.hidden_size),
        d_vocab=int(matrix(unembed).shape[1]),
        n_ctx=_context(config, first),
        norm=family.norm,
        learned_positions=family.pos_embed is not None,
        blocks=tuple(_measure(entry, config, block) for entry, block in zip(entries, blocks, strict=True)),
        embed_norm=family.embed_norm is not None,
        logit_softcap=getattr(config, "final_logit_softcapping", None),
        final_norm=family.final_norm is not None,
        token_types=0 if token_types is None else int(matrix(token_types).shape[1]),
        masked_head=heads is not None,
        next_sentence=heads is not None and heads.next_sentence is not None,
        withheld=tuple(family.withheld),
    )
    return Anatomy(
        family=family,
        native=native,
        shape=shape,
        embed=first.embed,
        embed_norm=first.embed_norm,
        pos_embed=first.pos_embed,
        blocks=blocks,
        final_norm=first.final_norm,
        unembed=unembed,
        token_type_embed=token_types,
        decoder=decoder,
        heads=heads,
    )


def _context(config: Any, stack: Stack) -> int:
    """Return the positions that a model was made for; ALiBi models name a length without being bound to it."""
    names = ("max_position_embeddings", "max_seq_len", "seq_length")
    length = next((int(getattr(config, name)) for name in names if getattr(config, name, None)), 2048)
    table = getattr(stack.pos_embed, "weight", None)
    return length if table is None else min(length, len(table) - stack.family.position_offset(config))


def _measure(family: Family, config: Any, block: nn.Module) -> BlockShape:
    cross = (family.cross.attention,) if family.cross else ()
    for path in (family.attention, family.out, family.mlp, *family.others.values(), *cross):
        if path is not None:
            block.get_submodule(path)
    heads = family.n_heads(config)
    out = find_part(block, family.out)
    d_head = input_size(out) // heads if out is not None else _head_size(config, heads)
    dense = find_part(block, family.w_out)
    router = find_part(block, family.router)
    gated = family.gate(config) is not None
    mlp = "experts" if router is not None else "opaque" if dense is None else "gated" if gated else "plain"
    normed = find_part(block, family.q_norm) is not None
    for name in ("ln1", "ln2", "ln3", "ln1_post", "ln2_post"):
        paths = getattr(family, name)
        if paths is not None and find_part(block, paths) is None:
            raise AttributeError(f"{type(block).__name__} has no {paths}")
    return BlockShape(
        n_heads=heads,
        n_kv_heads=family.n_kv_heads(config),
        d_head=d_head,
        d_qk=d_head if family.d_qk is None else family.d_qk(config),
        d_mlp=input_size(dense) if dense is not None and router is None else 0,
        mlp=mlp,  # type: ignore[arg-type]
        n_experts=0 if router is None else matrix(router).shape[1],
        n_experts_per_token=0 if router is None else _n_chosen(config),
        projections=family.q is not None,
        rotary=family.is_rotary(config),
        parallel=family.is_parallel(config),
        ln1=family.ln1 is not None,
        ln2=family.ln2 is not None,
        ln1_post=family.ln1_post is not None,
        ln2_post=family.ln2_post is not None,
        qk_norm="none" if not normed else "all" if family.qk_norm_input == "all_heads" else "head",
        stack=family.stack,
        post_norm=family.post_norm,
        causal=family.causal,
        cross=family.cross is not None,
        relative_bias=find_part(block, family.relative_bias) is not None,
        attention=family.attention is not None,
        z=family.out is not None,
        gated_z=family.gated_z,
        branches=family.branches,
        others=tuple((kind, _output_size(block.get_submodule(path))) for kind, path in family.others.items()),
    )


def told(config: Any, name: str) -> int | None:
    """Return a whole number that a configuration says for all layers; None where it says none."""
    try:
        value = getattr(config, name, None)
    except (RuntimeError, ValueError):  # said for each layer apart
        return None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _head_size(config: Any, n_heads: int) -> int:
    return told(config, "head_dim") or config.hidden_size // n_heads


def _n_chosen(config: Any) -> int:
    """Return how many experts a token goes to, which configurations call by several names."""
    for name in ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"):
        n = told(config, name)
        if n is not None:
            return n
    raise AttributeError("the configuration does not say how many experts a token goes to")


def _output_size(module: nn.Module) -> int:
    """Return the length of what a module puts out; 0 where only a run tells."""
    return int(matrix(module).shape[1]) if hasattr(module, "weight") and module.weight.ndim == 2 else 0


def matrix(linear: nn.Module) -> torch.Tensor:
    """Return a linear module's weight as `(d_in, d_out)`, so that `x @ W` is what it computes."""
    weight = linear.weight
    assert isinstance(weight, torch.Tensor)
    return weight if type(linear).__name__ == "Conv1D" else weight.T


def input_size(linear: nn.Module) -> int:
    """Return the length of the vectors that a linear module takes."""
    return int(matrix(linear).shape[0])


def norm_epsilon(norm: nn.Module, default: float | None = None) -> float:
    """Return the epsilon of a norm, which modules keep under different names."""
    for name in ("eps", "variance_epsilon"):
        if hasattr(norm, name):
            return float(getattr(norm, name))
    if default is None:
        raise UnsupportedModelError(f"{type(norm).__name__} does not say its epsilon")
    return default

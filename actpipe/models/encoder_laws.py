"""What must hold in encoders and encoder-decoders beside what holds in every block."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from transformers.activations import ACT2FN

from actpipe.models.anatomy import norm_epsilon
from actpipe.models.hooked_model import HookedModel
from actpipe.models.law import Law, Sides
from actpipe.models.probe import Probe


def encoder_laws(model: HookedModel) -> Iterator[Law]:
    """Yield the laws of embeddings and of the heads."""
    yield from _embedding_laws(model)
    yield from _head_laws(model)


def _embedding_laws(model: HookedModel) -> Iterator[Law]:
    if model.shape.encoder_decoder:
        decoder = next(i for i, block in enumerate(model.shape.blocks) if block.stack == "decoder")
        said = "the decoder's first resid_pre = its embedding of the decoder's input"
        yield Law(said, ("hook_resid_pre",), lambda p, _: _decoder_embedding(p, decoder), per_layer=False)
    if not model.shape.embed_norm:
        for said, name in (("hook_embed = W_E[token]", "hook_embed"), ("resid_pre[0] = W_E[token]", "hook_resid_pre")):
            key = name if name == "hook_embed" else f"{model.shape.block_name(0)}.{name}"
            yield Law(said, (name,), lambda p, _, key=key: (p.cache[key], _tokens(p)), per_layer=False)  # type: ignore[misc]
        return
    pieces = ["hook_embed", "hook_pos_embed", *(["hook_token_type_embed"] if model.shape.token_types else [])]
    names = tuple(f"embed.{piece}" for piece in pieces)
    norm = ("embed.ln.hook_scale", "embed.ln.hook_normalized")
    yield Law("embed.hook_embed = W_E[token]", names[:1], lambda p, _: (p.cache[names[0]], _tokens(p)), per_layer=False)
    yield Law("embed.hook_pos_embed = W_pos[position]", names[1:2], _positions, per_layer=False)
    if model.shape.token_types:
        yield Law("embed.hook_token_type_embed = W_token_type[segment]", names[2:], _segments, per_layer=False)
    yield Law(
        "embed.ln.normalized * scale gives back the sum of the embeddings",
        (*names, *norm),
        lambda p, _: (p.cache[norm[1]], p.renormalized(_total([p.cache[name].float() for name in names]), "embed.ln")),
        per_layer=False,
    )
    full = "hook_full_embed"
    yield Law(
        "full_embed = embed.ln",
        (full, norm[1]),
        lambda p, _: (p.cache[full], p.normed("embed.ln", None)),
        per_layer=False,
    )
    yield Law(
        "resid_pre[0] = full_embed",
        (full, "hook_resid_pre"),
        lambda p, _: (p.cache[full], p.get(0, "hook_resid_pre")),
        per_layer=False,
    )


def _total(pieces: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(pieces).sum(0)


def _tokens(probe: Probe) -> torch.Tensor:
    return probe.model.weights.W_E[probe.ids].to(probe.device)


def _positions(probe: Probe, _: int) -> Sides:
    """Compare where the model counts; RoBERTa gives padding no position."""
    found, table = probe.cache["embed.hook_pos_embed"], probe.model.weights.W_pos
    positions = torch.arange(found.shape[1], device=table.device).expand_as(probe.ids)
    if probe.model.anatomy.family.pads_have_no_position:
        counted = probe.ids.to(table.device) != probe.model.native.config.pad_token_id
        positions = (counted.cumsum(-1) - 1).clamp_min(0)
        found = found * counted.unsqueeze(-1).to(found)
        return found, table[positions] * counted.unsqueeze(-1)
    return found, table[positions]


def _segments(probe: Probe, _: int) -> Sides:
    table = probe.model.weights["embed.token_type_embed.W_token_type"]
    segments = probe.others.get("token_type_ids", torch.zeros_like(probe.ids))
    return probe.cache["embed.hook_token_type_embed"], table[segments.to(table.device)]


def _decoder_embedding(probe: Probe, first: int) -> Sides:
    weights, decoder = probe.model.weights, probe.model.anatomy.decoder
    assert decoder is not None
    ids = probe.others["decoder_input_ids"]
    total = weights.W_E[ids].float().to(probe.device)
    if decoder.pos_embed is not None:
        total = total + probe.outer_weight("decoder_embed.pos_embed.W_pos")[: ids.shape[1]]
    if decoder.embed_norm is not None:
        w, b = (probe.outer_weight(f"decoder_embed.ln.{name}") for name in ("w", "b"))
        total = nn.functional.layer_norm(total, total.shape[-1:], w, b, norm_epsilon(decoder.embed_norm))
    return probe.get(first, "hook_resid_pre"), total


def sum_laws() -> Iterator[Law]:
    """Yield the laws of norms after sums, and of cross-attention's sums."""
    yield Law(
        "resid_mid_cross = resid_mid (or ln1) + cross_attn_out",
        ("hook_resid_mid", "hook_cross_attn_out", "hook_resid_mid_cross"),
        _after_cross_attention,
    )
    yield Law(
        "cross_attn_in = resid_mid",
        ("hook_cross_attn_in",),
        lambda p, i: (p.get(i, "hook_cross_attn_in"), p.get(i, "hook_resid_mid")),
    )
    yield Law(
        "resid_post = resid_mid_cross + mlp_out",
        ("hook_resid_mid_cross", "hook_mlp_out", "hook_resid_post"),
        lambda p, i: (p.get(i, "hook_resid_post"), p.get(i, "hook_resid_mid_cross") + p.get(i, "hook_mlp_out")),
        when=lambda block: not block.post_norm,
    )
    yield Law(
        "resid_post = what the MLP reads + mlp_out",
        ("hook_mlp_out", "hook_resid_post"),
        lambda p, i: (p.get(i, "hook_resid_post"), p.mlp_input(i) + p.get(i, "hook_mlp_out")),
        when=lambda block: block.post_norm,
    )
    yield Law(
        "normalized_resid_post = the block's last norm",
        ("hook_normalized_resid_post",),
        lambda p, i: (p.get(i, "hook_normalized_resid_post"), p.normed(p.shape.blocks[i].mlp_norm, i)),
    )


def _after_cross_attention(probe: Probe, layer: int) -> Sides:
    before = probe.normed("ln1", layer) if probe.shape.blocks[layer].post_norm else probe.get(layer, "hook_resid_mid")
    return probe.get(layer, "hook_resid_mid_cross"), before + probe.get(layer, "hook_cross_attn_out")


def _head_laws(model: HookedModel) -> Iterator[Law]:
    shape = model.shape
    last = "hook_normalized_resid_post" if shape.blocks[-1].post_norm else "hook_resid_post"
    read = "mlm_head.ln" if shape.masked_head else "decoder_final_ln" if shape.final_norm else ""
    kinds = (f"{read}.hook_normalized",) if read else (last,)
    yield Law(f"logits = {read or last} W_U + b_U", kinds, lambda p, _: _logits(p, read, last), per_layer=False)
    if model.anatomy.heads is not None:
        yield Law(
            "mlm_head.ln.normalized * scale gives back act(normalized_resid_post[-1] W + b)",
            ("mlm_head.ln.hook_scale", "mlm_head.ln.hook_normalized"),
            _masked_head,
            per_layer=False,
        )
    if shape.next_sentence:
        yield Law(
            "pooler_out = tanh(normalized_resid_post[-1] at the first token W + b)",
            ("pooler.hook_pooler_out",),
            _pooled,
            per_layer=False,
        )
        yield Law(
            "nsp_out = pooler_out W + b",
            ("pooler.hook_pooler_out", "nsp_head.hook_nsp_out"),
            lambda p, _: (p.cache["nsp_head.hook_nsp_out"], _linear(p, p.cache["pooler.hook_pooler_out"], "nsp_head")),
            per_layer=False,
        )


def _logits(probe: Probe, norm: str, last: str) -> Sides:
    anatomy = probe.model.anatomy
    read = probe.normed(norm, None) if norm else probe.get(probe.shape.n_layers - 1, last)
    read = read * anatomy.family.unembed_input_scale(anatomy.native.config)
    return probe.logits, read @ probe.outer_weight("unembed.W_U") + probe.outer_weight("unembed.b_U")


def _linear(probe: Probe, read: torch.Tensor, name: str) -> torch.Tensor:
    return read.float() @ probe.outer_weight(f"{name}.W") + probe.outer_weight(f"{name}.b")


def _last_stream(probe: Probe) -> torch.Tensor:
    return probe.get(probe.shape.n_layers - 1, "hook_normalized_resid_post")


def _masked_head(probe: Probe, _: int) -> Sides:
    heads = probe.model.anatomy.heads
    assert heads is not None
    hidden = ACT2FN[heads.activation](_linear(probe, _last_stream(probe), "mlm_head"))
    return probe.cache["mlm_head.ln.hook_normalized"], probe.renormalized(hidden, "mlm_head.ln")


def _pooled(probe: Probe, _: int) -> Sides:
    return probe.cache["pooler.hook_pooler_out"], _linear(probe, _last_stream(probe)[:, 0], "pooler").tanh()

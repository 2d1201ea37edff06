"""What must hold between a model's activations and its weights, whatever its architecture.

Every law computes one activation a second time, from other activations and the weights.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from actpipe.models.attention_laws import attention_laws
from actpipe.models.encoder_laws import encoder_laws, sum_laws
from actpipe.models.hooked_model import HookedModel
from actpipe.models.law import Law, Sides
from actpipe.models.probe import COPIES, Probe
from actpipe.models.routing import of_chosen, shares


def all_laws(model: HookedModel) -> Iterator[Law]:
    """Yield every law of a model of this shape."""
    shape = model.shape
    if shape.encoder_decoder or not shape.causal:
        yield from encoder_laws(model)
    else:
        yield from _embedding_laws(model)
        yield _final_norm_law("ln_final", shape.n_layers - 1)
        yield Law(
            "logits = ln_final(resid_post[-1]) W_U + b_U", ("ln_final.hook_normalized",), _logits, per_layer=False
        )
    if shape.encoder_decoder and shape.final_norm:
        n_encoder = sum(block.stack == "encoder" for block in shape.blocks)
        yield _final_norm_law("encoder_final_ln", n_encoder - 1)
        yield _final_norm_law("decoder_final_ln", shape.n_layers - 1)
    yield from _stream_laws(model)
    yield from sum_laws()
    yield from _norm_laws()
    yield from attention_laws(model)
    yield from attention_laws(model, "cross_attn")
    yield from _mlp_laws(model)
    yield Law(
        "hooked logits = bare logits, bit for bit", (), lambda p, _: (p.logits, p.bare), per_layer=False, exact=True
    )
    # Kernels round otherwise for another shape, and deep models make more of it from layer to layer.
    yield Law("a row does not depend on its batch or padding", (), _alone, least_tolerance=1e-3)


def _embedding_laws(model: HookedModel) -> Iterator[Law]:
    positions = ("hook_pos_embed",) if model.shape.learned_positions else ()
    yield Law("hook_tokens = the ids", ("hook_tokens",), lambda p, _: (p.cache["hook_tokens"], p.ids), per_layer=False)
    if model.shape.embed_norm:
        yield Law("embed.ln.normalized * scale gives back W_E[token]", _EMBED_NORM, _embed_norm, per_layer=False)
        yield Law(
            "hook_embed = embed.ln.normalized",
            ("hook_embed",),
            lambda p, _: (p.cache["hook_embed"], p.normed("embed.ln", None)),
            per_layer=False,
        )
    else:
        yield Law("hook_embed = W_E[token]", ("hook_embed",), _embed, per_layer=False)
    yield Law("resid_pre[0] = embed + pos_embed", ("hook_embed", *positions), _first_residual, per_layer=False)
    if positions:
        yield Law("pos_embed = W_pos[position]", positions, _pos_embed, per_layer=False)


def _stream_laws(model: HookedModel) -> Iterator[Law]:
    for kind, after in (("hook_resid_post", False), ("hook_normalized_resid_post", True)):
        yield Law(
            f"resid_pre[l+1] = {kind.removeprefix('hook_')}[l]",
            ("hook_resid_pre", kind),
            lambda p, i, kind=kind: _chain(p, i, kind),  # type: ignore[misc]
            when=lambda block, after=after: block.post_norm == after,  # type: ignore[misc]
        )
    for branches in dict.fromkeys(block.branches for block in model.shape.blocks if block.branches):
        before = tuple(itertools.takewhile(lambda name: name != "hook_mlp_out", branches))
        yield Law(
            f"resid_post = resid_pre + {' + '.join(map(_said, branches))}",
            ("hook_resid_pre", *branches, "hook_resid_post"),
            lambda p, i, branches=branches: (p.get(i, "hook_resid_post"), _sum(p, i, branches)),  # type: ignore[misc]
            when=lambda block, branches=branches: (  # type: ignore[misc]
                block.branches == branches and not (block.post_norm or block.cross)
            ),
        )
        yield Law(
            f"resid_mid = resid_pre + {' + '.join(map(_said, before))}",
            ("hook_resid_mid", *before),
            lambda p, i, before=before: (p.get(i, "hook_resid_mid"), _sum(p, i, before)),  # type: ignore[misc]
            when=lambda block, branches=branches: block.branches == branches,  # type: ignore[misc]
        )
    yield Law(
        "mlp_in = what the MLP's side reads",
        ("hook_mlp_in",),
        lambda p, i: (p.get(i, "hook_mlp_in"), p.second_input(i)),
    )
    for kind in COPIES:
        yield Law(
            f"{kind.removeprefix('hook_')} = resid_pre for each head",
            (kind,),
            lambda p, i, kind=kind: (  # type: ignore[misc]
                p.get(i, kind),
                p.get(i, "hook_resid_pre").unsqueeze(2).expand_as(p.get(i, kind)),
            ),
        )


def _said(kind: str) -> str:
    return kind.removeprefix("hook_").removesuffix(".hook_out")


def _sum(probe: Probe, layer: int, branches: tuple[str, ...]) -> torch.Tensor:
    total = probe.get(layer, "hook_resid_pre")
    for kind in branches:
        total = total + probe.get(layer, kind)
    return total


_EMBED_NORM = ("embed.ln.hook_scale", "embed.ln.hook_normalized")


def _embed(probe: Probe, _: int) -> Sides:
    return probe.cache["hook_embed"], probe.model.weights.W_E[probe.ids]


def _embed_norm(probe: Probe, _: int) -> Sides:
    found = probe.cache["embed.ln.hook_normalized"]
    return found, probe.renormalized(probe.model.weights.W_E[probe.ids].float(), "embed.ln")


def _pos_embed(probe: Probe, _: int) -> Sides:
    found = probe.cache["hook_pos_embed"]
    return found, probe.model.weights.W_pos[: found.shape[1]].expand_as(found)


def _first_residual(probe: Probe, _: int) -> Sides:
    total = probe.cache["hook_embed"].float()
    if "hook_pos_embed" in probe.cache:
        total = total + probe.cache["hook_pos_embed"].float()
    return probe.get(0, "hook_resid_pre"), total


def _chain(probe: Probe, layer: int, kind: str) -> Sides:
    here, blocks = probe.get(layer, kind), probe.shape.blocks
    last = layer + 1 == len(blocks) or blocks[layer + 1].stack != blocks[layer].stack
    return here, here if last else probe.get(layer + 1, "hook_resid_pre")


def _norm_laws() -> Iterator[Law]:
    for name in ("ln1", "ln2", "ln3"):
        yield Law(
            f"{name}.normalized * scale gives back the stream that it reads",
            (f"{name}.hook_scale", f"{name}.hook_normalized"),
            lambda p, i, name=name: (  # type: ignore[misc]
                p.get(i, f"{name}.hook_normalized"),
                p.renormalized(p.read_by(name, i), p.name(i, name)),
            ),
        )
    for name, out in (("ln1_post", "hook_attn_out"), ("ln2_post", "hook_mlp_out")):
        yield Law(
            f"{out.removeprefix('hook_')} = {name}.normalized times its weight",
            (f"{name}.hook_normalized", out),
            lambda p, i, name=name, out=out: (p.get(i, out), p.normed(name, i)),  # type: ignore[misc]
        )


def _final_norm_law(name: str, layer: int) -> Law:
    return Law(
        f"{name}.normalized * scale gives back the last resid_post",
        (f"{name}.hook_scale", f"{name}.hook_normalized"),
        lambda p, _: (p.cache[f"{name}.hook_normalized"], p.renormalized(p.get(layer, "hook_resid_post"), name)),
        per_layer=False,
    )


def _mlp_laws(model: HookedModel) -> Iterator[Law]:
    block = model.shape.blocks[-1]
    read = "the norm before it" if block.post_norm or block.cross else "ln2"
    yield Law(
        f"mlp.pre = {read} W_in + b_in",
        ("mlp.hook_pre",),
        lambda p, i: _mlp_input(p, i, "mlp.hook_pre", "in"),
        when=lambda block: block.mlp == "plain",
    )
    yield Law(
        f"mlp.pre = {read} W_gate",
        ("mlp.hook_pre",),
        lambda p, i: _mlp_input(p, i, "mlp.hook_pre", "gate"),
        when=lambda block: block.mlp == "gated",
    )
    yield Law(
        f"mlp.pre_linear = {read} W_in + b_in",
        ("mlp.hook_pre_linear",),
        lambda p, i: _mlp_input(p, i, "mlp.hook_pre_linear", "in"),
    )
    yield Law(
        "mlp_out = mlp.post W_out + b_out",
        ("mlp.hook_post", "hook_mlp_out"),
        lambda p, i: (p.get(i, "hook_mlp_out"), _neurons_out(p, i)),
        when=lambda block: not block.ln2_post,
    )
    yield Law(
        "ln2_post.normalized * scale gives back mlp.post W_out + b_out",
        ("ln2_post.hook_scale", "ln2_post.hook_normalized", "mlp.hook_post"),
        lambda p, i: (p.get(i, "ln2_post.hook_normalized"), p.renormalized(_neurons_out(p, i), p.name(i, "ln2_post"))),
    )
    yield Law(
        "router_logits = ln2 W_router",
        ("mlp.hook_router_logits",),
        lambda p, i: _mlp_input(p, i, "mlp.hook_router_logits", "router"),
    )
    yield Law(
        "expert_weights = softmax or sigmoid of router_logits",
        ("mlp.hook_router_logits", "mlp.hook_expert_weights"),
        _expert_weights,
    )
    yield Law(
        "expert_weights of the chosen, up to a factor, are what the router gives",
        ("mlp.hook_expert_weights",),
        _routed,
    )
    grouped = (getattr(model.anatomy.config, "n_group", None) or 1) > 1
    if not grouped:
        yield Law(
            "expert_indices = the largest of expert_weights, with the router's own bias",
            ("mlp.hook_expert_weights", "mlp.hook_expert_indices"),
            _chosen,
        )


def _mlp_input(probe: Probe, layer: int, kind: str, weight: str) -> Sides:
    expected = probe.mlp_input(layer) @ probe.weight(layer, f"mlp.W_{weight}") + probe.weight(layer, f"mlp.b_{weight}")
    return probe.get(layer, kind), expected


def _neurons_out(probe: Probe, layer: int) -> torch.Tensor:
    return probe.get(layer, "mlp.hook_post") @ probe.weight(layer, "mlp.W_out") + probe.weight(layer, "mlp.b_out")


def _expert_weights(probe: Probe, layer: int) -> Sides:
    logits = probe.get(layer, "mlp.hook_router_logits")
    sigmoid = probe.model.anatomy.family_at(layer).router_scores == "sigmoid"
    return probe.get(layer, "mlp.hook_expert_weights"), logits.sigmoid() if sigmoid else logits.softmax(-1)


def _routed(probe: Probe, layer: int) -> Sides:
    _, given, indices = probe.routed[layer]
    weights = probe.get(layer, "mlp.hook_expert_weights").flatten(0, 1)
    return shares(weights.gather(-1, indices.long())), shares(of_chosen(given, indices))


def _chosen(probe: Probe, layer: int) -> Sides:
    """Compare with the largest; some models add a bias to each expert's weight before they choose."""
    weights = probe.get(layer, "mlp.hook_expert_weights")
    indices = probe.cache[probe.name(layer, "mlp.hook_expert_indices")].long()
    block = probe.model.anatomy.blocks[layer]
    biases = [t for t in (*block.parameters(), *block.buffers()) if t.shape == weights.shape[-1:] and not t.is_meta]
    tried = [weights, *(weights + bias.to(weights) for bias in biases)]
    chosen = [biased.gather(-1, indices).sort(dim=-1, descending=True).values for biased in tried]
    largest = [biased.topk(indices.shape[-1], dim=-1).values for biased in tried]
    return min(zip(chosen, largest, strict=True), key=lambda sides: float((sides[0] - sides[1]).abs().max()))


def _logits(probe: Probe, _: int) -> Sides:
    weights, cap = probe.model.weights, probe.shape.logit_softcap
    expected = probe.normed("ln_final", None) @ weights.W_U.float() + weights.b_U.float()
    return probe.logits, expected if cap is None else cap * torch.tanh(expected / cap)


def _alone(probe: Probe, layer: int) -> Sides:
    name = probe.name(layer, "hook_resid_post")
    alone = probe.alone[name]
    return alone, probe.together[name][: alone.shape[0], : alone.shape[1]]

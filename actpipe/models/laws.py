"""What must hold between a model's activations and its weights, whatever its architecture.

Every law computes one activation a second time, from other activations and the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from actpipe.hooks import BlockShape
from actpipe.models.hooked_model import HookedModel
from actpipe.models.probe import COPIES, Probe


@dataclass(frozen=True)
class Law:
    """One identity: two ways to the same numbers."""

    statement: str
    kinds: tuple[str, ...]
    """What it reads, without layer; it is checked in those layers that have all of it."""
    sides: Callable[[Probe, int], tuple[torch.Tensor, torch.Tensor]]
    per_layer: bool = True
    exact: bool = False
    when: Callable[[BlockShape], bool] = lambda _: True


def all_laws(model: HookedModel) -> Iterator[Law]:
    """Yield every law of a model of this shape."""
    yield from _residual_laws(model)
    yield from _norm_laws()
    yield from _attention_laws(model)
    yield from _mlp_laws(model)
    yield Law("logits = ln_final(resid_post[-1]) W_U + b_U", ("ln_final.hook_normalized",), _logits, per_layer=False)
    yield Law(
        "hooked logits = bare logits, bit for bit", (), lambda p, _: (p.logits, p.bare), per_layer=False, exact=True
    )
    yield Law("a row does not depend on its batch or padding", (), _alone)


def _residual_laws(model: HookedModel) -> Iterator[Law]:
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
    yield Law("resid_pre[l+1] = resid_post[l]", ("hook_resid_pre", "hook_resid_post"), _chain)
    for branches in dict.fromkeys(block.branches for block in model.shape.blocks if block.branches):
        before = tuple(name for name in branches if name != "hook_mlp_out")
        yield Law(
            f"resid_post = resid_pre + {' + '.join(map(_said, branches))}",
            ("hook_resid_pre", *branches, "hook_resid_post"),
            lambda p, i, branches=branches: (p.get(i, "hook_resid_post"), _sum(p, i, branches)),  # type: ignore[misc]
            when=lambda block, branches=branches: block.branches == branches,  # type: ignore[misc]
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


def _embed(probe: Probe, _: int) -> tuple[torch.Tensor, torch.Tensor]:
    return probe.cache["hook_embed"], probe.model.weights.W_E[probe.ids]


def _embed_norm(probe: Probe, _: int) -> tuple[torch.Tensor, torch.Tensor]:
    found = probe.cache["embed.ln.hook_normalized"]
    return found, probe.renormalized(probe.model.weights.W_E[probe.ids].float(), "embed.ln")


def _pos_embed(probe: Probe, _: int) -> tuple[torch.Tensor, torch.Tensor]:
    found = probe.cache["hook_pos_embed"]
    return found, probe.model.weights.W_pos[: found.shape[1]].expand_as(found)


def _first_residual(probe: Probe, _: int) -> tuple[torch.Tensor, torch.Tensor]:
    total = probe.cache["hook_embed"].float()
    if "hook_pos_embed" in probe.cache:
        total = total + probe.cache["hook_pos_embed"].float()
    return probe.get(0, "hook_resid_pre"), total


def _chain(probe: Probe, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    here = probe.get(layer, "hook_resid_post")
    last = layer + 1 == probe.shape.n_layers
    return here, here if last else probe.get(layer + 1, "hook_resid_pre")


def _norm_laws() -> Iterator[Law]:
    for name in ("ln1", "ln2"):
        yield Law(
            f"{name}.normalized * scale gives back the stream that it reads",
            (f"{name}.hook_scale", f"{name}.hook_normalized"),
            lambda p, i, name=name: (  # type: ignore[misc]
                p.get(i, f"{name}.hook_normalized"),
                p.renormalized(
                    p.get(i, "hook_resid_pre") if name == "ln1" else p.second_input(i), f"blocks.{i}.{name}"
                ),
            ),
        )
    for name, out in (("ln1_post", "hook_attn_out"), ("ln2_post", "hook_mlp_out")):
        yield Law(
            f"{out.removeprefix('hook_')} = {name}.normalized times its weight",
            (f"{name}.hook_normalized", out),
            lambda p, i, name=name, out=out: (p.get(i, out), p.normed(name, i)),  # type: ignore[misc]
        )
    yield Law(
        "ln_final.normalized * scale gives back resid_post[-1]",
        ("ln_final.hook_scale", "ln_final.hook_normalized"),
        lambda p, _: (
            p.cache["ln_final.hook_normalized"],
            p.renormalized(p.get(p.shape.n_layers - 1, "hook_resid_post"), "ln_final"),
        ),
        per_layer=False,
    )


def _attention_laws(model: HookedModel) -> Iterator[Law]:
    for which in ("q", "k", "v"):
        yield Law(
            f"{which} = ln1 W_{which.upper()} + b_{which.upper()}",
            (f"attn.hook_{which}",),
            lambda p, i, which=which: _projection(p, i, which),  # type: ignore[misc]
            when=lambda block: block.projections,
        )
    for which in ("q", "k"):
        yield Law(
            f"{which}_norm.normalized * scale gives back {which}",
            (f"attn.{which}_norm.hook_scale", f"attn.{which}_norm.hook_normalized"),
            lambda p, i, which=which: _qk_norm(p, i, which),  # type: ignore[misc]
        )
        yield Law(
            f"rotary keeps the length of {which}, and does not turn it at position 0",
            (f"attn.hook_rot_{which}", f"attn.hook_{which}"),
            lambda p, i, which=which: _rotation(p, i, which),  # type: ignore[misc]
        )
    rotated = ("attn.hook_rot_q", "attn.hook_rot_k")
    alibi = " plus a slope per head times distance" if model.anatomy.alibi else ""
    said = f"scores = scaled q . k{alibi}, -inf in the future"
    yield Law(said, ("attn.hook_attn_scores", *rotated), _scores, when=lambda block: block.rotary)
    yield Law(said, ("attn.hook_attn_scores",), _scores, when=lambda block: not block.rotary)
    if all(model.anatomy.entry(i).sinks is None for i in range(model.shape.n_layers)):
        yield Law(
            "rows of pattern sum to 1",
            ("attn.hook_pattern",),
            lambda p, i: (
                p.get(i, "attn.hook_pattern").sum(-1),
                torch.ones_like(p.get(i, "attn.hook_pattern")[..., 0]),
            ),
        )
    yield Law("pattern = softmax(scores)", ("attn.hook_attn_scores", "attn.hook_pattern"), _softmax)
    yield Law(
        "z = pattern @ v",
        ("attn.hook_pattern", "attn.hook_v", "attn.hook_z"),
        lambda p, i: _mixed_values(p, i, "attn.hook_z"),
        when=lambda block: not block.gated_z,
    )
    yield Law(
        "z_ungated = pattern @ v",
        ("attn.hook_pattern", "attn.hook_v", "attn.hook_z_ungated"),
        lambda p, i: _mixed_values(p, i, "attn.hook_z_ungated"),
    )
    yield Law("result = z W_O", ("attn.hook_z", "attn.hook_result"), _results)
    yield Law(
        "attn_out = sum of results + b_O",
        ("attn.hook_result", "hook_attn_out"),
        lambda p, i: (p.get(i, "hook_attn_out"), _sum_of_results(p, i)),
        when=lambda block: not block.ln1_post,
    )
    yield Law(
        "ln1_post.normalized * scale gives back the sum of results + b_O",
        ("ln1_post.hook_scale", "ln1_post.hook_normalized", "attn.hook_result"),
        lambda p, i: (
            p.get(i, "ln1_post.hook_normalized"),
            p.renormalized(_sum_of_results(p, i), f"blocks.{i}.ln1_post"),
        ),
    )


def _projection(probe: Probe, layer: int, which: str) -> tuple[torch.Tensor, torch.Tensor]:
    name = which.upper()
    heads = torch.einsum("bpm,hmd->bphd", probe.attention_input(layer), probe.weight(layer, f"attn.W_{name}"))
    heads = heads + probe.weight(layer, f"attn.b_{name}")
    return probe.repeated(probe.get(layer, f"attn.hook_{which}"), layer), heads


def _qk_norm(probe: Probe, layer: int, which: str) -> tuple[torch.Tensor, torch.Tensor]:
    normalized = probe.get(layer, f"attn.{which}_norm.hook_normalized")
    plain = probe.get(layer, f"attn.hook_{which}").reshape(normalized.shape)
    if probe.model.anatomy.entry(layer).qk_norm == "LN":
        plain = plain - plain.mean(-1, keepdim=True)
    return normalized, plain / probe.get(layer, f"attn.{which}_norm.hook_scale")


def _rotation(probe: Probe, layer: int, which: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Compare lengths, and the vectors at position 0, after what YaRN and its like multiply the rotated axes with."""
    before, after = probe.rotated_from(layer, which), probe.get(layer, f"attn.hook_rot_{which}")
    first = before[:, 0].flatten(0, 1)
    seen = (after[:, 0].flatten(0, 1) * first).sum(0) / first.square().sum(0)
    known = torch.tensor([1.0, *_rotary_factors(probe.model)], device=seen.device)
    before = before * known[(seen.unsqueeze(-1) - known).abs().argmin(-1)]
    return (
        torch.cat([after.norm(dim=-1).flatten(), after[:, 0].flatten()]),
        torch.cat([before.norm(dim=-1).flatten(), before[:, 0].flatten()]),
    )


def _rotary_factors(model: HookedModel) -> set[float]:
    """Return the factors that the model's rotary modules say they multiply with."""
    found = set()
    for module in model.native.modules():
        for name, value in vars(module).items():
            if name.endswith("attention_scaling") and isinstance(value, float):
                found.add(value)
    return found


def _scores(probe: Probe, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Compare with scaled q . k.

    Where the module does not say its scaling it is fitted: it must be one number for the whole layer.
    So is the slope of each head of an ALiBi model. Keys that a window masks are taken as they come;
    that the right ones are masked shows in z.
    """
    rot = "rot_" if probe.shape.blocks[layer].rotary else ""
    q = probe.get(layer, f"attn.hook_{rot}q")
    k = probe.repeated(probe.get(layer, f"attn.hook_{rot}k"), layer)
    found = probe.get(layer, "attn.hook_attn_scores")
    plain = torch.einsum("bqhd,bkhd->bhqk", q, k)
    allowed = torch.isfinite(found)
    cap = getattr(probe.model.anatomy.config, "attn_logit_softcapping", None)
    fitted = found if cap is None else cap * torch.atanh(found / cap)
    bias = torch.zeros_like(plain)
    if probe.model.anatomy.alibi:
        bias = _distance_bias(fitted, plain, allowed)
        fitted = fitted - bias
    scaling = getattr(
        probe.model.anatomy.part(layer, probe.model.anatomy.entry(layer).attention or ""), "scaling", None
    )
    if not isinstance(scaling, float):
        scaling = (fitted[allowed] * plain[allowed]).sum() / plain[allowed].square().sum()
    expected = plain * scaling + bias
    expected = expected if cap is None else cap * torch.tanh(expected / cap)
    future = torch.ones(found.shape[-2:], dtype=torch.bool, device=found.device).triu(1)
    return found, expected.masked_fill(future | ~allowed, -torch.inf)


def _distance_bias(found: torch.Tensor, plain: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """Return each head's fitted slope times the distance between key and query."""
    positions = torch.arange(found.shape[-1], device=found.device)
    distance = (positions - positions.unsqueeze(-1)).float()
    slopes = []
    for head in range(found.shape[1]):
        seen = allowed[:, head]
        columns = torch.stack([plain[:, head][seen], distance.expand_as(seen)[seen]], dim=-1).double().cpu()
        target = found[:, head][seen].double().cpu().unsqueeze(-1)
        slopes.append(torch.linalg.lstsq(columns, target).solution[1, 0])
    return torch.stack(slopes).to(found).reshape(1, -1, 1, 1) * distance


def _softmax(probe: Probe, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    scores = probe.get(layer, "attn.hook_attn_scores")
    if probe.model.anatomy.entry(layer).sinks is None:
        return probe.get(layer, "attn.hook_pattern"), scores.softmax(-1)
    sink = probe.weight(layer, "attn.sinks").reshape(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
    return probe.get(layer, "attn.hook_pattern"), torch.cat([scores, sink], dim=-1).softmax(-1)[..., :-1]


def _mixed_values(probe: Probe, layer: int, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    values = probe.repeated(probe.get(layer, "attn.hook_v"), layer)
    return (
        probe.get(layer, kind),
        torch.einsum("bhqk,bkhd->bqhd", probe.get(layer, "attn.hook_pattern"), values),
    )


def _results(probe: Probe, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    z, W_O = probe.get(layer, "attn.hook_z"), probe.weight(layer, "attn.W_O")
    return probe.get(layer, "attn.hook_result"), torch.einsum("bphd,hdm->bphm", z, W_O)


def _sum_of_results(probe: Probe, layer: int) -> torch.Tensor:
    return probe.get(layer, "attn.hook_result").sum(2) + probe.weight(layer, "attn.b_O")


def _mlp_laws(model: HookedModel) -> Iterator[Law]:
    yield Law(
        "mlp.pre = ln2 W_in + b_in",
        ("mlp.hook_pre",),
        lambda p, i: _mlp_input(p, i, "mlp.hook_pre", "in"),
        when=lambda block: block.mlp == "plain",
    )
    yield Law(
        "mlp.pre = ln2 W_gate",
        ("mlp.hook_pre",),
        lambda p, i: _mlp_input(p, i, "mlp.hook_pre", "gate"),
        when=lambda block: block.mlp == "gated",
    )
    yield Law(
        "mlp.pre_linear = ln2 W_in + b_in",
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
        lambda p, i: (p.get(i, "ln2_post.hook_normalized"), p.renormalized(_neurons_out(p, i), f"blocks.{i}.ln2_post")),
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
    grouped = (getattr(model.anatomy.config, "n_group", None) or 1) > 1
    if not grouped:
        yield Law(
            "expert_indices = the largest of expert_weights, with the router's own bias",
            ("mlp.hook_expert_weights", "mlp.hook_expert_indices"),
            _chosen,
        )


def _mlp_input(probe: Probe, layer: int, kind: str, weight: str) -> tuple[torch.Tensor, torch.Tensor]:
    expected = probe.mlp_input(layer) @ probe.weight(layer, f"mlp.W_{weight}") + probe.weight(layer, f"mlp.b_{weight}")
    return probe.get(layer, kind), expected


def _neurons_out(probe: Probe, layer: int) -> torch.Tensor:
    return probe.get(layer, "mlp.hook_post") @ probe.weight(layer, "mlp.W_out") + probe.weight(layer, "mlp.b_out")


def _expert_weights(probe: Probe, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    logits = probe.get(layer, "mlp.hook_router_logits")
    sigmoid = probe.model.anatomy.entry(layer).router_scores == "sigmoid"
    return probe.get(layer, "mlp.hook_expert_weights"), logits.sigmoid() if sigmoid else logits.softmax(-1)


def _chosen(probe: Probe, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    weights = probe.get(layer, "mlp.hook_expert_weights")
    router = probe.model.anatomy.part(layer, probe.model.anatomy.entry(layer).router or "")
    bias = getattr(router, "e_score_correction_bias", None)
    weights = weights if bias is None else weights + bias
    indices = probe.cache[f"blocks.{layer}.mlp.hook_expert_indices"]
    largest = weights.topk(indices.shape[-1], dim=-1).values
    return weights.gather(-1, indices.long()).sort(dim=-1, descending=True).values, largest


def _logits(probe: Probe, _: int) -> tuple[torch.Tensor, torch.Tensor]:
    weights, cap = probe.model.weights, probe.shape.logit_softcap
    expected = probe.normed("ln_final", None) @ weights.W_U.float() + weights.b_U.float()
    return probe.logits, expected if cap is None else cap * torch.tanh(expected / cap)


def _alone(probe: Probe, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    name = f"blocks.{layer}.hook_resid_post"
    alone = probe.alone[name]
    return alone, probe.cache[name][: alone.shape[0], : alone.shape[1]]

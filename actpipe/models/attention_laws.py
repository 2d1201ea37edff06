"""What must hold inside attention, that to the encoder's output included."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from actpipe.models.hooked_model import HookedModel
from actpipe.models.law import Law, Sides
from actpipe.models.position_bias import distance_bias, relative_bias
from actpipe.models.probe import Probe


def attention_laws(model: HookedModel, where: str = "attn") -> Iterator[Law]:
    """Yield the laws of every block's attention, or with `cross_attn` those of attention to the encoder."""
    for which in ("q", "k", "v"):
        read = _read_by(model, where, which)
        yield Law(
            f"{_said(where, which)} = {read} W_{which.upper()} + b_{which.upper()}",
            (f"{where}.hook_{which}",),
            lambda p, i, which=which: _projection(p, i, which, where),  # type: ignore[misc]
            when=lambda block: block.projections,
        )
    yield from _score_laws(model, where)
    if all(model.anatomy.family_at(layer).sinks is None for layer in range(model.shape.n_layers)):
        yield Law(
            f"rows of {_said(where, 'pattern')} sum to 1",
            (f"{where}.hook_pattern",),
            lambda p, i: (
                p.get(i, f"{where}.hook_pattern").sum(-1),
                torch.ones_like(p.get(i, f"{where}.hook_pattern")[..., 0]),
            ),
        )
    scores, pattern, z = (f"{where}.hook_{name}" for name in ("attn_scores", "pattern", "z"))
    yield Law(f"{_said(where, 'pattern')} = softmax(scores)", (scores, pattern), lambda p, i: _softmax(p, i, where))
    yield Law(
        f"{_said(where, 'z')} = pattern @ v",
        (pattern, f"{where}.hook_v", z),
        lambda p, i: _mixed_values(p, i, where, z),
        when=lambda block: not block.gated_z,
    )
    yield Law(
        "z_ungated = pattern @ v",
        (pattern, f"{where}.hook_v", f"{where}.hook_z_ungated"),
        lambda p, i: _mixed_values(p, i, where, f"{where}.hook_z_ungated"),
    )
    yield Law(f"{_said(where, 'result')} = z W_O", (z, f"{where}.hook_result"), lambda p, i: _results(p, i, where))
    out = f"hook_{where}_out"
    yield Law(
        f"{where}_out = sum of results + b_O",
        (f"{where}.hook_result", out),
        lambda p, i: (p.get(i, out), sum_of_results(p, i, where)),
        when=lambda block: not block.ln1_post,
    )


def _read_by(model: HookedModel, where: str, which: str) -> str:
    """Return what a projection reads, in words."""
    post_norm = model.shape.blocks[-1].post_norm
    if where == "attn":
        return "resid_pre" if post_norm else "ln1"
    if which != "q":
        return "the encoder's output"
    return "ln1" if post_norm else "ln2"


def _said(where: str, what: str) -> str:
    return what if where == "attn" else f"{where}.{what}"


def _score_laws(model: HookedModel, where: str) -> Iterator[Law]:
    """Yield the laws of scores, and of norms and rotary before them."""
    for which in ("q", "k"):
        yield Law(
            f"{which}_norm.normalized * scale gives back {which}",
            (f"{where}.{which}_norm.hook_scale", f"{where}.{which}_norm.hook_normalized"),
            lambda p, i, which=which: _qk_norm(p, i, which),  # type: ignore[misc]
        )
        yield Law(
            f"rotary keeps the length of {which}, and does not turn it at position 0",
            (f"{where}.hook_rot_{which}", f"{where}.hook_{which}"),
            lambda p, i, which=which: _rotation(p, i, which),  # type: ignore[misc]
        )
    rotated = (f"{where}.hook_rot_q", f"{where}.hook_rot_k")
    scores = f"{where}.hook_attn_scores"
    alibi = " plus a slope per head times distance" if model.anatomy.alibi else ""
    learned = any(block.relative_bias for block in model.shape.blocks) and where == "attn"
    bias = " plus the learned bias of the distance" if learned else ""
    future = ", -inf in the future" if any(block.causal for block in model.shape.blocks) and where == "attn" else ""
    said = f"{_said(where, 'scores')} = scaled q . k{alibi}{bias}{future}"
    yield Law(said, (scores, *rotated), lambda p, i: _scores(p, i, where), when=lambda block: block.rotary)
    yield Law(said, (scores,), lambda p, i: _scores(p, i, where), when=lambda block: not block.rotary)
    yield Law(
        "ln1_post.normalized * scale gives back the sum of results + b_O",
        ("ln1_post.hook_scale", "ln1_post.hook_normalized", f"{where}.hook_result"),
        lambda p, i: (
            p.get(i, "ln1_post.hook_normalized"),
            p.renormalized(sum_of_results(p, i, where), p.name(i, "ln1_post")),
        ),
    )


def _projection(probe: Probe, layer: int, which: str, where: str) -> Sides:
    name = which.upper()
    read = probe.attention_input(layer, which, where)
    heads = torch.einsum("bpm,hmd->bphd", read, probe.weight(layer, f"{where}.W_{name}"))
    heads = heads + probe.weight(layer, f"{where}.b_{name}")
    return probe.repeated(probe.get(layer, f"{where}.hook_{which}"), layer), heads


def _qk_norm(probe: Probe, layer: int, which: str) -> Sides:
    normalized = probe.get(layer, f"attn.{which}_norm.hook_normalized")
    plain = probe.get(layer, f"attn.hook_{which}").reshape(normalized.shape)
    if probe.model.anatomy.family_at(layer).qk_norm == "LN":
        plain = plain - plain.mean(-1, keepdim=True)
    return normalized, plain / probe.get(layer, f"attn.{which}_norm.hook_scale")


def _rotation(probe: Probe, layer: int, which: str) -> Sides:
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


def _scores(probe: Probe, layer: int, where: str) -> Sides:
    """Compare with scaled q . k.

    Where the module does not say its scaling it is fitted: it must be one number for the whole layer.
    So is the slope of each head of an ALiBi model. Keys that a window masks are taken as they come;
    that the right ones are masked shows in z.
    """
    block, anatomy = probe.shape.blocks[layer], probe.model.anatomy
    rot = "rot_" if block.rotary else ""
    q = probe.get(layer, f"{where}.hook_{rot}q")
    k = probe.repeated(probe.get(layer, f"{where}.hook_{rot}k"), layer)
    found = probe.get(layer, f"{where}.hook_attn_scores")
    plain = torch.einsum("bqhd,bkhd->bhqk", q, k)
    allowed = torch.isfinite(found)
    cap = getattr(probe.model.anatomy.config, "attn_logit_softcapping", None)
    fitted = found if cap is None else cap * torch.atanh(found / cap)
    bias = torch.zeros_like(plain)
    if anatomy.alibi:
        bias = distance_bias(fitted, plain, allowed)
    elif where == "attn" and anatomy.family_at(layer).relative_bias is not None:
        bias = relative_bias(probe.model, layer, found.shape[-2:]).to(found)
    fitted = fitted - bias
    paths = anatomy.family_at(layer) if where == "attn" else anatomy.family_at(layer).cross
    assert paths is not None
    scaling = getattr(anatomy.part(layer, paths.attention), "scaling", None)
    if not isinstance(scaling, float):
        scaling = (fitted[allowed] * plain[allowed]).sum() / plain[allowed].square().sum()
    expected = plain * scaling + bias
    expected = expected if cap is None else cap * torch.tanh(expected / cap)
    future = torch.ones(found.shape[-2:], dtype=torch.bool, device=found.device).triu(1)
    future = future & (block.causal and where == "attn")
    return found, expected.masked_fill(future | ~allowed, -torch.inf)


def _softmax(probe: Probe, layer: int, where: str) -> Sides:
    scores = probe.get(layer, f"{where}.hook_attn_scores")
    if probe.model.anatomy.family_at(layer).sinks is None:
        return probe.get(layer, f"{where}.hook_pattern"), scores.softmax(-1)
    sink = probe.weight(layer, "attn.sinks").reshape(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
    return probe.get(layer, f"{where}.hook_pattern"), torch.cat([scores, sink], dim=-1).softmax(-1)[..., :-1]


def _mixed_values(probe: Probe, layer: int, where: str, kind: str) -> Sides:
    values = probe.repeated(probe.get(layer, f"{where}.hook_v"), layer)
    return (
        probe.get(layer, kind),
        torch.einsum("bhqk,bkhd->bqhd", probe.get(layer, f"{where}.hook_pattern"), values),
    )


def _results(probe: Probe, layer: int, where: str) -> Sides:
    z, W_O = probe.get(layer, f"{where}.hook_z"), probe.weight(layer, f"{where}.W_O")
    return probe.get(layer, f"{where}.hook_result"), torch.einsum("bphd,hdm->bphm", z, W_O)


def sum_of_results(probe: Probe, layer: int, where: str) -> torch.Tensor:
    """Return what the heads write together, with the output's bias."""
    return probe.get(layer, f"{where}.hook_result").sum(2) + probe.weight(layer, f"{where}.b_O")

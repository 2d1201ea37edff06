"""Prove the hooks on the very model at hand: each value must agree with the model's own arithmetic.

Every identity computes one activation a second time, from other activations and the weights, and
compares. A name is proven when at least one identity that reads it holds in every layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from actpipe.models.hooked_model import HookedModel

_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Outcome:
    """One identity on one model."""

    statement: str
    kinds: tuple[str, ...]
    """The hook points, without layer, that it proves."""
    error: float
    """Largest difference over all layers, relative to the largest value compared."""
    tolerance: float
    where: str
    """Where the largest difference was."""

    @property
    def holds(self) -> bool:
        """Whether the difference is within the tolerance; never so for NaN."""
        return self.error <= self.tolerance


@dataclass(frozen=True)
class _Law:
    statement: str
    kinds: tuple[str, ...]
    sides: Callable[[_Probe, int], tuple[torch.Tensor, torch.Tensor]]
    per_layer: bool = True
    exact: bool = False


class _Probe:
    """What the laws read: one forward pass with every hook, one without, and the weights."""

    def __init__(self, model: HookedModel, ids: torch.Tensor) -> None:
        self.model = model
        self.ids = ids.to(model.device)
        self.bare = model.forward(ids)
        names = ["*", *(f"blocks.{layer}.attn.hook_result" for layer in range(model.shape.n_layers))]
        self.logits, self.cache = model.run_with_cache(ids, names=names)
        half = ids[:1, : max(1, ids.shape[1] // 2)]
        self.alone = model.run_with_cache(half, names=["blocks.*.hook_resid_post"])[1]

    def get(self, layer: int, kind: str) -> torch.Tensor:
        return self.cache[f"blocks.{layer}.{kind}"].float()

    def weight(self, layer: int, kind: str) -> torch.Tensor:
        return self.model.weights[f"blocks.{layer}.{kind}"].float()

    def normed(self, prefix: str, layer: int | None) -> torch.Tensor:
        """Return what a norm puts out, with weight and bias, from `hook_normalized`."""
        name = prefix if layer is None else f"blocks.{layer}.{prefix}"
        normalized = self.cache[f"{name}.hook_normalized"].float()
        if self.model.shape.norm == "LN":
            return normalized
        return normalized * self.model.weights[f"{name}.w"].float()

    def renormalized(self, source: torch.Tensor, name: str) -> torch.Tensor:
        """Return `hook_normalized` as the scale and the norm's own input give it."""
        scale = self.cache[f"{name}.hook_scale"].float()
        if self.model.shape.norm == "RMS":
            return source / scale
        centered = source - source.mean(-1, keepdim=True)
        weights = self.model.weights
        return centered / scale * weights[f"{name}.w"].float() + weights[f"{name}.b"].float()

    def repeated(self, heads: torch.Tensor, axis: int) -> torch.Tensor:
        return heads.repeat_interleave(self.model.shape.n_heads // heads.shape[axis], dim=axis)


def check_identities(model: HookedModel, ids: torch.Tensor) -> list[Outcome]:
    """Run the model on a probe batch and check every identity that it should satisfy.

    Args:
        model: The model.
        ids: `(batch, position)` token ids, two sequences or more of four tokens or more.

    Returns:
        One outcome per identity; those that do not hold come first.
    """
    probe = _Probe(model, ids)
    outcomes = [_evaluate(law, probe) for law in _laws(model)]
    return sorted(outcomes, key=lambda outcome: outcome.holds)


def probe_ids(model: HookedModel, length: int = 16) -> torch.Tensor:
    """Return `(2, length)` token ids spread over the vocabulary, the same every time."""
    generator = torch.Generator().manual_seed(0)
    length = min(length, model.shape.n_ctx)
    return torch.randint(0, model.shape.d_vocab, (2, length), generator=generator)


def _evaluate(law: _Law, probe: _Probe) -> Outcome:
    worst, where = 0.0, "everywhere"
    layers = range(probe.model.shape.n_layers) if law.per_layer else (0,)
    for layer in layers:
        left, right = law.sides(probe, layer)
        error = _difference(left, right)
        if not error <= worst:
            worst, where = error, f"layer {layer}" if law.per_layer else "the whole model"
    tolerance = 0.0 if law.exact else _TOLERANCE[probe.model.dtype]
    return Outcome(law.statement, law.kinds, worst, tolerance, where)


def _difference(left: torch.Tensor, right: torch.Tensor) -> float:
    left, right = left.float(), right.float().to(left.device)
    if left.shape != right.shape:
        return float("inf")
    same = left == right
    difference = torch.where(same, 0.0, (left - right).abs())
    size = left[torch.isfinite(left)].abs().max() if bool(torch.isfinite(left).any()) else torch.ones(())
    worst = difference.max() / size.clamp_min(1e-6)
    return float(worst) if not bool(worst.isnan()) else float("inf")


def _laws(model: HookedModel) -> Iterator[_Law]:
    yield from _residual_laws(model)
    yield from _norm_laws(model)
    yield from _attention_laws(model)
    yield from _mlp_laws(model)
    yield _Law("logits = ln_final(resid_post[-1]) W_U + b_U", ("ln_final.hook_normalized",), _logits, per_layer=False)
    yield _Law(
        "hooked logits = bare logits, bit for bit", (), lambda p, _: (p.logits, p.bare), per_layer=False, exact=True
    )
    yield _Law("a row does not depend on its batch or padding", (), _alone)


def _residual_laws(model: HookedModel) -> Iterator[_Law]:
    positions = ("hook_pos_embed",) if model.shape.learned_positions else ()
    yield _Law("hook_embed = W_E[token]", ("hook_embed",), _embed, per_layer=False)
    yield _Law("resid_pre[0] = embed + pos_embed", ("hook_embed", *positions), _first_residual, per_layer=False)
    if positions:
        yield _Law("pos_embed = W_pos[position]", positions, _pos_embed, per_layer=False)
    yield _Law("resid_pre[l+1] = resid_post[l]", ("hook_resid_pre", "hook_resid_post"), _chain)
    yield _Law(
        "resid_post = resid_pre + attn_out + mlp_out",
        ("hook_resid_pre", "hook_attn_out", "hook_mlp_out", "hook_resid_post"),
        lambda p, i: (
            p.get(i, "hook_resid_post"),
            p.get(i, "hook_resid_pre") + p.get(i, "hook_attn_out") + p.get(i, "hook_mlp_out"),
        ),
    )
    if not model.shape.parallel:
        yield _Law(
            "resid_mid = resid_pre + attn_out",
            ("hook_resid_mid",),
            lambda p, i: (p.get(i, "hook_resid_mid"), p.get(i, "hook_resid_pre") + p.get(i, "hook_attn_out")),
        )


def _embed(probe: _Probe, _: int) -> tuple[torch.Tensor, torch.Tensor]:
    return probe.cache["hook_embed"], probe.model.weights.W_E[probe.ids]


def _pos_embed(probe: _Probe, _: int) -> tuple[torch.Tensor, torch.Tensor]:
    found = probe.cache["hook_pos_embed"]
    return found, probe.model.weights.W_pos[: found.shape[1]].expand_as(found)


def _first_residual(probe: _Probe, _: int) -> tuple[torch.Tensor, torch.Tensor]:
    total = probe.cache["hook_embed"].float()
    if "hook_pos_embed" in probe.cache:
        total = total + probe.cache["hook_pos_embed"].float()
    return probe.get(0, "hook_resid_pre"), total


def _chain(probe: _Probe, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    here = probe.get(layer, "hook_resid_post")
    last = layer + 1 == probe.model.shape.n_layers
    return here, here if last else probe.get(layer + 1, "hook_resid_pre")


def _norm_laws(model: HookedModel) -> Iterator[_Law]:
    second_input = "hook_resid_pre" if model.shape.parallel else "hook_resid_mid"
    for name, source in (("ln1", "hook_resid_pre"), ("ln2", second_input)):
        yield _Law(
            f"{name}.normalized * scale gives back {source.removeprefix('hook_')}",
            (f"{name}.hook_scale", f"{name}.hook_normalized"),
            lambda p, i, name=name, source=source: (  # type: ignore[misc]
                p.get(i, f"{name}.hook_normalized"),
                p.renormalized(p.get(i, source), f"blocks.{i}.{name}"),
            ),
        )
    yield _Law(
        "ln_final.normalized * scale gives back resid_post[-1]",
        ("ln_final.hook_scale", "ln_final.hook_normalized"),
        lambda p, _: (
            p.cache["ln_final.hook_normalized"],
            p.renormalized(p.get(p.model.shape.n_layers - 1, "hook_resid_post"), "ln_final"),
        ),
        per_layer=False,
    )


def _attention_laws(model: HookedModel) -> Iterator[_Law]:
    for which in ("q", "k", "v"):
        yield _Law(
            f"{which} = ln1 W_{which.upper()} + b_{which.upper()}",
            (f"attn.hook_{which}",),
            lambda p, i, which=which: _projection(p, i, which),  # type: ignore[misc]
        )
    if model.shape.rotary:
        for which in ("q", "k"):
            yield _Law(
                f"rotary keeps the length of {which}, and changes nothing at position 0",
                (f"attn.hook_rot_{which}",),
                lambda p, i, which=which: _rotation(p, i, which),  # type: ignore[misc]
            )
    yield _Law("scores = scaled q . k, -inf in the future", ("attn.hook_attn_scores",), _scores)
    yield _Law(
        "pattern = softmax(scores)",
        ("attn.hook_attn_scores", "attn.hook_pattern"),
        lambda p, i: (p.get(i, "attn.hook_pattern"), p.get(i, "attn.hook_attn_scores").softmax(-1)),
    )
    yield _Law(
        "rows of pattern sum to 1",
        ("attn.hook_pattern",),
        lambda p, i: (p.get(i, "attn.hook_pattern").sum(-1), torch.ones_like(p.get(i, "attn.hook_pattern")[..., 0])),
    )
    yield _Law("z = pattern @ v", ("attn.hook_pattern", "attn.hook_v", "attn.hook_z"), _mixed_values)
    yield _Law("result = z W_O", ("attn.hook_z", "attn.hook_result"), _results)
    yield _Law("attn_out = sum of results + b_O", ("attn.hook_result", "hook_attn_out"), _attention_output)


def _projection(probe: _Probe, layer: int, which: str) -> tuple[torch.Tensor, torch.Tensor]:
    source, name = probe.normed("ln1", layer), which.upper()
    heads = torch.einsum("bpm,hmd->bphd", source, probe.weight(layer, f"attn.W_{name}"))
    heads = heads + probe.weight(layer, f"attn.b_{name}")
    return probe.repeated(probe.get(layer, f"attn.hook_{which}"), axis=2), heads


def _rotation(probe: _Probe, layer: int, which: str) -> tuple[torch.Tensor, torch.Tensor]:
    before, after = probe.get(layer, f"attn.hook_{which}"), probe.get(layer, f"attn.hook_rot_{which}")
    return (
        torch.cat([after.norm(dim=-1).flatten(), after[:, 0].flatten()]),
        torch.cat([before.norm(dim=-1).flatten(), before[:, 0].flatten()]),
    )


def _scores(probe: _Probe, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Compare with q . k up to the scaling, which is fitted: it must be one number for the whole layer.

    Keys that a window masks are taken as they come; that the right ones are masked shows in z.
    """
    rot = "rot_" if probe.model.shape.rotary else ""
    q = probe.get(layer, f"attn.hook_{rot}q")
    k = probe.repeated(probe.get(layer, f"attn.hook_{rot}k"), axis=2)
    found = probe.get(layer, "attn.hook_attn_scores")
    plain = torch.einsum("bqhd,bkhd->bhqk", q, k)
    allowed = torch.isfinite(found)
    scaling = (found[allowed] * plain[allowed]).sum() / plain[allowed].square().sum()
    future = torch.ones(found.shape[-2:], dtype=torch.bool, device=found.device).triu(1)
    return found, (plain * scaling).masked_fill(future | ~allowed, -torch.inf)


def _mixed_values(probe: _Probe, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    values = probe.repeated(probe.get(layer, "attn.hook_v"), axis=2)
    return (
        probe.get(layer, "attn.hook_z"),
        torch.einsum("bhqk,bkhd->bqhd", probe.get(layer, "attn.hook_pattern"), values),
    )


def _results(probe: _Probe, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    z, W_O = probe.get(layer, "attn.hook_z"), probe.weight(layer, "attn.W_O")
    return probe.get(layer, "attn.hook_result"), torch.einsum("bphd,hdm->bphm", z, W_O)


def _attention_output(probe: _Probe, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    total = probe.get(layer, "attn.hook_result").sum(2) + probe.weight(layer, "attn.b_O")
    return probe.get(layer, "hook_attn_out"), total


def _mlp_laws(model: HookedModel) -> Iterator[_Law]:
    first = "W_gate" if model.shape.gated else "W_in"
    yield _Law(f"mlp.pre = ln2 {first}", ("mlp.hook_pre",), lambda p, i: _mlp_input(p, i, "mlp.hook_pre", first))
    if model.shape.gated:
        yield _Law(
            "mlp.pre_linear = ln2 W_in + b_in",
            ("mlp.hook_pre_linear",),
            lambda p, i: _mlp_input(p, i, "mlp.hook_pre_linear", "W_in"),
        )
    yield _Law(
        "mlp_out = mlp.post W_out + b_out",
        ("mlp.hook_post", "hook_mlp_out"),
        lambda p, i: (
            p.get(i, "hook_mlp_out"),
            p.get(i, "mlp.hook_post") @ p.weight(i, "mlp.W_out") + p.weight(i, "mlp.b_out"),
        ),
    )


def _mlp_input(probe: _Probe, layer: int, kind: str, weight: str) -> tuple[torch.Tensor, torch.Tensor]:
    expected = probe.normed("ln2", layer) @ probe.weight(layer, f"mlp.{weight}")
    if weight == "W_in":
        expected = expected + probe.weight(layer, "mlp.b_in")
    return probe.get(layer, kind), expected


def _logits(probe: _Probe, _: int) -> tuple[torch.Tensor, torch.Tensor]:
    weights = probe.model.weights
    return probe.logits, probe.normed("ln_final", None) @ weights.W_U.float() + weights.b_U.float()


def _alone(probe: _Probe, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    name = f"blocks.{layer}.hook_resid_post"
    alone = probe.alone[name]
    return alone, probe.cache[name][: alone.shape[0], : alone.shape[1]]


def unproven(model: HookedModel, outcomes: Sequence[Outcome], names: Sequence[str]) -> dict[str, Outcome]:
    """Return those of `names` that take part in an identity that fails, with that identity.

    A failing identity of the whole model (bare logits, independence of the batch) concerns every name.
    """
    failing = [outcome for outcome in outcomes if not outcome.holds]
    found: dict[str, Outcome] = {}
    for name in names:
        kind = model.hook_points[name].kind
        for outcome in failing:
            if not outcome.kinds or kind in outcome.kinds:
                found[name] = outcome
                break
    return found

"""From one run of a model's twin to an entry for its family, and the proof of that entry."""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from actpipe.models.anatomy import language_config, told
from actpipe.models.families.entry import Family, latent_size
from actpipe.models.hooked_model import HookedModel
from actpipe.models.identities import Outcome, check_identities, probe_ids
from actpipe.models.loading import ModelSource
from actpipe.models.probe import COPIES
from actpipe.models.recognition.finding import BlockFinder, BlockParts
from actpipe.models.recognition.values import Norm, as_norm, same
from actpipe.models.recognition.watching import Attention, Call, record
from actpipe.models.twins import build_twin, refusal, twin_ids

_STREAM = {"hook_resid_pre", "hook_resid_post", "hook_normalized_resid_post"}
_HEADS = ["num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "attention_heads"]
_KEY_HEADS = ["num_key_value_heads", "n_head_kv", "num_kv_heads", "kv_n_heads", "multi_query_group_num"]

Number = Callable[[Any], float]


def recognise(config: Any, *, trust_remote_code: bool = False) -> Family:
    """Find out where the parts of an architecture are; offer what the identities prove on its twin.

    Raises:
        UnsupportedModelError: There is no list of blocks in which each takes what the one before it gives.
    """
    twin = build_twin(config, trust_remote_code=trust_remote_code)
    ids = twin_ids()
    try:
        draft = _Draft(twin, ids).family()
    except (AttributeError, RuntimeError, ValueError, TypeError, IndexError) as error:
        raise refusal(config, "running a small one did not tell", str(error)) from error
    return prove(draft, twin, ids)


def prove(family: Family, native: PreTrainedModel, ids: torch.Tensor) -> Family:
    """Check every identity, and withhold each kind of hook point until all that is offered is proven.

    Raises:
        UnsupportedModelError: Even the residual stream contradicts the model's arithmetic.
    """
    while True:
        model = HookedModel(native, ModelSource(native.config.model_type), family=family)
        outcomes = check_identities(model, ids)
        doubtful = _doubtful(model, outcomes)
        if not doubtful:
            return family
        family = replace(family, withheld={**family.withheld, **doubtful})


def prove_loaded(model: HookedModel) -> Family:
    """Check every identity once more on the weights themselves; warn of what the twin did not show."""
    before = model.anatomy.family
    family = prove(before, model.native, probe_ids(model))
    new = [f"{kind} ({reason})" for kind, reason in family.withheld.items() if kind not in before.withheld]
    if new:
        warnings.warn(f"not offered for this {before.name} model: {', '.join(new)}", stacklevel=2)
    return family


def _doubtful(model: HookedModel, outcomes: Sequence[Outcome]) -> Mapping[str, str]:
    """Return the kinds that cannot be offered, with the reason: those no other identity vouches for first."""
    proven = {(kind, layer) for o in outcomes if o.holds for kind in o.kinds for layer in o.layers}
    points = model.hook_points.values()
    copied = {kind for kind, _ in proven if kind in COPIES}  # of these one layer is tried
    unproven = {point.kind for point in points if (point.kind, point.layer) not in proven} - copied
    for outcome in outcomes:
        if outcome.holds:
            continue
        suspects = [kind for kind in outcome.kinds if kind not in _STREAM]
        if not suspects:
            reason = f"'{outcome.statement}' is off by {outcome.error:.0e} of its size"
            raise refusal(model.native.config, "what a small one does contradicts what was found", reason)
        reason = f"'{outcome.statement}' does not hold"
        return dict.fromkeys([kind for kind in suspects if kind in unproven] or suspects, reason)
    extras = {kind for block in model.shape.blocks for kind, _ in block.others}
    return dict.fromkeys(sorted(unproven - extras - _STREAM), "no identity reads it")


class _Draft:
    """Puts together an entry from one recording."""

    def __init__(self, twin: PreTrainedModel, ids: torch.Tensor) -> None:
        self._twin = twin
        self._ids = ids
        recording = self._recording = record(twin, ids)
        self._config = language_config(twin)
        self._names = {module: name for name, module in twin.base_model.named_modules()}
        self._path, self._blocks = self._find_blocks()
        self._outside = [c for c in recording.calls if not any(block.contains(c) for block in self._blocks)]

    def family(self) -> Family:
        """Return the entry."""
        found: dict[Hashable, tuple[BlockParts, Family]] = {}
        layers = []
        for block in self._blocks:
            inside = self._recording.inside(block)
            kind = _kind_of(block, inside)
            if kind not in found:
                found[kind] = self._find_block(block, inside)
            layers.append(found[kind])
        parts = [p for p, _ in found.values()]
        common = self._common([p.norm for p in parts if p.norm is not None], parts)
        entries = tuple(replace(family, **common) for _, family in layers)
        return replace(entries[0], layers=entries if len(found) > 1 else ())

    def _find_blocks(self) -> tuple[str, list[Call]]:
        best: tuple[str, list[Call]] | None = None
        for module in self._twin.modules():
            if not isinstance(module, nn.ModuleList) or module not in self._names:
                continue
            calls = [[c for c in self._recording.calls if c.module is child] for child in module]
            once = bool(calls) and all(len(c) == 1 for c in calls)
            chained = once and _is_chain([c[0] for c in calls], self._ids.shape)
            if chained and (best is None or len(calls) > len(best[1])):
                best = self._names[module], [c[0] for c in calls]
        if best is None:
            raise ValueError("it has no list of blocks of which each takes what the one before it gives")
        return best

    def _find_block(self, block: Call, inside: Sequence[Call]) -> tuple[BlockParts, Family]:
        prefix = block.path + "."
        seen = [a for a in self._recording.attention if a.call.path.startswith(prefix)]
        attention = None
        heads, key_heads = _as_told(self._config, _HEADS, None), None
        if len(seen) == 1:
            call = replace(seen[0].call, path=seen[0].call.path.removeprefix(prefix))
            attention = Attention(call, seen[0].seen, seen[0].own_code)
            heads = _as_told(self._config, _HEADS, seen[0].seen.query.shape[1])
            key_heads = _key_heads(self._config, seen[0], heads)
        if heads is None or key_heads is None:
            attention, heads, key_heads = None, heads or (lambda _: 1), lambda _: 1
        n_heads, n_kv_heads = int(heads(self._config)), int(key_heads(self._config))
        scales = _scales(self._config)
        finder = BlockFinder(block, inside, attention, n_heads, n_kv_heads, [s(self._config) for s in scales])
        parts = finder.find()
        family = _entry(parts, self._config.model_type, heads, key_heads)
        scale = next(s for s in scales if s(self._config) == parts.scale)
        return parts, replace(family, branch_scale=scale)

    def _common(self, norms: Sequence[Norm], parts: Sequence[BlockParts]) -> dict[str, Any]:
        """Return what concerns the whole model."""
        final = self._final_norm()
        norm = next(iter([*norms, *([final[1]] if final else [])]), Norm("RMS", 0.0, None))
        return {
            "norm": norm.kind,
            "norm_offset": norm.offset,
            "norm_epsilon": norm.epsilon,
            "embed": self._names.get(self._twin.get_input_embeddings(), ""),
            "blocks": self._path,
            "final_norm": final[0] if final else None,
            "logit_scale": self._logit_scale(),
            "branch_scale": next(
                (s for s in _scales(self._config) for p in parts if p.branches and s(self._config) == p.scale),
                lambda _: 1.0,
            ),
            **self._embedding(),
        }

    def _final_norm(self) -> tuple[str, Norm] | None:
        last = self._blocks[-1]
        for call in self._outside:
            norm = as_norm(call) if any(same(call.input, out) for out in last.outputs) else None
            if norm is not None and call.started > last.ended and call.module in self._names:
                return self._names[call.module], norm
        return None

    def _embedding(self) -> dict[str, Any]:
        table = self._twin.get_input_embeddings()
        first = self._blocks[0].input
        embedded = next((c.output for c in self._outside if c.module is table), None)
        if embedded is None or first is None or embedded.shape != first.shape:
            return {}
        for call in self._outside:
            if same(call.output, first) and same(call.input, embedded) and as_norm(call) and call.module in self._names:
                return {"embed_norm": self._names[call.module]}
        rows = table.weight[self._ids]
        scales = (lambda _: 1.0, lambda config: config.hidden_size**0.5, *_numbers(self._config))
        for scale in scales:
            if same(first, rows * scale(self._config)):
                return {"embed_scale": scale}
        own = next((scale for scale in scales if same(embedded, rows * scale(self._config))), scales[0])
        rest = first - embedded
        for call in self._outside:
            weight = getattr(call.module, "weight", getattr(call.module, "weights", None))
            if call.module is table or call.output is None or not isinstance(weight, torch.Tensor):
                continue
            added = call.output.reshape(-1, call.output.shape[-1])[: rest.shape[1]]
            if added.shape == rest.shape[1:] and same(rest, added.expand_as(rest).contiguous()):
                offset = next((o for o in range(4) if same(added, weight[o : o + len(added)])), None)
                if offset is not None and call.module in self._names:
                    return {"pos_embed": self._names[call.module], "pos_embed_offset": offset, "embed_scale": own}
        return {}

    def _logit_scale(self) -> Number:
        head = next((c for c in self._outside if c.module is self._twin.get_output_embeddings()), None)
        numbers = _numbers(self._config)
        inverse = [lambda config, number=number: 1.0 / number(config) for number in numbers]
        for scale in (lambda _: 1.0, *numbers, *inverse):
            if (
                head is not None
                and head.output is not None
                and same(self._recording.logits, head.output * scale(self._config))
            ):
                return scale
        return lambda _: 1.0


def _kind_of(block: Call, inside: Sequence[Call]) -> Hashable:
    """Return what tells blocks apart that are not alike: what ran in them, with which parameters, under which mask."""
    return str(getattr(block.module, "attention_type", "")), frozenset(
        (
            re.sub(r"\b\d+\b", "N", call.path),
            type(call.module).__name__,
            *((name, parameter.shape) for name, parameter in call.module.named_parameters(recurse=False)),
        )
        for call in inside
    )


def _is_chain(calls: Sequence[Call], shape: torch.Size) -> bool:
    """Whether each call takes, bit for bit, what the one before it gave."""
    for call in calls:
        if call.input is None or call.input.ndim != 3 or call.input.shape[:2] != shape:
            return False
    chained = all(any(_equal(out, b.input) for out in a.outputs) for a, b in itertools.pairwise(calls))
    return chained and any(out.shape == calls[-1].input.shape for out in calls[-1].outputs)  # type: ignore[union-attr]


def _equal(left: torch.Tensor, right: torch.Tensor | None) -> bool:
    return right is not None and left.shape == right.shape and torch.equal(left, right)


def _attribute(name: str) -> Number:
    return lambda config: getattr(config, name)


def _as_told(config: Any, names: Sequence[str], value: int | None) -> Number | None:
    """Return the name under which a configuration says a number."""
    for name in names:
        said = told(config, name)
        if said is not None and (value is None or said == value):
            return _attribute(name)
    return None


def _key_heads(config: Any, attention: Attention, heads: Number | None) -> Number | None:
    """Return where a configuration says the number of key heads, which a model may have repeated for its queries."""
    keys = attention.seen.key
    own = [name for name in config.to_dict() if name.endswith(tuple(_KEY_HEADS)) and name not in _KEY_HEADS]
    for name in [*_KEY_HEADS, *own]:
        said = told(config, name)
        if said and keys.shape[1] % said == 0:
            repeats = keys.shape[1] // said
            if same(keys[:, ::repeats].repeat_interleave(repeats, dim=1), keys):
                return _attribute(name)
    if heads is not None and keys.shape[1] == int(heads(config)):
        return heads
    return (lambda _: 1) if keys.shape[1] == 1 else None


def _numbers(config: Any) -> list[Number]:
    """Return the factors that a configuration names."""
    found: list[Number] = []
    for name, value in config.to_dict().items():
        is_factor = isinstance(value, int | float) and not isinstance(value, bool) and value not in (0, 1)
        if is_factor and any(word in name for word in ("scale", "scaling", "multiplier", "mup")):
            found.append(_attribute(name))
    return found


def _scales(config: Any) -> list[Number]:
    """Return what branches may be multiplied with: 1 first."""
    found: list[Number] = [lambda _: 1.0, *_numbers(config)]
    if hasattr(config, "scale_depth"):
        found.append(lambda config: config.scale_depth / config.num_hidden_layers**0.5)
    return found


def _entry(parts: BlockParts, name: str, heads: Number, key_heads: Number) -> Family:
    """Return the entry of one block."""
    known = set(parts.projections) == {"q", "k", "v"}
    branches = _branch_names(parts)
    attention_out = parts.attention_branch
    seen = parts.attention is not None and (known or not parts.own_code)  # own code shows values by projection only
    return Family(
        name=name,
        model_types=(name,),
        norm="RMS",
        embed="",
        blocks="",
        final_norm=None,
        ln1=parts.norms.get("ln1"),
        attention=parts.attention if seen else None,
        q=parts.projections["q"] if known else None,
        k=parts.projections["k"] if known else None,
        v=parts.projections["v"] if known else None,
        out=parts.out if seen else None,
        ln2=parts.norms.get("ln2"),
        mlp=parts.mlp,
        w_in=parts.w_in,
        w_out=parts.w_out,
        w_gate=parts.w_gate,
        router=parts.router,
        router_scores=parts.router_scores,  # type: ignore[arg-type]
        ln1_post=parts.norms.get("ln1_post"),
        ln2_post=parts.norms.get("ln2_post"),
        attn_out=None if attention_out in (parts.attention, parts.norms.get("ln1_post")) else attention_out,
        q_norm=parts.qk_norms.get("q_norm") if known and len(parts.qk_norms) == 2 else None,
        k_norm=parts.qk_norms.get("k_norm") if known and len(parts.qk_norms) == 2 else None,
        sinks=parts.sinks,
        qk_norm=parts.qk_norm.kind if parts.qk_norm else "RMS",
        qk_norm_input=parts.qk_norm_input,  # type: ignore[arg-type]
        rotary=parts.attention is not None and (parts.rotary or not known),
        parallel=parts.parallel or branches == ("hook_mlp_out",),
        post_norm=parts.post_norm,
        flat_mlp=parts.flat_mlp,
        sees_attention_by="softmax" if parts.own_code else "interface",
        n_heads=heads,  # type: ignore[arg-type]
        n_kv_heads=key_heads,  # type: ignore[arg-type]
        d_qk=latent_size if parts.latent else None,
        branches=branches,
        others=parts.others,
        gated_z=parts.gated,
        by_structure=True,
    )


def _branch_names(parts: BlockParts) -> tuple[str, ...]:
    """Return the names of what the block adds, in order."""
    names = {parts.attention_branch: "hook_attn_out", parts.mlp_branch: "hook_mlp_out"}
    found = []
    for branch in parts.branches:
        other = next((kind for kind, path in parts.others.items() if path == branch.path), "")
        found.append(names.get(branch.path) or other)
    return tuple(found)

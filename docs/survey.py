"""Try every causal language model of transformers, and every entry, on a small random twin of its configuration.

    python docs/survey.py               write docs/families.md (some minutes)
    python docs/survey.py gpt2 helium   print the lines of these types

Each type runs in a process of its own, so that one that crashes is one line of the page. What a model with an entry
offers is proven by the identities of `actpipe check`, and compared with what its structure alone tells; what one
without an entry offers is what structure tells and the identities prove.
"""

from __future__ import annotations

import multiprocessing
import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import families_page
import torch
import transformers
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from actpipe.errors import ActpipeError
from actpipe.models.families import all_families, entry_for
from actpipe.models.families.entry import Family
from actpipe.models.hooked_model import HookedModel
from actpipe.models.identities import check_identities
from actpipe.models.loading import ModelSource
from actpipe.models.recognition.recognising import recognise
from actpipe.models.twins import build_twin, twin_ids

PAGE = Path(__file__).parent / "families.md"
SECONDS = 600
"""The longest that one type may take."""
AGREE = 1e-5
"""Largest difference between two routes to a hook point, relative to its largest value."""

_DECODER = {"is_decoder": True}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
SETTINGS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ["bert-generation", "big_bird", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert"], _DECODER
    ),
    **dict.fromkeys(["roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta-xl"], _DECODER),
    "xmod": {**_DECODER, "default_language": "en_XX"},
    "reformer": {**_DECODER, "axial_pos_embds": False},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 8, "clip_qkv": 8}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "lfm2_moe": {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2},
}
"""What a type is told because its defaults cannot be built, or are not a causal model."""
ALSO: dict[str, dict[str, Any]] = {
    **dict.fromkeys(["bert", "camembert", "roberta", "xlm-roberta"], _DECODER),
    "mllama": {"text_config": {"cross_attention_layers": []}},
    "rwkv": {"rescale_every": 0},
}
"""A second configuration of a type, which behaves as another architecture does."""


@dataclass(frozen=True)
class Subject:
    """One configuration to try."""

    model_type: str
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Finding:
    """What was found of one configuration; made of plain values, so that it passes between processes."""

    subject: Subject
    route: str
    """`entry`, `structure`, or `none`."""
    reason: str = ""
    """Why it is not supported."""
    kinds: tuple[str, ...] = ()
    """Hook points without layer, all proven."""
    branches: tuple[tuple[str, ...], ...] = ()
    """What each layer adds to the stream."""
    n_attention: int = 0
    """Layers with attention whose pattern is offered."""
    withheld: tuple[str, ...] = ()
    """Kinds that no identity proves."""
    comparison: str = ""
    """An entry beside structure."""


def subjects() -> list[Subject]:
    """Return every type of the causal mapping, every entry beside it, and second configurations."""
    types = sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *all_families()})
    first = [Subject(model_type, SETTINGS.get(model_type, {})) for model_type in types]
    return sorted([*first, *(Subject(*item) for item in ALSO.items())], key=lambda subject: subject.model_type)


def survey(subject: Subject) -> Finding:
    """Try one configuration."""
    try:
        config = AutoConfig.for_model(subject.model_type, **subject.settings)
    except Exception as error:  # noqa: BLE001  # a configuration whose own defaults it refuses
        return Finding(subject, "none", reason=f"its default configuration is refused: {_last_line(error)}")
    entry = entry_for(config)
    try:
        if entry is not None:
            return _of_entry(subject, config, entry)
        family = recognise(config)
    except ActpipeError as error:
        return Finding(subject, "none", reason=_reason(error))
    model = HookedModel(build_twin(config), ModelSource(subject.model_type), family=family)
    return _finding(subject, "structure", model, tuple(family.withheld))


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()


def _reason(error: Exception) -> str:
    """Return why structure did not tell, without sizes, which differ between machines."""
    return str(error).partition(" are, and ")[2].partition(" is off by ")[0] or str(error)


def _of_entry(subject: Subject, config: Any, entry: Family) -> Finding:
    twin = build_twin(config)
    model = HookedModel(twin, ModelSource(subject.model_type), family=entry)
    outcomes = check_identities(model, twin_ids())
    proven = {kind for outcome in outcomes if outcome.holds for kind in outcome.kinds}
    failing = {kind for outcome in outcomes if not outcome.holds for kind in outcome.kinds or ("everything",)}
    unproven = failing | ({point.kind for point in model.hook_points.values()} - proven)
    comparison = compare(config, model) if entry.task == "causal" else "not tried"
    return _finding(subject, "entry", model, tuple(sorted(unproven)), comparison)


def _finding(
    subject: Subject, route: str, model: HookedModel, withheld: tuple[str, ...], comparison: str = ""
) -> Finding:
    kinds = tuple(dict.fromkeys(point.kind for point in model.hook_points.values() if point.kind not in withheld))
    return Finding(
        subject,
        route,
        kinds=kinds,
        branches=tuple(_branches(block, kinds) for block in model.shape.blocks),
        n_attention=sum(point.kind == "attn.hook_pattern" for point in model.hook_points.values()),
        withheld=withheld,
        comparison=comparison,
    )


def _branches(block: Any, kinds: Sequence[str]) -> tuple[str, ...]:
    """Return what a block is proven to add; nothing where one of it is withheld."""
    whole = set(block.branches) <= {*kinds}
    cross = ("hook_cross_attn_out",) if block.cross else ()
    return (*block.branches[:1], *cross, *block.branches[1:]) if whole and block.branches else ()


def compare(config: Any, model: HookedModel) -> str:
    """Say in a few words where structure gives other hook points than the entry, or other values."""
    try:
        family = recognise(config)
    except ActpipeError as error:
        return f"not told: {_reason(error)}"
    other = HookedModel(model.native, model.source, family=family)
    both = [name for name in model.hook_points if name in other.hook_points]
    ours, theirs = (each.run_with_cache(twin_ids(), names=both)[1] for each in (model, other))
    return families_page.comparison(
        different=_kinds(model, [name for name in both if not _agree(ours[name], theirs[name])]),
        missing=_kinds(model, model.hook_points.keys() - other.hook_points.keys()),
        more=_kinds(other, other.hook_points.keys() - model.hook_points.keys()),
    )


def _kinds(model: HookedModel, names: Iterable[str]) -> list[str]:
    wanted = set(names)
    return list(dict.fromkeys(point.kind for name, point in model.hook_points.items() if name in wanted))


def _agree(left: torch.Tensor, right: torch.Tensor) -> bool:
    if left.shape != right.shape:
        return False
    gap = torch.where(left == right, 0.0, (left.float() - right.float()).abs()).max()
    finite = left[torch.isfinite(left)].float().abs()
    return bool(gap <= AGREE * (finite.max() if finite.numel() else 1.0))


def in_own_process(subject: Subject) -> Finding:
    """Try one configuration where it can neither crash nor fill this process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, subject))
    process.start()
    sender.close()
    try:
        done = receiver.poll(SECONDS)
        return receiver.recv() if done else Finding(subject, "none", reason=f"not done within {SECONDS} seconds")
    except EOFError:
        process.join()
        return Finding(subject, "none", reason=f"its process ended with {process.exitcode}")
    finally:
        process.kill()
        process.join()


def _send(sender: Connection, subject: Subject) -> None:
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    try:
        finding = survey(subject)
    except Exception as error:  # noqa: BLE001  # it is the page that says so, and the next type goes on
        finding = Finding(subject, "none", reason=f"{type(error).__name__}: {_last_line(error)}")
    sender.send(finding)


def main(model_types: Sequence[str]) -> None:
    """Try the types named, or all of them and write the page."""
    chosen = [subject for subject in subjects() if not model_types or subject.model_type in model_types]
    found = []
    for subject in chosen:
        found.append(in_own_process(subject))
        print(families_page.line(found[-1]), flush=True)
    if not model_types:
        PAGE.write_text(families_page.page(found, transformers.__version__))


if __name__ == "__main__":
    main(sys.argv[1:])

"""How findings of `survey.py` are written: lines, counts, and the page around them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from survey import Finding

_ATTENTION = ("q", "k", "rot_q", "rot_k", "v", "attn_scores", "pattern", "z")
_TOP = """\
# Architectures

What actpipe offers for every causal language model of transformers {version}, and for every entry of its own. Made by
`make families`, which tries each on a small model with random weights and the switches of its default configuration.

{counts}

An **entry** says where the parts of an architecture are. Without one a small twin is run, its parts are found **by
structure**, and only what the identities of `actpipe check` prove is offered. On the weights that are loaded every
identity is checked once more.
"""
_LEGEND = """\
## Columns

- **adds up**: what each block adds to the residual stream, the sum being proven; where layers are not alike, each kind
  of layer. A dash: the block does something else than add, and only the stream itself and what is named beside it hold.
- **attention**: what is proven inside. Queries and keys after rotary, `rot_q` and `rot_k`, are named only where
  `q` and `k` are not: most such types put them together from latent vectors.
- **MLP**: `pre post` are its neurons, `router` the choice of experts; `whole` where only what it puts out is.
- **withheld**: kinds of hook points that the architecture seems to have and that no identity proves. They are refused
  by name. `embed` is withheld where more than a table and positions makes up the first residual stream.
"""


_OWN_CODE = """\
## Models that bring their own code

With `trust_remote_code`, structure is tried on what that code builds, as on any type without an entry. Old code may not
run at all: that of the first Qwen calls `get_head_mask`, which transformers 5 no longer has. A stand-in with its layout
is told whole; see `tests/qwen_stand_in.py`.
"""

_TABLES = {
    "entry": ("Entries", ["type", "adds up", "attention", "MLP", "not proven", "by structure alone"]),
    "structure": ("By structure", ["type", "adds up", "attention", "MLP", "withheld"]),
    "none": ("Refused", ["type", "why"]),
}


def comparison(*, different: Sequence[str], missing: Sequence[str], more: Sequence[str]) -> str:
    """Return how structure compares with an entry, in a few words."""
    said = []
    if different:
        said.append(f"**other values**: {_names(different)}")
    said += [f"without {_names(missing)}"] if missing else []
    said += [f"also {_names(more)}"] if more else []
    return "; ".join(said) or "the same"


def line(finding: Finding) -> str:
    """Return one row of the table that the finding belongs to."""
    name = f"`{finding.subject.model_type}`"
    if finding.subject.settings:
        name += f" with `{json.dumps(finding.subject.settings)}`"
    if finding.route == "none":
        return f"| {name} | {_escaped(finding.reason)} |"
    cells = [name, _adds_up(finding), _attention(finding), _mlp(finding), _names(finding.withheld) or "nothing"]
    return " | ".join(["", *cells, *([finding.comparison] if finding.route == "entry" else []), ""]).strip()


def page(found: Sequence[Finding], version: str) -> str:
    """Return the whole page."""
    parts = [_TOP.format(version=version, counts=_counts(found)), _LEGEND]
    for route, (title, columns) in _TABLES.items():
        rows = [line(finding) for finding in found if finding.route == route]
        parts.append("\n".join([f"## {title}\n", f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}", *rows, ""]))
    return "\n".join([*parts, _OWN_CODE])


def is_whole(finding: Finding) -> bool:
    """Whether every block is proven to add what it is said to add."""
    return finding.route != "none" and all(finding.branches)


def _counts(found: Sequence[Finding]) -> str:
    """Return how many types go which way; a type counts under its first configuration."""
    first = {finding.subject.model_type: finding for finding in reversed(found)}
    count = Counter((finding.route, is_whole(finding)) for finding in first.values())
    rows = [
        ("tried", len(first)),
        ("by an entry", count["entry", True] + count["entry", False]),
        ("by structure, every block's sum proven", count["structure", True]),
        ("by structure, in some layers the residual stream without its sum", count["structure", False]),
        ("refused", count["none", False]),
    ]
    return "\n".join(["| types | |", "|---|---|", *(f"| {what} | {number} |" for what, number in rows)])


def _short(kind: str) -> str:
    return kind.replace("hook_", "").removesuffix(".out")


def _names(kinds: Sequence[str]) -> str:
    return ", ".join(_short(kind) for kind in kinds)


def _adds_up(finding: Finding) -> str:
    kinds = dict.fromkeys(finding.branches)
    return "; ".join(" + ".join(map(_short, branches)) or "—" for branches in kinds)


def _attention(finding: Finding) -> str:
    latent = "attn.hook_q" not in finding.kinds
    names = [name for name in _ATTENTION if latent or not name.startswith("rot_")]
    found = [name for name in names if f"attn.hook_{name}" in finding.kinds]
    if not found:
        return "—"
    some = finding.n_attention not in (0, len(finding.branches))
    return " ".join(found) + (f" ({finding.n_attention} of {len(finding.branches)} layers)" if some else "")


def _mlp(finding: Finding) -> str:
    neurons = "pre post" if {"mlp.hook_pre", "mlp.hook_post"} <= set(finding.kinds) else ""
    router = "router" if "mlp.hook_router_logits" in finding.kinds else ""
    whole = "whole" if "hook_mlp_out" in finding.kinds else "—"
    return ", ".join(filter(None, (neurons, router))) or whole


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")

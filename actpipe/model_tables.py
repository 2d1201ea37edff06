"""What models have and whether it holds, as tables for people."""

from __future__ import annotations

import math
from collections.abc import Sequence

from actpipe.errors import RecipeError, did_you_mean
from actpipe.models.hooked_model import HookedModel, ModelSpec
from actpipe.models.identities import check_identities, probe_ids
from actpipe.models.loading import ModelSource
from actpipe.records import Finding

_SIZES = ("n_layers", "d_model", "n_heads", "n_kv_heads", "d_head", "d_mlp", "d_vocab", "n_ctx")
_ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def describe_hooks(model: str, patterns: Sequence[str], *, context: int, dtype: str, revision: str | None) -> Finding:
    """List hook points with the bytes that one token takes on disk.

    Args:
        model: Hub name or folder.
        patterns: Names or patterns to list.
        context: Length that scores and patterns have; 0 for the model's own.
        dtype: Element type on disk.
        revision: Branch, tag or commit on the hub.
    """
    if dtype not in _ITEM_BYTES:
        raise RecipeError(f"dtype {dtype!r} is none of {', '.join(_ITEM_BYTES)}{did_you_mean(dtype, _ITEM_BYTES)}")
    spec = ModelSpec(ModelSource(model, revision))
    context = context or spec.shape.n_ctx
    rows, total = [], 0
    for name in spec.select(patterns):
        point = spec.hook_points[name]
        shape = point.row_shape(spec.shape, context)
        n_bytes = (4 if point.integer else _ITEM_BYTES[dtype]) * math.prod(shape)
        total += 0 if point.on_request else n_bytes
        axes = " x ".join(f"{axis} {size}" for axis, size in zip(point.axes, shape, strict=True))
        note = f"{point.meaning} (from {point.on_request})" if point.on_request else point.meaning
        rows.append((name, f"{n_bytes:,}", axes, note))
    sizes = ", ".join(f"{name} {getattr(spec.shape, name)}" for name in _SIZES)
    return Finding(
        f"{spec.source.title}: {spec.anatomy.family.name}, {spec.n_parameters:,} parameters, {sizes}",
        ("name", "bytes/token", "shape of a row", "meaning"),
        tuple(rows),
        note=f"{len(rows)} hook points, {total:,} bytes per token in {dtype}, context {context}",
    )


def check_model(model: str, *, dtype: str, device: str, revision: str | None) -> tuple[Finding, bool]:
    """Check every identity on a model; return the table, and whether all hold."""
    hooked = HookedModel.from_pretrained(model, revision=revision, dtype=dtype, device=device)
    outcomes = check_identities(hooked, probe_ids(hooked))
    rows = tuple(
        (
            "holds" if o.holds else "FAILS",
            f"{o.error:.1e}",
            f"{o.tolerance:.0e}",
            o.statement,
            "" if o.holds else o.where,
        )
        for o in outcomes
    )
    n_failed = sum(not outcome.holds for outcome in outcomes)
    proven = {kind for outcome in outcomes if outcome.holds for kind in outcome.kinds}
    kinds = {point.kind for point in hooked.hook_points.values()}
    verdict = f"{n_failed} of {len(outcomes)} fail" if n_failed else f"all {len(outcomes)} identities hold"
    finding = Finding(
        f"{hooked.source.title}: {hooked.anatomy.family.name}, {hooked.dtype}".replace("torch.", ""),
        ("", "error", "at most", "identity", "where"),
        rows,
        note=f"{verdict}; {len(kinds & proven)} of {len(kinds)} kinds of hook points proven",
    )
    return finding, n_failed == 0

"""What models and run folders hold, as tables for people."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from actpipe.errors import IncompleteStoreError, RecipeError, did_you_mean
from actpipe.models.hooked_model import HookedModel, ModelSpec
from actpipe.models.identities import check_identities, probe_ids
from actpipe.models.loading import ModelSource
from actpipe.planning import format_bytes
from actpipe.records import Finding
from actpipe.stores.layout import RunFolder
from actpipe.stores.reading import ActivationStore
from actpipe.stores.results import list_results
from actpipe.stores.token_table import TokenTable
from actpipe.stores.verifying import chunk_bytes, corpora, find_problems
from actpipe.stores.writing import committed_parts
from actpipe.telemetry import Telemetry

_ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def describe_hooks(
    model: str, patterns: Sequence[str], *, context: int, dtype: str, revision: str | None
) -> Finding:
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
        n_bytes = _ITEM_BYTES[dtype]
        for size in shape:
            n_bytes *= size
        total += 0 if point.on_request else n_bytes
        axes = " x ".join(f"{axis} {size}" for axis, size in zip(point.axes, shape, strict=True))
        note = f"{point.meaning} (not stored)" if point.on_request else point.meaning
        rows.append((name, f"{n_bytes:,}", axes, note))
    title = f"{spec.source.title}: {spec.anatomy.family.name}, {spec.n_parameters:,} parameters, {spec.shape}"
    return Finding(
        title.replace("ModelShape(", "").removesuffix(")"),
        ("name", "bytes/token", "shape of a row", "meaning"),
        tuple(rows),
        note=f"{len(rows)} hook points, {total:,} bytes per token in {dtype}, context {context}",
    )


def check_model(model: str, *, dtype: str, device: str, revision: str | None) -> tuple[Finding, bool]:
    """Check every identity on a model; return the table, and whether all hold."""
    hooked = HookedModel.from_pretrained(model, revision=revision, dtype=dtype, device=device)
    outcomes = check_identities(hooked, probe_ids(hooked))
    rows = tuple(
        ("holds" if o.holds else "FAILS", f"{o.error:.1e}", f"{o.tolerance:.0e}", o.statement, "" if o.holds else o.where)
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


def open_run(path: Path) -> RunFolder:
    """Return a run's folder.

    Raises:
        IncompleteStoreError: It is no run folder; says what to do.
    """
    folder = RunFolder(path)
    if not path.is_dir():
        siblings = [str(path.parent / p.name) for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise IncompleteStoreError(f"there is no run folder {path}{did_you_mean(str(path), siblings)}")
    if not (folder.token_commit.exists() or folder.record.exists() or folder.store.exists()):
        raise IncompleteStoreError(f"{path} is no run folder: it has neither run.yaml nor store.zarr")
    return folder


def describe_run(path: Path) -> list[Finding]:
    """Say what a run folder holds."""
    return [finding for name, folder in corpora(open_run(path)).items() for finding in describe_corpus(name, folder)]


def describe_corpus(name: str, folder: RunFolder) -> list[Finding]:
    """Say what one corpus of a run holds."""
    if not TokenTable.exists(folder):
        return [Finding(f"Corpus {name}", ("",), (("not tokenized yet",),))]
    tokens = TokenTable(folder).manifest
    rows = [
        ("dataset", tokens.dataset),
        ("documents", f"{tokens.n_documents:,} {dict(tokens.status_counts)}"),
        ("sequences", f"{tokens.n_sequences:,} ({tokens.layout}, context {tokens.context_length})"),
        ("tokens", f"{tokens.n_rows:,}"),
    ]
    findings = [Finding(f"Corpus {name}", ("", ""), tuple(rows))]
    if folder.store.is_dir():
        findings.append(_describe_store(name, folder))
    results = list_results(folder)
    if results:
        shown = tuple(
            (r.record.name, r.record.kind, ", ".join(f"{k} {v:.4g}" for k, v in r.record.summary.items()))
            for r in results
        )
        findings.append(Finding(f"Results of {name}", ("name", "kind", "summary"), shown))
    return findings


def _describe_store(name: str, folder: RunFolder) -> Finding:
    store = ActivationStore(folder)
    model = store.manifest.model
    rows = []
    for array in map(store.array, store.array_names):
        size = format_bytes(array.row_bytes * store.n_rows)
        rows.append((array.manifest.path, array.manifest.dtype, str(array.shape), size))
    done = len(committed_parts(folder))
    return Finding(
        f"Store of {name}: {model.name}, {model.family}, computed in {model.dtype}",
        ("array", "type", "shape", "size"),
        tuple(rows),
        note=f"{done} of {store.n_parts} parts of {store.manifest.rows_per_part:,} rows committed, "
        f"{format_bytes(chunk_bytes(folder))} on disk",
    )


def verify_run(path: Path) -> tuple[list[str], str]:
    """Check every corpus of a run; return what is wrong, and how much was checked."""
    run = open_run(path)
    problems: list[str] = []
    total = sum(chunk_bytes(folder) for folder in corpora(run).values())
    with Telemetry().progress("verify", total, "B") as meter:
        for name, folder in corpora(run).items():
            prefix = "" if name == "main" else f"{name}: "
            problems += [prefix + problem for problem in find_problems(folder, meter.advance)]
    return problems, format_bytes(total)

"""What run folders hold, as tables for people. Loads no torch."""

from __future__ import annotations

from pathlib import Path

from actpipe.errors import IncompleteStoreError, did_you_mean
from actpipe.planning import format_bytes
from actpipe.records import Finding
from actpipe.stores.layout import RunFolder
from actpipe.stores.reading import ActivationStore
from actpipe.stores.results import list_results
from actpipe.stores.token_table import TokenTable
from actpipe.stores.verifying import chunk_bytes, corpora, find_problems
from actpipe.stores.writing import committed_parts
from actpipe.telemetry import Telemetry


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


def describe_tokens(table: TokenTable) -> Finding:
    """Say what a token table holds and what it left out."""
    manifest = table.manifest
    rows = [
        ("documents", f"{manifest.n_documents:,}", ""),
        ("sequences", f"{manifest.n_sequences:,}", f"{manifest.layout}, context {manifest.context_length}"),
        ("tokens", f"{manifest.n_rows:,}", ""),
    ]
    if manifest.n_truncated:
        rows.append(("truncated tokens", f"{manifest.n_truncated:,}", "of documents longer than what was taken"))
    for status, ids in manifest.first_problems.items():
        more = ", ..." if manifest.status_counts[status] > len(ids) else ""
        rows.append((f"left out: {status}", f"{manifest.status_counts[status]:,}", f"ids {', '.join(ids)}{more}"))
    return Finding(f"Corpus: {manifest.dataset}", ("", "count", ""), tuple(rows))


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

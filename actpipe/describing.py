"""What run folders hold, as tables for people. Loads no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ruamel.yaml.error import YAMLError

from actpipe.errors import IncompleteStoreError, did_you_mean
from actpipe.planning import format_bytes
from actpipe.records import Finding
from actpipe.stores.cleaning import abandoned, clear_abandoned, size_of
from actpipe.stores.layout import RunFolder, disk_trouble_explained
from actpipe.stores.locking import only_run_in
from actpipe.stores.reading import ActivationStore
from actpipe.stores.remote import local_folder
from actpipe.stores.results import list_results
from actpipe.stores.run_record import read_record
from actpipe.stores.token_table import TokenTable
from actpipe.stores.verifying import chunk_bytes, corpora, find_problems
from actpipe.stores.writing import committed_parts
from actpipe.telemetry import Telemetry


def open_run(path: Path) -> RunFolder:
    """Return a run's folder.

    Raises:
        IncompleteStoreError: It is no run folder; says what to do.
    """
    path = local_folder(path)
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
    findings = [_describe_table(name, folder)]
    if folder.has_store:
        findings.append(_describe_store(name, folder))
        findings += describe_fidelity(ActivationStore(folder))
    results = list_results(folder)
    if results:
        shown = tuple((r.record.name, r.record.kind, _numbers(r.record.summary)) for r in results)
        findings.append(Finding(f"Results of {name}", ("name", "kind", "summary"), shown))
    return findings


def _describe_table(name: str, folder: RunFolder) -> Finding:
    if not TokenTable.exists(folder):
        return Finding(f"Corpus {name}", ("",), (("not tokenized",),))
    tokens = TokenTable(folder).manifest
    rows = (
        ("dataset", tokens.dataset),
        ("documents", f"{tokens.n_documents:,} {dict(tokens.status_counts)}"),
        ("sequences", f"{tokens.n_sequences:,} ({tokens.layout}, context {tokens.context_length})"),
        ("tokens", f"{tokens.n_rows:,}"),
    )
    return Finding(f"Corpus {name}", ("", ""), rows)


def _describe_store(name: str, folder: RunFolder) -> Finding:
    store = ActivationStore(folder)
    model = store.manifest.model
    rows = []
    for array in map(store.array, store.array_names):
        size = format_bytes(array.row_bytes * store.n_rows)
        kept = array.manifest.quantisation
        dtype = array.manifest.dtype if kept is None else f"{kept.code}, read as {array.manifest.dtype}"
        rows.append((array.manifest.path, dtype, str(array.shape), size))
    done = len(committed_parts(folder))
    return Finding(
        f"Store of {name}: {model.name}, {model.family}, computed in {model.dtype}",
        ("array", "type", "shape", "size"),
        tuple(rows),
        note=f"{done} of {store.n_parts} parts of {store.manifest.rows_per_part:,} rows committed, "
        f"{format_bytes(chunk_bytes(folder))} on disk",
    )


def describe_fidelity(store: ActivationStore) -> list[Finding]:
    """Say what quantising did to the values of a store, if it did anything."""
    rows = tuple(
        (array.removeprefix("activations/"), f"{found.relative_error:.2%}", f"{found.cosine:.6f}")
        for array, found in store.fidelity.items()
    )
    return [Finding(f"Quantised: {store.manifest.corpus}", ("hook", "relative error", "cosine"), rows)] if rows else []


def verify_run(path: Path) -> tuple[list[str], str]:
    """Check every corpus of a run; return what is wrong, and how much was checked."""
    run = open_run(path)
    problems: list[str] = []
    if run.record.is_file():
        problems += [f"run.yaml: {what}" for what in _record_problems(run)]
    total = sum(chunk_bytes(folder) for folder in corpora(run).values())
    with Telemetry().progress("verify", total, "B") as meter:
        for name, folder in corpora(run).items():
            prefix = "" if name == "main" else f"{name}: "
            problems += [f"{prefix}{problem}" for problem in find_problems(folder, meter.advance)]
    return problems, format_bytes(total)


def _record_problems(run: RunFolder) -> list[str]:
    """Say why `run.yaml` cannot be read."""
    try:
        read_record(run)
    except (ValueError, YAMLError) as error:
        return [f"cannot be read ({str(error).splitlines()[0]})"]
    return []


def clean_run(path: Path, *, dry_run: bool = False) -> list[tuple[str, str]]:
    """Remove what killed runs left half done in a run folder; return the paths and their sizes.

    Raises:
        StoreMismatchError: A run is at work there, so that nothing is abandoned.
    """
    run = open_run(path)
    with disk_trouble_explained(run), only_run_in(run):
        found = [(str(left.relative_to(path)), format_bytes(size_of(left))) for left in abandoned(run)]
        if not dry_run:
            clear_abandoned(run)
    return found


def _numbers(summary: Mapping[str, float | int | str]) -> str:
    """Return the few numbers worth a line, as one."""
    return ", ".join(
        f"{key} {value}" if isinstance(value, str) else f"{key} {value:.4g}" for key, value in summary.items()
    )

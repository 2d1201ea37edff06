"""Trust in a run: mend what is not as it was committed, and run samples of it again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from actpipe.describing import open_run
from actpipe.errors import IncompleteStoreError
from actpipe.extraction.deriving import plan_derivations
from actpipe.extraction.rechecking import Difference, recheck
from actpipe.records import Finding, Part
from actpipe.running import check_against_record, prepare, run_after
from actpipe.schemas.recipe import ExtractActivationsConfig
from actpipe.stage import RunContext
from actpipe.stores.layout import RunFolder
from actpipe.stores.reading import ActivationStore
from actpipe.stores.run_record import read_record
from actpipe.stores.verifying import Problem, Remedy, corpora, find_problems
from actpipe.stores.writing import withdraw
from actpipe.telemetry import Telemetry

RecipeOfRun = str | Path | Mapping[str, Any] | None


@dataclass(frozen=True)
class RepairSummary:
    """What a repair did, and what it leaves to people."""

    mended: tuple[Problem, ...]
    left: tuple[Problem, ...]
    """What is wrong still; empty where all is well."""


def repair_run(run: str | Path, *, recipe: RecipeOfRun = None, telemetry: Telemetry | None = None) -> RepairSummary:
    """Do again what is missing or broken in a run, and nothing else; files of others are left alone.

    Args:
        run: The run folder.
        recipe: The recipe it was made by; by default the one kept in `run.yaml`, whose relative paths
            then start from the working folder.
        telemetry: Who is told; by default a console on the standard error stream.

    Raises:
        ActpipeError: The run cannot be continued by this recipe; nothing was changed.
    """
    folder = open_run(Path(run))
    before: list[Problem] = []

    def withdraw_broken(folder: RunFolder) -> None:
        for corpus in corpora(folder).values():
            problems = find_problems(corpus)
            before.extend(problems)
            for problem in problems:
                _withdraw(corpus, problem)

    stages, context = prepare(recipe or read_record(folder).recipe, run, (), telemetry or Telemetry())
    run_after(withdraw_broken, stages, context)
    left = [problem for corpus in corpora(folder).values() for problem in find_problems(corpus)]
    return RepairSummary(tuple(problem for problem in before if problem not in left), tuple(left))


def _withdraw(folder: RunFolder, problem: Problem) -> None:
    """Remove the record that makes a broken thing count; a token table's is kept aside to compare with."""
    if problem.record is None or not problem.record.is_file():
        return
    if problem.remedy is Remedy.TOKENS:
        problem.record.replace(folder.withdrawn_tokens)
    else:
        withdraw(problem.record)


def recheck_run(
    run: str | Path,
    *,
    n_sequences: int = 16,
    seed: int = 0,
    recipe: RecipeOfRun = None,
    telemetry: Telemetry | None = None,
) -> tuple[list[Finding], bool]:
    """Run a random sample of every corpus through the model again, and compare with what is stored.

    Args:
        run: The run folder; its stores must be finished.
        n_sequences: Sequences of each corpus.
        seed: Of the draw.
        recipe: As for `repair_run`.
        telemetry: Who is told; by default a console on the standard error stream.

    Returns:
        A table per corpus with the largest difference of each array, and whether all of it is rounding.

    Raises:
        ActpipeError: The model is not the one that the run was made with, or a store is not finished.
    """
    folder = open_run(Path(run))
    record = read_record(folder)
    _, context = prepare(recipe or record.recipe, run, (), telemetry or Telemetry())
    check_against_record(folder, context.recipe, context.spec.identity)
    names = [name for name, corpus in corpora(folder).items() if corpus.has_store]
    if not names:
        raise IncompleteStoreError(f"{folder.root} has no store whose values could be compared; run its recipe first")
    findings, holds = [], True
    for name in names:
        differences = _recheck_corpus(context, name, n_sequences, seed)
        findings.append(_describe(name, differences))
        holds &= all(difference.holds for difference in differences)
    return findings, holds


def _recheck_corpus(context: RunContext, name: str, n_sequences: int, seed: int) -> list[Difference]:
    folder = context.folder.corpus(name)
    store = ActivationStore(folder)
    store.require_complete()
    config = context.settings_of(ExtractActivationsConfig, name)
    if config is None:
        raise IncompleteStoreError(f"the recipe has no stage extract_activations for the corpus {name!r}")
    first, stop = (store.kept_rows or store.tokens).sequence_rows()
    drawn = np.random.default_rng(seed).choice(len(first), min(n_sequences, len(first)), replace=False)
    parts = [Part(number, int(first[i]), int(stop[i])) for number, i in enumerate(sorted(drawn))]
    n_rows = sum(part.n_rows for part in parts)
    derivations = plan_derivations(config, context.spec, context.base, store.manifest.context_length)
    with context.telemetry.progress(f"compare {name}", n_rows, "tokens") as meter:
        return recheck(store, context.model, config, parts, meter, derivations)


def _describe(name: str, differences: list[Difference]) -> Finding:
    rows = [
        (
            difference.array,
            f"{difference.largest:.3g}",
            f"{difference.largest_share:.2g}",
            f"{difference.n_wrong:,} of {difference.n_values:,}",
            "" if difference.holds else "wrong",
        )
        for difference in differences
    ]
    return Finding(
        f"Stored and computed again: {name}",
        ("array", "largest difference", "of what rounding may do", "beyond it", ""),
        tuple(rows),
    )

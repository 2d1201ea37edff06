"""Token table -> statistics of activations that are not stored."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from actpipe.schemas.reducing import ReduceActivationsConfig
from actpipe.schemas.results import ResultRecord

from actpipe.compute.accumulators import Arrays
from actpipe.extraction.deriving import Derivation, captured_hooks, plan_derivations
from actpipe.extraction.keeping import settle_rows
from actpipe.extraction.proof import prove_hooks
from actpipe.extraction.reducing import PartialSums, ReducingWorker, check_statistics, merge_all, reduced_of
from actpipe.extraction.settling import check_batch_tokens, settle_batch_tokens
from actpipe.hooks import HookPoint
from actpipe.model_inputs import inputs_of, special_token_ids
from actpipe.planning import plan_parts
from actpipe.records import Finding, Part
from actpipe.reduction_results import reduction_dataset
from actpipe.stage import RunContext
from actpipe.stores.kept_rows import KeptRows
from actpipe.stores.layout import RunFolder, take_away
from actpipe.stores.results import Result, ResultWriter, current_result
from actpipe.stores.token_table import TokenTable
from actpipe.stores.writing import missing_parts
from actpipe.telemetry import Meter

_NOT_THE_NUMBERS = {"name", "corpus", "stage", "max_bytes"}


@dataclass(frozen=True)
class ReduceActivations:
    """Run the model over the token table and keep sums of the named activations."""

    config: ReduceActivationsConfig
    needs: ClassVar[tuple[str, ...]] = ("token_table",)
    gives: ClassVar[str] = "results"

    def check(self, context: RunContext) -> None:
        """Refuse activations that have no such statistics, and what would not fit into memory."""
        check_batch_tokens(self.config, context.folder, here=context.engine.is_here)
        shape, length = context.spec.shape, inputs_of(context, self.config.corpus).context_length
        check_statistics(self.config, self._points(context), self._derivations(context), shape, length)

    def run(self, context: RunContext) -> None:
        """Do every part that is not done, then put them together; doing it twice changes nothing."""
        wanted = self._wanted(context)
        result = current_result(context.corpus(self.config), wanted)
        if result is None:
            arrays = self._reduce(context)
            result = self._commit(context, ResultWriter(context.corpus(self.config), wanted), arrays)
            take_away(context.corpus(self.config).reductions, context.corpus(self.config))
        context.findings.append(_describe(result))

    def _wanted(self, context: RunContext) -> ResultRecord:
        return ResultRecord(
            name=self.config.name,
            kind="reduction",
            corpus=self.config.corpus,
            settings=self._settings(context),
            model_fingerprint=context.spec.identity.fingerprint,
        )

    def _place(self, context: RunContext) -> RunFolder:
        """Return the folder of what finished parts gave."""
        wanted, tokens = self._wanted(context), TokenTable(context.corpus(self.config))
        return RunFolder(context.corpus(self.config).reductions / f"{wanted.name}-{_digest(wanted, tokens)}")

    def _settings(self, context: RunContext) -> dict[str, object]:
        """Return what the numbers depend on: the settings, and the files that they name."""
        settings: dict[str, object] = self.config.model_dump(mode="json", exclude=_NOT_THE_NUMBERS)
        files = {one.config.name: one.sha256 for one in self._derivations(context) if one.sha256 is not None}
        return settings | ({"sha256": files} if files else {})

    def _points(self, context: RunContext) -> tuple[HookPoint, ...]:
        return tuple(context.spec.hook_points[name] for name in context.spec.select(self.config.hooks))

    def _derivations(self, context: RunContext) -> tuple[Derivation, ...]:
        length = inputs_of(context, self.config.corpus).context_length
        return plan_derivations(self.config, context.spec, context.base, length)

    def _reduce(self, context: RunContext) -> dict[str, Arrays]:
        """Do the parts that are missing, and merge all of them in their order."""
        tokens, place = TokenTable(context.corpus(self.config)), self._place(context)
        if self.config.keep is not None:
            settle_rows(place, tokens, self.config.keep, special_token_ids(context, tokens.manifest))
        parts, sums = self._parts(tokens, self._kept(place)), PartialSums(place)
        self._do(context, missing_parts(place, parts))
        self._do(context, [part for part in parts if sums.read(part) is None])
        return merge_all(self.config, (state for part in parts if (state := sums.read(part)) is not None))

    def _kept(self, place: RunFolder) -> KeptRows | None:
        return None if self.config.keep is None else KeptRows(place)

    def _parts(self, tokens: TokenTable, kept: KeptRows | None) -> tuple[Part, ...]:
        if kept is not None:
            return plan_parts(kept.manifest.n_rows, self.config.rows_per_part)
        blocks = tokens.sequence_blocks(self.config.rows_per_part)
        return tuple(Part(number, start, stop) for number, (start, stop) in enumerate(blocks))

    def _do(self, context: RunContext, parts: list[Part]) -> None:
        if not parts:
            return
        n_rows = sum(part.n_rows for part in parts)
        with context.telemetry.progress(f"{self.config.name} {self.config.corpus}", n_rows, "tokens") as meter:
            context.engine.run_parts(parts, self, context, meter)

    @contextmanager
    def open_worker(self, context: RunContext, meter: Meter) -> Iterator[ReducingWorker]:
        """Prove the names on this very model and hook them."""
        tokens, place = TokenTable(context.corpus(self.config)), self._place(context)
        prove_hooks(context.model, tokens, context.spec.select(captured_hooks(self.config)))
        derivations = self._derivations(context)
        settle_batch_tokens(
            self.config,
            place,
            lambda: context.model,
            context_length=tokens.manifest.context_length,
            derivations=derivations,
            note=meter.note,
        )
        sums = PartialSums(place)
        sums.begin()
        with ReducingWorker.open(
            self.config,
            context.model,
            tokens,
            self._kept(place),
            sums,
            meter=meter,
            derivations=derivations,
        ) as worker:
            yield worker

    def _commit(self, context: RunContext, writer: ResultWriter, arrays: dict[str, Arrays]) -> Result:
        length = inputs_of(context, self.config.corpus).context_length
        reduced = reduced_of(self._points(context), self._derivations(context), context.spec.shape, length)
        dataset = reduction_dataset(arrays, reduced)
        return writer.commit(dataset=dataset, summary={"n_hooks": len(arrays)})


def _digest(wanted: ResultRecord, tokens: TokenTable) -> str:
    """Return a name for parts that belong together: of one model, one token table and one set of settings."""
    identity = [wanted.settings, wanted.model_fingerprint, tokens.manifest.checksums]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]


def _describe(result: Result) -> Finding:
    rows = []
    for name, values in result.dataset.data_vars.items():
        hook, statistic = str(name).rsplit(".", 1)
        if statistic == "variance":
            mean = result.dataset[f"{hook}.mean"].values
            spread = float(np.sqrt(values.values.mean()))
            rows.append((hook, f"{spread:.4g}", f"{np.linalg.norm(mean):.4g}"))
    return Finding(f"Reduced: {result.record.corpus}", ("activation", "deviation", "length of the mean"), tuple(rows))

"""Store -> head scores (Dask)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pandas as pd
import xarray as xr
from actpipe.schemas.head_analyses import ScoreHeadsConfig

from actpipe.analysis import require_decoder, require_every_token, require_hooks, run_analysis
from actpipe.compute.heads import MEASURES
from actpipe.compute.patterns import NAMED_PATTERNS, DetectionPattern
from actpipe.jobs.heads import HeadScores, score_store_heads
from actpipe.pattern_choice import check_patterns, choose_patterns, pattern_hashes
from actpipe.records import Finding
from actpipe.stage import RunContext
from actpipe.stores.reading import ActivationStore
from actpipe.stores.results import Result, ResultWriter, labels
from actpipe.telemetry import Meter

_SHOWN = 3


@dataclass(frozen=True)
class ScoreHeads:
    """Say which heads attend as a pattern says: to the token before, to what followed equal ones, or as you say."""

    config: ScoreHeadsConfig
    needs: ClassVar[tuple[str, ...]] = ("store",)
    gives: ClassVar[str] = "results"

    def check(self, context: RunContext) -> None:
        """Refuse a store that will lack a layer's patterns, and detection patterns that make no sense."""
        require_decoder(context, self.config)
        names = context.spec.select(["blocks.*.attn.hook_pattern"])
        require_hooks(context, self.config, names)
        require_every_token(context, self.config)
        check_patterns(context, self.config)

    def run(self, context: RunContext) -> None:
        """Compute the scores, unless they are there."""

        def compute(store: ActivationStore, writer: ResultWriter, meter: Meter) -> Result:
            return self._compute(choose_patterns(context, self.config), store, writer, meter)

        hashes = pattern_hashes(context, self.config)
        more = {"pattern_sha256": dict(hashes)} if hashes else {}
        context.findings.extend(_describe(run_analysis(context, self.config, "heads", compute, more)))

    def _compute(
        self, patterns: tuple[DetectionPattern, ...], store: ActivationStore, writer: ResultWriter, meter: Meter
    ) -> Result:
        layers, n_heads = tuple(range(store.shape.n_layers)), store.shape.n_heads
        found = score_store_heads(
            store,
            patterns,
            layers,
            exclude_bos=self.config.exclude_bos,
            exclude_current_token=self.config.exclude_current_token,
            block_bytes=self.config.block_bytes,
            done=meter.advance,
        )
        dataset = xr.Dataset(
            {
                "score": (("measure", "pattern", "layer", "head"), found.scores),
                "uniform": ("pattern", found.uniform),
            },
            coords={
                "measure": labels(list(MEASURES)),
                "pattern": labels(list(self.config.pattern_names)),
                "layer": np.array(layers),
                "head": np.arange(n_heads),
            },
        )
        table = _as_table(found, self.config.pattern_names)
        return writer.commit(dataset=dataset, table=table, summary={"n_sequences": found.n_sequences})


def _as_table(found: HeadScores, patterns: tuple[str, ...]) -> pd.DataFrame:
    """Return one row per pattern and head, the best first within each pattern."""
    _, n_patterns, n_layers, n_heads = found.scores.shape
    pattern, layer, head = (axis.ravel() for axis in np.indices((n_patterns, n_layers, n_heads)))
    table = pd.DataFrame({"pattern": np.array(patterns, dtype=object)[pattern], "layer": layer, "head": head})
    for measure, values in zip(MEASURES, found.scores, strict=True):
        table[measure] = values.ravel()
    table["uniform"] = found.uniform[pattern]
    order = np.lexsort((-table["matched"].to_numpy(), pattern))
    return table.iloc[order].reset_index(drop=True)


def _describe(result: Result) -> list[Finding]:
    findings = []
    for pattern, table in result.table.groupby("pattern", sort=False):
        rows = tuple(
            (f"L{row.layer}H{row.head}", f"{row.matched:.3f}", f"{row.mul:.3f}", f"{row.abs:.3f}")
            for row in table.head(_SHOWN).itertuples()
        )
        findings.append(
            Finding(f"{_title(str(pattern))}: {result.record.corpus}", ("head", "matched", "mul", "abs"), rows)
        )
    return findings


def _title(pattern: str) -> str:
    if pattern not in NAMED_PATTERNS:
        return f"Pattern {pattern}"
    name = pattern.replace("_", " ").capitalize()
    return f"{name}s" if name.endswith(" head") else name

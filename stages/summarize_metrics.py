"""Store -> loss, entropy and accuracy by position (Dask)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import xarray as xr
from actpipe.schemas.analyses import SummarizeMetricsConfig

from actpipe.analysis import run_analysis
from actpipe.errors import RecipeError
from actpipe.jobs.metrics import metrics_by_position, stored_metrics
from actpipe.records import Finding
from actpipe.stage import RunContext
from actpipe.stores.reading import ActivationStore
from actpipe.stores.results import Result, ResultWriter, labels
from actpipe.telemetry import Meter


@dataclass(frozen=True)
class SummarizeMetrics:
    """Average every stored metric, by position and over all rows."""

    config: SummarizeMetricsConfig
    needs: ClassVar[tuple[str, ...]] = ("store",)
    gives: ClassVar[str] = "results"

    def check(self, context: RunContext) -> None:
        """Refuse a store without metrics."""
        if not any(name.startswith("metrics/") for name in context.planned_hooks(self.config.corpus)):
            raise RecipeError(
                f"summarize_metrics: the corpus {self.config.corpus!r} stores no metrics; "
                "add `metrics: [loss]` to its extract_activations"
            )

    def run(self, context: RunContext) -> None:
        """Compute the averages, unless they are there."""
        result = run_analysis(context, self.config, "metrics", self._compute)
        context.findings.append(_describe(result))

    def _compute(self, store: ActivationStore, writer: ResultWriter, meter: Meter) -> Result:
        metrics = stored_metrics(store)
        sums = metrics_by_position(store, metrics, block_bytes=self.config.block_bytes, done=meter.advance)
        total = sums.over_all()
        axes = ("position", "metric")
        dataset = xr.Dataset(
            {"mean": (axes, sums.mean), "std": (axes, sums.std), "count": (axes, sums.count.astype(np.int64))},
            coords={"position": np.arange(len(sums.count)), "metric": labels(metrics)},
        )
        summary = {metric: float(mean) for metric, mean in zip(metrics, total.mean[0], strict=True)}
        return writer.commit(dataset=dataset, summary=summary)


_UNITS = {"loss": "nats per token", "entropy": "nats per token", "correct": "of next tokens", "correct_logit": "logit"}


def _describe(result: Result) -> Finding:
    rows = tuple((metric, f"{value:.4f}", _UNITS.get(metric, "")) for metric, value in result.record.summary.items())
    return Finding(f"Next-token metrics: {result.record.corpus}", ("metric", "mean", "unit"), rows)

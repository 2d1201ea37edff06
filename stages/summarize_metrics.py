"""Store -> loss, entropy and accuracy by position, document, token and label (Dask)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import xarray as xr
from actpipe.schemas.analyses import SummarizeMetricsConfig

from actpipe.analysis import run_analysis
from actpipe.compute.grouping import GroupSums
from actpipe.errors import RecipeError
from actpipe.excerpts import texts_of_ids
from actpipe.jobs.groups import Groups, by_column, by_document, by_position, by_token
from actpipe.jobs.metrics import stored_metrics, sum_metrics
from actpipe.label_choice import require_labels
from actpipe.records import Finding
from actpipe.stage import RunContext
from actpipe.stores.reading import ActivationStore
from actpipe.stores.results import Result, ResultWriter, labels
from actpipe.telemetry import Meter
from actpipe.text.decoding import decode_ids

_EXCERPT_TOKENS = 60


@dataclass(frozen=True)
class SummarizeMetrics:
    """Average every stored metric, by position and over all rows, and by what else is asked for."""

    config: SummarizeMetricsConfig
    needs: ClassVar[tuple[str, ...]] = ("store",)
    gives: ClassVar[str] = "results"

    def check(self, context: RunContext) -> None:
        """Refuse a store without metrics, and groups that the corpus does not know."""
        corpus = self.config.corpus
        if not any(name.startswith("metrics/") for name in context.planned_hooks(corpus)):
            raise RecipeError(
                f"summarize_metrics: the corpus {corpus!r} stores no metrics; "
                "add `metrics: [loss]` to its extract_activations"
            )
        if self.config.columns or "document" in self.config.by:
            require_labels(context, self.config, self.config.columns, "`columns` and `by: [document]`")

    def run(self, context: RunContext) -> None:
        """Compute the averages, unless they are there."""
        result = run_analysis(context, self.config, "metrics", self._compute)
        context.findings.append(_describe(result))

    def _compute(self, store: ActivationStore, writer: ResultWriter, meter: Meter) -> Result:
        metrics = stored_metrics(store)
        groupings, coords = self._groupings(store)
        sums = sum_metrics(store, metrics, groupings, block_bytes=self.config.block_bytes, done=meter.advance)
        datasets = [xr.Dataset(coords={"metric": labels(metrics)})]
        for name, by in sums.items():
            there, names = coords.get(name) or (np.arange(len(by.count)), {})
            if name == "token":
                there = np.flatnonzero(by.count.any(-1))
                names = {"token_text": texts_of_ids(store, there)}
            datasets.append(_as_arrays(name, by, there, names))
        table = self._examples(store, metrics, sums["document"]) if "document" in sums else None
        total = next(iter(sums.values())).over_all()
        summary = {metric: float(mean) for metric, mean in zip(metrics, total.mean[0], strict=True)}
        return writer.commit(dataset=xr.merge(datasets, join="outer"), table=table, summary=summary)

    def _groupings(self, store: ActivationStore) -> tuple[dict[str, Groups], dict[str, tuple[Any, dict[str, Any]]]]:
        """Return how rows are grouped, and what the groups are called where these are not numbers."""
        groupings: dict[str, Groups] = {"position": by_position}
        coords: dict[str, tuple[Any, dict[str, Any]]] = {}
        if "document" in self.config.by:
            groupings["document"] = by_document(store)
            numbers = store.documents.column("document").to_numpy()
            coords["document"] = (numbers, {"document_id": labels(store.documents.column("id").to_pylist())})
        if "token" in self.config.by:
            groupings["token"] = by_token
        for column in self.config.columns:
            name = f"column.{column}"
            groupings[name], known = by_column(store, column)
            coords[name] = (labels(known), {})
        return groupings, coords

    def _examples(self, store: ActivationStore, metrics: list[str], by: GroupSums) -> pd.DataFrame:
        """List the documents with the highest and with the lowest mean of the first metric."""
        first = by.mean[:, 0]
        known = np.flatnonzero(~np.isnan(first))
        order = known[np.argsort(-first[known], kind="stable")]
        n_shown = self.config.examples
        ends = {"highest": order[:n_shown], "lowest": order[::-1][:n_shown]}
        chosen = np.concatenate([*ends.values()]).astype(np.int64)
        ids, numbers = (store.documents.column(name).to_pylist() for name in ("id", "document"))
        columns: dict[str, Any] = {
            "end": np.repeat(labels(list(ends)), [len(rows) for rows in ends.values()]),
            "by": metrics[0],
            "document": [numbers[index] for index in chosen],
            "id": [ids[index] for index in chosen],
            "n_tokens": by.count[chosen, 0].astype(np.int64),
        }
        for position, metric in enumerate(metrics):
            columns[metric] = by.mean[chosen, position]
            columns[f"{metric}_standard_error"] = by.standard_error[chosen, position]
        columns["excerpt"] = [_excerpt(store, number) for number in columns["document"]]
        return pd.DataFrame(columns)


def _as_arrays(name: str, by: GroupSums, there: Any, names: dict[str, Any]) -> xr.Dataset:
    """Return sums as labelled arrays; by position under plain names, by others under `GROUP.mean` and so on."""
    prefix = "" if name == "position" else f"{name}."
    rows = there if name == "token" else slice(0, len(there))
    found = {"mean": by.mean, "std": by.std, "standard_error": by.standard_error, "count": by.count.astype(np.int64)}
    n_missing = 0 if name == "token" else len(there) - len(by.count)
    padded = {
        key: np.pad(value, ((0, n_missing), (0, 0)), constant_values=0 if key == "count" else np.nan)
        for key, value in found.items()
    }
    return xr.Dataset(
        {f"{prefix}{key}": ((name, "metric"), value[rows]) for key, value in padded.items()},
        coords={name: there} | {key: (name, value) for key, value in names.items()},
    )


def _excerpt(store: ActivationStore, document: int) -> str:
    if not (store.folder.tokenizer / "tokenizer.json").is_file():
        return ""
    return decode_ids(store.folder.tokenizer, store.document(document).input_ids[:_EXCERPT_TOKENS].tolist())


_UNITS = {"loss": "nats per token", "entropy": "nats per token", "correct": "of next tokens", "correct_logit": "logit"}


def _describe(result: Result) -> Finding:
    rows = tuple((metric, f"{value:.4f}", _UNITS.get(metric, "")) for metric, value in result.record.summary.items())
    return Finding(f"Next-token metrics: {result.record.corpus}", ("metric", "mean", "unit"), rows)

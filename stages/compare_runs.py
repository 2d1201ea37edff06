"""Two stores of the same tokens -> paired differences of metrics and activations (Dask)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import xarray as xr
from actpipe.schemas.eval_analyses import CompareRunsConfig
from actpipe.schemas.recipe import ExtractActivationsConfig

from actpipe.analysis import run_analysis
from actpipe.compute.comparing import MEASURES
from actpipe.compute.grouping import GroupSums
from actpipe.compute.intervals import ClusterIntervals, cluster_intervals
from actpipe.errors import RecipeError
from actpipe.jobs.comparing import compare_stores, require_same_tokens, shared_arrays
from actpipe.label_choice import require_labels
from actpipe.records import Finding
from actpipe.stage import RunContext
from actpipe.stores.layout import RunFolder
from actpipe.stores.reading import ActivationStore, is_complete
from actpipe.stores.results import Result, ResultWriter, labels
from actpipe.telemetry import Meter


@dataclass(frozen=True)
class CompareRuns:
    """Say by how much two models, or one model in two ways, differ on the same tokens."""

    config: CompareRunsConfig
    needs: ClassVar[tuple[str, ...]] = ("store",)
    gives: ClassVar[str] = "results"

    def check(self, context: RunContext) -> None:
        """Refuse a run that is not there, clusters of documents that no one knows, and stores of different tokens."""
        theirs, ours = self._against(context), context.corpus(self.config)
        if self.config.cluster == "document":
            require_labels(context, self.config, [], "`cluster: document` by setting `cluster: sequence`")
        made_here = self.config.against_run is None and (
            context.settings_of(ExtractActivationsConfig, self.config.against_corpus) is not None
        )
        if not made_here and not is_complete(theirs):
            raise RecipeError(
                f"compare_runs: {theirs.root} holds no finished store to compare with; run its recipe first"
            )
        if is_complete(theirs) and is_complete(ours):
            require_same_tokens(ActivationStore(ours), ActivationStore(theirs))

    def run(self, context: RunContext) -> None:
        """Compare, unless that was done."""
        theirs = ActivationStore(self._against(context))
        ours = ActivationStore(context.corpus(self.config))
        require_same_tokens(ours, theirs)

        def compute(store: ActivationStore, writer: ResultWriter, meter: Meter) -> Result:
            return self._compute(store, theirs, writer, meter)

        stores = {"stores": [_fingerprint(ours), _fingerprint(theirs)]}
        result = run_analysis(context, self.config, "comparison", compute, more=stores)
        context.findings.append(_describe(result))

    def _against(self, context: RunContext) -> RunFolder:
        config = self.config
        if config.against_run is None:
            return context.folder.corpus(config.against_corpus)
        return RunFolder(context.base / Path(config.against_run).expanduser()).corpus(config.against_corpus)

    def _compute(self, ours: ActivationStore, theirs: ActivationStore, writer: ResultWriter, meter: Meter) -> Result:
        config = self.config
        shared = shared_arrays(ours, theirs, config.hooks)
        if not shared.metrics and not shared.hooks:
            raise RecipeError(
                f"compare_runs: {ours.folder.root} and {theirs.folder.root} have no metric and no chosen activation in "
                "common; store the same `metrics` or `hooks` in both, or change `hooks` of the comparison"
            )
        metrics, hooks = compare_stores(
            ours, theirs, shared, cluster=config.cluster, block_bytes=config.block_bytes, done=meter.advance
        )
        tables, datasets = [], []
        if metrics is not None:
            tables.append(_metric_rows(shared.metrics, metrics, self._intervals(metrics, len(shared.metrics))))
            datasets.append(_by_cluster(shared.metrics, metrics))
        for name, sums in hooks.items():
            tables.append(_hook_rows(name, sums, self._intervals(sums, len(MEASURES))))
        if hooks:
            datasets.append(_hooks_by_cluster(hooks))
        table = pd.concat(tables, ignore_index=True)
        keys = table["name"] + "." + table["statistic"]
        summary = dict(zip(keys.tolist(), table["estimate"].to_numpy(np.float64).tolist(), strict=True))
        against = theirs.manifest.model
        dataset = xr.merge(datasets, join="outer").rename(cluster=config.cluster)
        if config.cluster == "document":
            dataset = dataset.assign_coords(document=ours.documents.column("document").to_numpy())
        dataset = dataset.assign_attrs(against=f"{against.name} ({against.dtype})")
        return writer.commit(dataset=dataset, table=table, summary=summary)

    def _intervals(self, sums: GroupSums, n_columns: int) -> ClusterIntervals:
        config = self.config
        return cluster_intervals(
            sums.total[:, :n_columns],
            sums.count[:, :n_columns],
            confidence=config.confidence,
            n_resamples=config.n_resamples,
            seed=config.seed,
        )


def _fingerprint(store: ActivationStore) -> str:
    return hashlib.sha256(store.manifest.to_json().encode()).hexdigest()


def _rows(names: Any, sums: GroupSums, found: ClusterIntervals, more: dict[str, Any]) -> pd.DataFrame:
    n_columns = len(found.mean)
    return pd.DataFrame(
        {
            "name": names,
            **more,
            "estimate": found.mean,
            "standard_error": found.standard_error,
            "low": found.low,
            "high": found.high,
            "t_low": found.t_low,
            "t_high": found.t_high,
            "n_rows": sums.count[:, :n_columns].sum(0).astype(np.int64),
            "n_clusters": (sums.count[:, :n_columns] > 0).sum(0),
        }
    )


def _metric_rows(metrics: tuple[str, ...], sums: GroupSums, found: ClusterIntervals) -> pd.DataFrame:
    ours, theirs = np.split(sums.over_all().mean[0][len(metrics) :], 2)
    more = {"kind": "metric", "statistic": "difference", "ours": ours, "theirs": theirs}
    return _rows(list(metrics), sums, found, more)


def _hook_rows(name: str, sums: GroupSums, found: ClusterIntervals) -> pd.DataFrame:
    error, length = sums.total[:, 2].sum(), sums.total[:, 3].sum()
    whole = float(np.sqrt(error / length)) if length > 0 else np.nan
    more = {"kind": "hook", "statistic": list(MEASURES), "ours": np.nan, "theirs": np.nan}
    return _rows(name, sums, found, more | {"overall_relative_error": [whole, np.nan]})


def _by_cluster(metrics: tuple[str, ...], sums: GroupSums) -> xr.Dataset:
    n_metrics = len(metrics)
    axes = ("cluster", "metric")
    return xr.Dataset(
        {
            "difference": (axes, sums.mean[:, :n_metrics]),
            "difference_count": (axes, sums.count[:, :n_metrics].astype(np.int64)),
        },
        coords={"cluster": np.arange(len(sums.count)), "metric": labels(list(metrics))},
    )


def _hooks_by_cluster(hooks: dict[str, GroupSums]) -> xr.Dataset:
    axes = ("cluster", "hook")
    means = np.stack([sums.mean for sums in hooks.values()], axis=1)
    return xr.Dataset(
        {measure: (axes, means[:, :, index]) for index, measure in enumerate(MEASURES)},
        coords={"cluster": np.arange(len(means)), "hook": labels(list(hooks))},
    )


def _describe(result: Result) -> Finding:
    table = result.table
    shown = table[table["statistic"] != "cosine"].head(12)
    rows = tuple(
        (str(row.name), str(row.statistic).replace("_", " "), f"{row.estimate:.5g}", f"{row.low:.5g} to {row.high:.5g}")
        for row in shown.itertuples(index=False)
    )
    return Finding(f"Comparison: {result.record.name}", ("of", "what", "mean", "interval (bootstrap)"), rows)

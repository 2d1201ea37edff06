"""Store -> norms, anisotropy, dimension and similarity of its activations (Dask)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pandas as pd
import xarray as xr
from actpipe.schemas.direction_analyses import DescribeResidualConfig

from actpipe.activation_choice import Choice, choose_activations, whole_rows
from actpipe.analysis import run_analysis
from actpipe.compute.geometry import effective_rank, participation_ratio, spectrum
from actpipe.compute.grouping import GroupSums
from actpipe.jobs.blocks import require_arrays
from actpipe.jobs.geometry import compare_all, sum_norms
from actpipe.records import Finding
from actpipe.stage import RunContext
from actpipe.stores.reading import ActivationStore
from actpipe.stores.results import Result, ResultWriter, labels
from actpipe.telemetry import Meter


@dataclass(frozen=True)
class DescribeResidual:
    """Say how long rows are, how far they point the same way, in how many dimensions, and which layers are alike."""

    config: DescribeResidualConfig
    needs: ClassVar[tuple[str, ...]] = ("store",)
    gives: ClassVar[str] = "results"

    def check(self, context: RunContext) -> None:
        """Refuse activations that will not be stored."""
        self._choices(context)

    def run(self, context: RunContext) -> None:
        """Compute it, unless it is there."""
        choices = self._choices(context)

        def compute(store: ActivationStore, writer: ResultWriter, meter: Meter) -> Result:
            return self._compute(choices, store, writer, meter)

        context.findings.append(_describe(run_analysis(context, self.config, "geometry", compute)))

    def _choices(self, context: RunContext) -> tuple[Choice, ...]:
        return whole_rows(self.config, choose_activations(context, self.config, self.config.hooks))

    def _compute(self, choices: Sequence[Choice], store: ActivationStore, writer: ResultWriter, meter: Meter) -> Result:
        sizes, block_bytes = {choice.name: choice.row_size for choice in choices}, self.config.block_bytes
        names = list(sizes)
        require_arrays(store, names, "describe_residual")
        norms, units = sum_norms(store, names, block_bytes=block_bytes, done=meter.advance)
        covariances, similar = compare_all(
            store, sizes, pairs=self.config.cka, block_bytes=block_bytes, done=meter.advance
        )
        variances = [spectrum(covariances[name]) for name in names]
        total = norms.over_all()
        table = pd.DataFrame(
            {
                "hook": names,
                "d_row": [sizes[name] for name in names],
                "mean_norm": total.mean[0],
                "std_norm": total.std[0],
                "anisotropy": [units[name].anisotropy for name in names],
                "participation_ratio": [participation_ratio(values) for values in variances],
                "effective_rank": [effective_rank(values) for values in variances],
                "top_share": [float(values[0] / (values.sum() or np.nan)) for values in variances],
            }
        )
        dataset = _dataset(norms, dict(zip(names, variances, strict=True)), table, similar)
        return writer.commit(dataset=dataset, table=table, summary={"n_rows": int(total.count[0, 0])})


def _dataset(
    norms: GroupSums,
    variances: Mapping[str, np.ndarray],
    table: pd.DataFrame,
    similar: np.ndarray,
) -> xr.Dataset:
    largest = max(map(len, variances.values()))
    padded = [np.pad(values, (0, largest - len(values)), constant_values=np.nan) for values in variances.values()]
    names = labels(list(variances))
    by_hook = {name: ("hook", table[name].to_numpy()) for name in table.columns if name != "hook"}
    return xr.Dataset(
        {
            **by_hook,
            "norm": (("position", "hook"), norms.mean),
            "norm_std": (("position", "hook"), norms.std),
            "count": (("position", "hook"), norms.count.astype(np.int64)),
            "variance": (("hook", "component"), np.stack(padded)),
            "cka": (("hook", "other_hook"), similar),
        },
        coords={"hook": names, "other_hook": names, "position": np.arange(len(norms.count))},
    )


def _describe(result: Result) -> Finding:
    rows = tuple(
        (
            str(row.hook),
            f"{row.mean_norm:.2f}",
            f"{row.anisotropy:.3f}",
            f"{row.participation_ratio:.1f}",
            f"{row.effective_rank:.1f}",
        )
        for row in result.table.itertuples()
    )
    columns = ("activation", "mean norm", "mean cosine", "participation ratio", "effective rank")
    return Finding(f"Geometry: {result.record.corpus}", columns, rows)

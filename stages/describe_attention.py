"""Store -> how spread the attention of each head is, and how far it reaches (Dask)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import xarray as xr
from actpipe.schemas.head_analyses import DescribeAttentionConfig

from actpipe.analysis import require_hooks, result_name, run_analysis
from actpipe.compute.attention import STATISTICS
from actpipe.compute.grouping import GroupSums
from actpipe.errors import RecipeError
from actpipe.jobs.attention import describe_store_attention
from actpipe.records import Finding
from actpipe.stage import RunContext
from actpipe.stores.reading import ActivationStore
from actpipe.stores.results import Result, ResultWriter, labels
from actpipe.telemetry import Meter

_PATTERN = re.compile(r"blocks\.(\d+)\.attn\.hook_pattern")
_SHOWN = 3


@dataclass(frozen=True)
class DescribeAttention:
    """Say of each head how spread its attention is, how far it reaches, and how much is on the first and own token."""

    config: DescribeAttentionConfig
    needs: ClassVar[tuple[str, ...]] = ("store",)
    gives: ClassVar[str] = "results"

    def check(self, context: RunContext) -> None:
        """Refuse what is no attention pattern, and patterns that will not be stored."""
        require_hooks(context, self.config, self._names(context))

    def run(self, context: RunContext) -> None:
        """Compute it, unless it is there."""
        names = self._names(context)

        def compute(store: ActivationStore, writer: ResultWriter, meter: Meter) -> Result:
            return self._compute(names, store, writer, meter)

        context.findings.append(_describe(run_analysis(context, self.config, "attention", compute)))

    def _names(self, context: RunContext) -> tuple[str, ...]:
        names = context.spec.select(self.config.hooks)
        wrong = [name for name in names if not _PATTERN.fullmatch(name)]
        if wrong:
            raise RecipeError(
                f"{result_name(self.config)} describes attention among a model's own tokens, and {wrong[0]} is "
                "something else; name hooks such as blocks.*.attn.hook_pattern"
            )
        return tuple(names)

    def _compute(self, names: tuple[str, ...], store: ActivationStore, writer: ResultWriter, meter: Meter) -> Result:
        found = describe_store_attention(
            store, names, by_position=self.config.by_position, block_bytes=self.config.block_bytes, done=meter.advance
        )
        by_layer = {int(_PATTERN.sub(r"\1", name)): sums for name, sums in found.items()}
        table = pd.concat([_table(layer, sums.over_all()) for layer, sums in by_layer.items()], ignore_index=True)
        n_rows = int(next(iter(found.values())).over_all().count[0, 0])
        dataset = _dataset(by_layer, by_position=self.config.by_position)
        return writer.commit(dataset=dataset, table=table, summary={"n_rows": n_rows})


def _table(layer: int, sums: GroupSums) -> pd.DataFrame:
    """Return one row per head of a layer: the mean of each statistic, and its deviation over queries."""
    means, deviations = (values.reshape(-1, len(STATISTICS)) for values in (sums.mean, sums.std))
    table = pd.DataFrame({"layer": layer, "head": np.arange(len(means))})
    for number, name in enumerate(STATISTICS):
        table[name] = means[:, number]
    for number, name in enumerate(STATISTICS):
        table[f"{name}_std"] = deviations[:, number]
    return table


def _dataset(by_layer: Mapping[int, GroupSums], *, by_position: bool) -> xr.Dataset:
    """Return means and deviations `(statistic, layer, head)`, NaN where a layer has fewer heads."""
    n_heads = max(sums.total.shape[1] for sums in by_layer.values()) // len(STATISTICS)
    axes = ("statistic", "layer", "head")

    def stacked(each: Mapping[int, np.ndarray]) -> np.ndarray:
        return np.stack([_by_statistic(values, n_heads) for values in each.values()], axis=1)

    whole = {layer: sums.over_all() for layer, sums in by_layer.items()}
    mean = stacked({layer: sums.mean for layer, sums in whole.items()})
    std = stacked({layer: sums.std for layer, sums in whole.items()})
    arrays: dict[str, Any] = {"mean": (axes, mean[..., 0]), "std": (axes, std[..., 0])}
    if by_position:
        mean = stacked({layer: sums.mean for layer, sums in by_layer.items()})
        arrays["mean_by_position"] = (("position", *axes), np.moveaxis(mean, -1, 0))
        count = next(iter(by_layer.values())).count[:, 0]
        arrays["count"] = (("position",), count.astype(np.int64))
    coords = {"statistic": labels(list(STATISTICS)), "layer": np.array(list(by_layer)), "head": np.arange(n_heads)}
    return xr.Dataset(arrays, coords=coords)


def _by_statistic(values: np.ndarray, n_heads: int) -> np.ndarray:
    """Turn columns of one layer, by group, into `(statistic, head, group)`."""
    by_head = values.reshape(len(values), -1, len(STATISTICS)).transpose(2, 1, 0)
    return np.pad(by_head, ((0, 0), (0, n_heads - by_head.shape[1]), (0, 0)), constant_values=np.nan)


def _describe(result: Result) -> Finding:
    """Return the heads whose attention is least spread."""
    rows = tuple(
        (
            f"L{row.layer}H{row.head}",
            f"{row.entropy:.3f}",
            f"{row.distance:.1f}",
            f"{row.first:.3f}",
            f"{row.current:.3f}",
        )
        for row in result.table.nsmallest(_SHOWN, "entropy").itertuples()
    )
    columns = ("head", "entropy", "distance", "on the first", "on itself")
    return Finding(f"Most focused heads: {result.record.corpus}", columns, rows)

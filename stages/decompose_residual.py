"""Store -> what each component writes to the residual stream (Dask)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pandas as pd
from actpipe.schemas.attribution_analyses import DecomposeResidualConfig

from actpipe.analysis import require_hooks, require_sum, run_analysis
from actpipe.compute.residual import residual_components, residual_hook
from actpipe.errors import IdentityError, RecipeError
from actpipe.jobs.residual import components_of, measure_residual
from actpipe.records import Finding
from actpipe.stage import RunContext
from actpipe.stores.reading import ActivationStore
from actpipe.stores.results import Result, ResultWriter
from actpipe.telemetry import Meter

_ROUNDING = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
"""How far the sum may be from the residual stream, relative to its largest entry, by element type on disk."""


@dataclass(frozen=True)
class DecomposeResidual:
    """Measure each component's length and its share of the residual stream."""

    config: DecomposeResidualConfig
    needs: ClassVar[tuple[str, ...]] = ("store",)
    gives: ClassVar[str] = "results"

    def check(self, context: RunContext) -> None:
        """Refuse a layer that is not there, and a store that will lack a component."""
        require_sum(context, self.config)
        n_layers = context.spec.shape.n_layers
        if self.config.layer is not None and self.config.layer > n_layers:
            raise RecipeError(f"decompose_residual: layer {self.config.layer} is above the model's {n_layers}")
        components = residual_components(context.spec.hook_points, n_layers, self.config.layer)
        names = [component.hook for component in components]
        require_hooks(context, self.config, [*names, residual_hook(n_layers, self.config.layer)])

    def run(self, context: RunContext) -> None:
        """Compute the shares, unless they are there."""
        result = run_analysis(context, self.config, "residual", self._compute)
        context.findings.append(_describe(result))

    def _compute(self, store: ActivationStore, writer: ResultWriter, meter: Meter) -> Result:
        layer = self.config.layer
        sums = measure_residual(store, layer, block_bytes=self.config.block_bytes, done=meter.advance)
        total = residual_hook(store.shape.n_layers, layer)
        allowed = _ROUNDING[store.array(total).manifest.dtype]
        if not sums.worst <= allowed:
            raise IdentityError(
                f"the components do not add up to {total}: off by {sums.worst:.1e} of its size "
                f"(at most {allowed:.0e} is rounding)"
            )
        components = components_of(store, layer)
        table = pd.DataFrame(
            {
                "component": [component.label for component in components],
                "kind": [component.kind for component in components],
                "layer": pd.array([component.layer for component in components], dtype="Int64"),
                "mean_norm": sums.norm / sums.n_rows,
                "mean_share": sums.share / sums.n_rows,
            }
        )
        return writer.commit(table=table, summary={"worst_sum_error": sums.worst, "n_rows": sums.n_rows})


def _describe(result: Result) -> Finding:
    largest = result.table.sort_values("mean_share", ascending=False).head(5)
    rows = tuple((str(row.component), f"{row.mean_share:.1%}", f"{row.mean_norm:.2f}") for row in largest.itertuples())
    return Finding(
        f"Residual stream, largest components: {result.record.corpus}",
        ("component", "share", "mean norm"),
        rows,
        note=f"sum of components off by at most {result.record.summary['worst_sum_error']:.1e} of the stream's size",
    )

"""Weights -> copying and composition scores of every head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pandas as pd
import xarray as xr
from actpipe.schemas.head_analyses import ScoreWeightsConfig

from actpipe.analysis import require_circuits, run_on_weights
from actpipe.compute.circuits import MODES
from actpipe.models.circuits import Circuits, open_circuits, score_circuits, score_compositions
from actpipe.models.weights import Weights
from actpipe.records import Finding
from actpipe.stage import RunContext
from actpipe.stores.results import Result, ResultWriter, labels

_SHOWN = 3


@dataclass(frozen=True)
class ScoreWeights:
    """Say which heads copy, which match, and which compose, from their weights alone."""

    config: ScoreWeightsConfig
    needs: ClassVar[tuple[str, ...]] = ()
    gives: ClassVar[str] = "results"

    def check(self, context: RunContext) -> None:
        """Refuse a model whose heads have no such weights."""
        require_circuits(context, self.config)

    def run(self, context: RunContext) -> None:
        """Compute the scores, unless they are there."""

        def compute(weights: Weights, writer: ResultWriter) -> Result:
            return self._compute(open_circuits(weights, context.spec.shape, processed=self.config.processed), writer)

        context.findings.append(_describe(run_on_weights(context, self.config, "weights", compute)))

    def _compute(self, circuits: Circuits, writer: ResultWriter) -> Result:
        scores = {
            name: values.double().numpy()
            for name, values in score_circuits(circuits, n_tokens=self.config.n_tokens).items()
        }
        composition = score_compositions(circuits).numpy()
        n_layers, n_heads = composition.shape[1:3]
        dataset = xr.Dataset(
            {
                **{name: (("layer", "head"), values) for name, values in scores.items()},
                "composition": (("mode", "layer", "head", "later_layer", "later_head"), composition),
            },
            coords={
                "mode": labels(list(MODES)),
                "layer": np.arange(n_layers),
                "head": np.arange(n_heads),
                "later_layer": np.arange(n_layers),
                "later_head": np.arange(n_heads),
            },
        )
        layer, head = (axis.ravel() for axis in np.indices((n_layers, n_heads)))
        columns = {name: values.ravel() for name, values in scores.items()}
        table = pd.DataFrame({"layer": layer, "head": head, **columns})
        table = table.sort_values("ov_copying", ascending=False, kind="stable").reset_index(drop=True)
        return writer.commit(dataset=dataset, table=table, summary={"n_heads": int(n_layers * n_heads)})


def _describe(result: Result) -> Finding:
    rows = tuple(
        (f"L{row.layer}H{row.head}", f"{row.ov_copying:+.3f}", f"{row.ov_copying_rank:.3f}", f"{row.qk_matching:+.3f}")
        for row in result.table.head(_SHOWN).itertuples()
    )
    return Finding("Copying heads, from weights", ("head", "eigenvalues", "rank", "matching"), rows)

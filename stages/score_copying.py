"""Store -> how far each head raises the logits of the tokens it attends to (Dask)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pandas as pd
import xarray as xr
from actpipe.schemas.head_analyses import ScoreCopyingConfig

from actpipe.analysis import require_every_token, require_hooks, require_sum, result_name, run_analysis
from actpipe.compute.copying import MEASURES
from actpipe.errors import RecipeError
from actpipe.jobs.attribution_targets import SCALE
from actpipe.jobs.copying import copying_arrays, score_store_copying
from actpipe.records import Finding
from actpipe.stage import RunContext
from actpipe.stores.reading import ActivationStore
from actpipe.stores.results import Result, ResultWriter, labels
from actpipe.telemetry import Meter
from actpipe.unembedding import copying_weights

_SHOWN = 3


@dataclass(frozen=True)
class ScoreCopying:
    """Say which heads raise the logits of the tokens they attend to, on the text itself."""

    config: ScoreCopyingConfig
    needs: ClassVar[tuple[str, ...]] = ("store",)
    gives: ClassVar[str] = "results"

    def check(self, context: RunContext) -> None:
        """Refuse models whose heads do not write to the stream, and stores that will lack what it takes."""
        require_sum(context, self.config, native=True)
        require_every_token(context, self.config)
        shape = context.spec.shape
        if not all(block.attention and block.z and not block.gated_z for block in shape.blocks):
            raise RecipeError(
                f"{result_name(self.config)} reads what every head writes, and in this "
                f"{context.spec.anatomy.family.name} model not every layer's heads write by W_O alone; leave the stage "
                "out"
            )
        names = [name for of_layer in copying_arrays(shape).values() for name in of_layer]
        require_hooks(context, self.config, [*names, SCALE])

    def run(self, context: RunContext) -> None:
        """Compute the scores, unless they are there."""

        def compute(store: ActivationStore, writer: ResultWriter, meter: Meter) -> Result:
            return self._compute(context, store, writer, meter)

        context.findings.append(_describe(run_analysis(context, self.config, "copying", compute)))

    def _compute(self, context: RunContext, store: ActivationStore, writer: ResultWriter, meter: Meter) -> Result:
        found = score_store_copying(
            store,
            copying_weights(context.model),
            exclude_bos=self.config.exclude_bos,
            exclude_current_token=self.config.exclude_current_token,
            block_bytes=self.config.block_bytes,
            done=meter.advance,
        )
        blocks = store.shape.blocks
        scores = np.full((len(MEASURES), len(blocks), max(block.n_heads for block in blocks)), np.nan)
        for layer, sums in found.items():
            scores[:, layer, : len(sums.means)] = sums.means.T
        dataset = xr.Dataset(
            {"score": (("measure", "layer", "head"), scores)},
            coords={
                "measure": labels(list(MEASURES)),
                "layer": np.arange(scores.shape[1]),
                "head": np.arange(scores.shape[2]),
            },
        )
        table = pd.concat([_table(layer, scores[:, layer, : block.n_heads]) for layer, block in enumerate(blocks)])
        table = table.sort_values("standardized", ascending=False, kind="stable", ignore_index=True)
        return writer.commit(dataset=dataset, table=table, summary={"n_rows": store.n_rows})


def _table(layer: int, scores: np.ndarray) -> pd.DataFrame:
    heads = pd.DataFrame({"layer": layer, "head": np.arange(scores.shape[1])})
    return heads.assign(**dict(zip(MEASURES, scores, strict=True)))


def _describe(result: Result) -> Finding:
    rows = tuple(
        (f"L{row.layer}H{row.head}", f"{row.raised:+.3f}", f"{row.standardized:+.2f}")
        for row in result.table.head(_SHOWN).itertuples()
    )
    return Finding(f"Copying heads: {result.record.corpus}", ("head", "logit raised", "standard deviations"), rows)

"""Store -> what each layer's residual stream would predict (Dask)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import xarray as xr
from actpipe.schemas.lens_analyses import LogitLensConfig

from actpipe.analysis import require_decoder, require_every_token, require_hooks, run_analysis
from actpipe.compute.grouping import GroupSums
from actpipe.compute.lens import LENS_METRICS
from actpipe.errors import RecipeError
from actpipe.jobs.attribution_targets import SCALE
from actpipe.jobs.lens import (
    TRANSLATORS,
    Translators,
    fit_translators,
    lens_streams,
    look_through_lens,
    read_translators,
    rows_of_split,
    translator_bytes,
)
from actpipe.label_choice import require_labels
from actpipe.lenses import lens_of
from actpipe.records import Finding
from actpipe.stage import RunContext
from actpipe.stores.layout import sha256_of
from actpipe.stores.reading import ActivationStore
from actpipe.stores.results import Result, ResultWriter, labels
from actpipe.telemetry import Meter


@dataclass(frozen=True)
class LogitLens:
    """Put each layer's residual stream through the unembedding, and compare with what the model predicts."""

    config: LogitLensConfig
    needs: ClassVar[tuple[str, ...]] = ("store",)
    gives: ClassVar[str] = "results"

    def check(self, context: RunContext) -> None:
        """Refuse models without a final norm, stores without the last stream, and translators that do not fit."""
        require_decoder(context, self.config)
        require_every_token(context, self.config)
        if self.config.translators == "fit":
            require_labels(context, self.config, [], "`translators: fit`")
        shape = context.spec.shape
        if not shape.final_norm or context.recipe.model.convention != "native":
            raise RecipeError(
                "logit_lens puts native activations through the model's final norm; set `model.convention: native`, or "
                "leave the stage out where the model has no such norm"
            )
        last = f"blocks.{shape.n_layers - 1}.hook_resid_post"
        require_hooks(context, self.config, [last, *([SCALE] if self.config.norm == "final_scale" else [])])
        file = self._file(context)
        if file is not None:
            streams = lens_streams(context.planned_hooks(self.config.corpus), shape.n_layers)
            read_translators(file, list(streams), shape.d_model)

    def run(self, context: RunContext) -> None:
        """Compute it, unless it is there."""

        def compute(store: ActivationStore, writer: ResultWriter, meter: Meter) -> Result:
            return self._compute(context, store, writer, meter)

        file = self._file(context)
        more = {} if file is None else {"translators_sha256": sha256_of(file)}
        context.findings.append(_describe(run_analysis(context, self.config, "lens", compute, more)))

    def _file(self, context: RunContext) -> Path | None:
        wanted = self.config.translators
        return None if wanted in (None, "fit") else context.base / Path(str(wanted)).expanduser()

    def _compute(self, context: RunContext, store: ActivationStore, writer: ResultWriter, meter: Meter) -> Result:
        config, files, choose = self.config, dict[str, bytes](), None
        translators: Translators = {}
        if config.translators == "fit":

            def side(*, validation: bool) -> Any:
                return rows_of_split(store, config.validation_fraction, config.split_seed, validation=validation)

            translators = fit_translators(
                store,
                block_bytes=config.block_bytes,
                ridge=config.ridge,
                choose=side(validation=False),
                done=meter.advance,
            )
            choose = side(validation=True)
            files[TRANSLATORS] = translator_bytes(translators)
        elif (file := self._file(context)) is not None:
            streams = lens_streams(set(store.hook_names), store.shape.n_layers)
            translators = read_translators(file, list(streams), store.shape.d_model)
        lens = lens_of(context.model, final_scale=config.norm == "final_scale")
        sums, streams_seen = look_through_lens(
            store,
            lens,
            block_bytes=config.block_bytes,
            translators=translators,
            choose=choose,
            done=meter.advance,
        )
        return writer.commit(
            dataset=_dataset(sums, streams_seen),
            table=_table(sums, streams_seen),
            summary={"n_rows": int(sums.over_all().count[0, -1])},
            files=files,
        )


def _dataset(sums: GroupSums, streams: list[str]) -> xr.Dataset:
    shape = (-1, len(streams), len(LENS_METRICS))
    axes = ("position", "stream", "metric")
    return xr.Dataset(
        {
            "mean": (axes, sums.mean.reshape(shape)),
            "std": (axes, sums.std.reshape(shape)),
            "count": (axes, sums.count.reshape(shape).astype(np.int64)),
        },
        coords={"stream": labels(streams), "metric": labels(list(LENS_METRICS))},
    )


def _table(sums: GroupSums, streams: list[str]) -> pd.DataFrame:
    mean = sums.over_all().mean.reshape(len(streams), len(LENS_METRICS))
    return pd.DataFrame({"stream": streams, **{name: mean[:, n] for n, name in enumerate(LENS_METRICS)}})


def _describe(result: Result) -> Finding:
    rows = tuple(
        (str(row.stream), f"{row.loss:.3f}", f"{row.rank:,.1f}", f"{row.agreement:.1%}", f"{row.kl:.3f}")
        for row in result.table.itertuples()
    )
    fitted = result.record.settings["translators"] == "fit"
    title = "Tuned lens, held-out documents" if fitted else "Logit lens"
    note = f"translators are in {result.files.name}" if fitted else ""
    return Finding(f"{title}: {result.record.corpus}", ("stream", "loss", "rank", "agreement", "KL"), rows, note=note)

"""Store -> where neurons, heads, latents and directions are most active, with the text around (Dask)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import xarray as xr
from actpipe.schemas.direction_analyses import TopExamplesConfig

from actpipe.activation_choice import choose_activations
from actpipe.analysis import run_analysis
from actpipe.excerpts import Excerpt, read_excerpts, texts_of_ids
from actpipe.jobs.blocks import require_arrays
from actpipe.jobs.units import Measures, Units, measure_units
from actpipe.records import Finding
from actpipe.stage import RunContext
from actpipe.stores.directions import Directions, read_directions
from actpipe.stores.layout import sha256_of
from actpipe.stores.reading import ActivationStore
from actpipe.stores.results import Result, ResultWriter, labels
from actpipe.telemetry import Meter
from actpipe.unit_choice import UnitChoice, choose_units, plan_units, refuse_too_many

_SHOWN = 3


@dataclass(frozen=True)
class TopExamples:
    """List the tokens where each unit is largest, and say how often it is active."""

    config: TopExamplesConfig
    needs: ClassVar[tuple[str, ...]] = ("store",)
    gives: ClassVar[str] = "results"

    def check(self, context: RunContext) -> None:
        """Refuse activations that will not be stored, directions that do not fit, and units that there are not."""
        planned = self._planned(context)
        known = [choose_units(units, self.config.units) for units in planned if units.n_latents != 0]
        refuse_too_many(known, self.config.examples)

    def run(self, context: RunContext) -> None:
        """Compute it, unless it is there."""
        planned = self._planned(context)

        def compute(store: ActivationStore, writer: ResultWriter, meter: Meter) -> Result:
            return self._compute(planned, store, writer, meter)

        file = self._file(context)
        more = {} if file is None else {"directions_sha256": sha256_of(file)}
        context.findings.append(_describe(run_analysis(context, self.config, "examples", compute, more)))

    def _file(self, context: RunContext) -> Path | None:
        wanted = self.config.directions
        return None if wanted is None else context.base / Path(wanted).expanduser()

    def _planned(self, context: RunContext) -> list[Units]:
        file = self._file(context)
        directions: Directions | None = None if file is None else read_directions(file, "top_examples")
        return [
            plan_units(choice, directions) for choice in choose_activations(context, self.config, self.config.hooks)
        ]

    def _compute(self, planned: Sequence[Units], store: ActivationStore, writer: ResultWriter, meter: Meter) -> Result:
        config = self.config
        require_arrays(store, [name for units in planned for name in units.arrays], "top_examples")
        chosen = [choose_units(units, config.units, store, block_bytes=config.block_bytes) for units in planned]
        refuse_too_many(chosen, config.examples)
        measures = Measures(
            config.examples,
            lowest=config.lowest,
            tokens=config.tokens,
            min_count=config.min_count,
            keep_means=config.keep_means,
        )
        found = [
            measure_units(store, one.units, one.numbers, measures, block_bytes=config.block_bytes, done=meter.advance)
            for one in chosen
        ]
        datasets = [_dataset(store, one, arrays, config) for one, arrays in zip(chosen, found, strict=True)]
        dataset = xr.concat(datasets, "unit", data_vars="minimal", coords="minimal", compat="override", join="outer")
        table = _table(store, chosen, found, config)
        return writer.commit(
            dataset=dataset, table=table, summary={"n_units": int(dataset.sizes["unit"]), "n_rows": store.n_rows}
        )


def _dataset(
    store: ActivationStore, chosen: UnitChoice, found: Mapping[str, Any], config: TopExamplesConfig
) -> xr.Dataset:
    """Return what is known of each unit of one activation."""
    moments, extremes = found["moments"], found["extremes"]
    arrays: dict[str, Any] = {
        "density": ("unit", extremes["density"]),
        "mean": ("unit", moments["mean"]),
        "std": ("unit", np.sqrt(moments["variance"])),
        "min": ("unit", extremes["min"]),
        "max": ("unit", extremes["max"]),
        "top_value": (("unit", "rank"), found["highest"]["top_value"].T),
        "top_row": (("unit", "rank"), found["highest"]["top_row"].T),
    }
    coords: dict[str, Any] = {
        "hook": ("unit", labels([chosen.units.name] * len(chosen.numbers))),
        "number": ("unit", chosen.numbers),
        "label": ("unit", labels(list(chosen.labels))),
    }
    if config.tokens:
        arrays |= _by_token(store, found["tokens"])
    if config.keep_means:
        arrays["mean_by_token"] = (("unit", "token"), found["tokens"]["mean_by_token"].T)
        arrays["token_count"] = ("token", found["tokens"]["token_count"])
        coords["token"] = found["tokens"]["token"]
    return xr.Dataset(arrays, coords=coords)


def _by_token(store: ActivationStore, found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the token ids with the highest and with the lowest mean."""
    arrays: dict[str, Any] = {}
    axes = ("unit", "token_rank")
    for end in ("high", "low"):
        ids = found[f"{end}_token"].T
        arrays[f"{end}_token"] = (axes, ids)
        arrays[f"{end}_token_text"] = (axes, texts_of_ids(store, ids))
        arrays[f"{end}_token_mean"] = (axes, found[f"{end}_mean"].T)
        arrays[f"{end}_token_count"] = (axes, found[f"{end}_count"].T)
    return arrays


def _table(
    store: ActivationStore,
    chosen: Sequence[UnitChoice],
    found: Sequence[Mapping[str, Any]],
    config: TopExamplesConfig,
) -> pd.DataFrame:
    """Return one line for each example: unit by unit, the outermost value first."""
    pieces = []
    for one, arrays in zip(chosen, found, strict=True):
        for end in ("highest", "lowest") if config.lowest else ("highest",):
            values, rows = (arrays[end][name].T for name in ("top_value", "top_row"))
            unit, rank = np.indices(values.shape)
            piece = pd.DataFrame(
                {
                    "hook": one.units.name,
                    "unit": one.numbers[unit.ravel()],
                    "label": np.array(one.labels, dtype=object)[unit.ravel()],
                    "end": end,
                    "rank": rank.ravel(),
                    "value": values.ravel(),
                    "row": rows.ravel(),
                }
            )
            # a latent that is zero is not active: nothing to show
            pieces.append(piece[piece["value"] > 0] if one.only_active and end == "highest" else piece)
    table = pd.concat(pieces, ignore_index=True)
    excerpts = read_excerpts(store, table["row"].to_numpy(np.int64), before=config.before, after=config.after)
    return table.assign(**_columns([excerpts[row] for row in table["row"].tolist()]))


def _columns(excerpts: Sequence[Excerpt]) -> dict[str, Any]:
    return {
        "document": pd.array([one.document for one in excerpts], dtype="Int64"),
        "position": np.array([one.position for one in excerpts], np.int64),
        "token_id": np.array([one.token_id for one in excerpts], np.int64),
        "before": [one.before for one in excerpts],
        "token": [one.token for one in excerpts],
        "after": [one.after for one in excerpts],
    }


def _describe(result: Result) -> Finding:
    table = result.table
    first = table[(table["rank"] == 0) & (table["end"] == "highest")]
    first = first.sort_values("value", ascending=False, kind="stable").head(_SHOWN)
    rows = tuple(
        (f"{row.hook} {row.label}", f"{row.value:.3f}", _around(str(row.before), str(row.token), str(row.after)))
        for row in first.itertuples()
    )
    return Finding(f"Most active units: {result.record.corpus}", ("unit", "largest value", "where"), rows)


def _around(before: str, token: str, after: str) -> str:
    return repr(f"{before[-24:]}[{token}]{after[:12]}")

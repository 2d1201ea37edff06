"""Store -> moments and extremes of its activations, channel by channel (Dask)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import pandas as pd
from actpipe.schemas.statistic_analyses import SummarizeActivationsConfig

from actpipe.activation_choice import Choice, choose_activations, whole_rows
from actpipe.analysis import result_name, run_analysis
from actpipe.compute.accumulators import Accumulator, Arrays, Covariance, Extremes, Histogram, Moments
from actpipe.errors import RecipeError
from actpipe.extraction.reducing import Reduced
from actpipe.jobs.accumulating import TOKEN, accumulate
from actpipe.jobs.blocks import even_blocks, require_arrays
from actpipe.jobs.geometry import flat_rows
from actpipe.records import Finding
from actpipe.reduction_results import called, reduction_dataset
from actpipe.stage import RunContext
from actpipe.stores.reading import ActivationStore
from actpipe.stores.results import Result, ResultWriter
from actpipe.telemetry import Meter

_ROOM = 6
"""A row takes the room of so many copies in float32: as it is read, in float64 and less its mean."""
_COVARIANCES = 4
"""So many of a block may wait to be added up, or be summed at the same time."""


@dataclass(frozen=True)
class SummarizeActivations:
    """Say how large each channel is, how far it spreads, and between what it lies."""

    config: SummarizeActivationsConfig
    needs: ClassVar[tuple[str, ...]] = ("store",)
    gives: ClassVar[str] = "results"

    def check(self, context: RunContext) -> None:
        """Refuse activations that will not be stored, and covariances that would not fit into memory."""
        choices = self._choices(context)
        largest = max(choices, key=lambda choice: choice.row_size)
        needed = 8 * _COVARIANCES * largest.row_size**2
        if self.config.covariance and needed > self.config.max_bytes:
            raise RecipeError(
                f"{result_name(self.config)} needs {needed:,} bytes of memory for the covariance of {largest.name}, "
                f"and max_bytes is {self.config.max_bytes:,}; name other hooks, leave out `covariance`, or raise it"
            )

    def run(self, context: RunContext) -> None:
        """Compute them, unless they are there."""
        choices = self._choices(context)

        def compute(store: ActivationStore, writer: ResultWriter, meter: Meter) -> Result:
            return self._compute(choices, store, writer, meter)

        context.findings.append(_describe(run_analysis(context, self.config, "reduction", compute)))

    def _choices(self, context: RunContext) -> tuple[Choice, ...]:
        return whole_rows(self.config, choose_activations(context, self.config, self.config.hooks))

    def _accumulators(self) -> dict[str, Accumulator]:
        found: dict[str, Accumulator] = {"moments": Moments(), "extremes": Extremes()}
        if self.config.covariance:
            found["covariance"] = Covariance()
        if self.config.histogram:
            found["histogram"] = Histogram()
        return found

    def _compute(self, choices: Sequence[Choice], store: ActivationStore, writer: ResultWriter, meter: Meter) -> Result:
        require_arrays(store, [choice.name for choice in choices], "summarize_activations")
        arrays: dict[str, Arrays] = {}
        for choice in choices:
            blocks = even_blocks(store, [choice.name] * _ROOM + [TOKEN], self.config.block_bytes)
            found = accumulate(
                blocks, partial(flat_rows, name=choice.name), self._accumulators(), meter.advance, fan_in=2
            )
            one = {name: values for of in found.values() for name, values in of.items()}
            arrays[called(choice.name)] = one | {"rms": np.sqrt(one["mean"] ** 2 + one["variance"])}
        reduced = [Reduced(called(choice.name), choice.axes, choice.row_shape) for choice in choices]
        return writer.commit(
            dataset=reduction_dataset(arrays, reduced), table=_table(arrays), summary={"n_rows": store.n_rows}
        )


def _table(arrays: Mapping[str, Arrays]) -> pd.DataFrame:
    """Return one line for each activation: means over channels, and the outermost of all of them."""
    lines = [
        {
            "hook": name,
            "d_row": len(found["mean"]),
            "n_rows": int(found["count"]),
            "rms": float(np.sqrt((found["rms"] ** 2).mean())),
            "deviation": float(np.sqrt(found["variance"].mean())),
            "mean_length": float(np.linalg.norm(found["mean"])),
            "largest_rms_channel": int(found["rms"].argmax()),
            "largest_rms": float(found["rms"].max()),
            "min": float(found["min"].min()),
            "max": float(found["max"].max()),
            "density": float(found["density"].mean()),
        }
        for name, found in arrays.items()
    ]
    return pd.DataFrame(lines)


def _describe(result: Result) -> Finding:
    rows = tuple(
        (
            str(row.hook),
            f"{row.rms:.4g}",
            f"{row.deviation:.4g}",
            f"{row.largest_rms:.4g} (channel {row.largest_rms_channel})",
            f"{row.min:.4g} to {row.max:.4g}",
        )
        for row in result.table.itertuples()
    )
    columns = ("activation", "rms", "deviation", "largest channel", "range")
    return Finding(f"Activations: {result.record.corpus}", columns, rows)

"""Attributions as tables and labelled arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import xarray as xr

from actpipe.compute.grouping import GroupSums
from actpipe.jobs.attribution import AttributionSums
from actpipe.jobs.neuron_attribution import NeuronSums
from actpipe.jobs.residual_sources import Column
from actpipe.stores.results import labels
from actpipe.target_choice import Grouping

Wide = npt.NDArray[np.float64]


def table_of(columns: Sequence[Column]) -> pd.DataFrame:
    """Return one line for each column: what it is."""
    return pd.DataFrame(
        {
            "component": [column.label for column in columns],
            "kind": [column.kind for column in columns],
            "layer": pd.array([column.layer for column in columns], dtype="Int64"),
            "head": pd.array([column.head for column in columns], dtype="Int64"),
            "neuron": pd.array([column.neuron for column in columns], dtype="Int64"),
        }
    )


@dataclass(frozen=True)
class AttributionResult:
    """What was summed, and what its columns and groups are called."""

    sums: AttributionSums
    columns: Sequence[Column]
    n_ranks: int
    is_ranked: bool
    """Whether ranks are an axis of the result."""
    grouping: Grouping | None
    neurons: NeuronSums | None
    neuron_sizes: Sequence[int]
    """Neurons of each layer."""

    @property
    def table(self) -> pd.DataFrame:
        """One line for each column; with ranks, for each rank and column."""
        total = self._over_rows
        found = {"mean": total.mean, "std": total.std, "mean_modulus": self._mean_modulus(total)}
        table = table_of(self.columns)
        pieces = [table.assign(**{name: value[rank] for name, value in found.items()}) for rank in range(self.n_ranks)]
        if not self.is_ranked:
            return pieces[0]
        return pd.concat([piece.assign(rank=rank) for rank, piece in enumerate(pieces)], ignore_index=True)

    @property
    def dataset(self) -> xr.Dataset:
        """Means by position, and by group and neuron where these are asked for."""
        position = self.sums.by_position
        arrays = {
            "mean_by_position": ("position", True, self._by_rank(position.mean)),
            "count": ("position", False, self._by_rank(position.count)[..., 0].astype(np.int64)),
        }
        coords: dict[str, Any] = {
            "position": np.arange(len(position.count) // self.n_ranks),
            "component": labels([column.label for column in self.columns]),
        }
        if self.grouping is not None:
            group, sums = self.grouping.name, self._by_group(self.grouping)
            for name, value in (("mean", sums.mean), ("std", sums.std)):
                arrays[f"{name}_by_{group}"] = (group, True, self._by_rank(value))
            arrays[f"count_by_{group}"] = (group, False, self._by_rank(sums.count)[..., 0].astype(np.int64))
            coords |= {name: value if name == group else (group, value) for name, value in self.grouping.coords.items()}
        dataset = xr.Dataset(
            {
                name: ((axis, *self._rank_axis, *(["component"] if by_column else [])), self._squeezed(value))
                for name, (axis, by_column, value) in arrays.items()
            },
            coords=coords,
        )
        return dataset if self.neurons is None else dataset.assign(self._of_neurons(self.neurons))

    @property
    def n_rows(self) -> int:
        """Rows whose logit was shared out."""
        return int(self._over_rows.count[0, 0])

    @property
    def _rank_axis(self) -> list[str]:
        return ["rank"] if self.is_ranked else []

    @property
    def _over_rows(self) -> GroupSums:
        """All positions together, `(rank, column)`."""
        position = self.sums.by_position
        return GroupSums(*(self._by_rank(part).sum(0) for part in (position.count, position.total, position.squares)))

    def _mean_modulus(self, total: GroupSums) -> Wide:
        with np.errstate(invalid="ignore", divide="ignore"):
            return self.sums.modulus / total.count

    def _by_group(self, grouping: Grouping) -> GroupSums:
        """Return the sums of the groups that are named; rows without a token may be in one more, which is empty."""
        n_wanted = grouping.n_groups * self.n_ranks
        sums = self.sums.by_group.over(0, n_wanted + self.n_ranks)
        return GroupSums(*(part[:n_wanted] for part in (sums.count, sums.total, sums.squares)))

    def _by_rank(self, values: Wide) -> Wide:
        return values.reshape(-1, self.n_ranks, values.shape[-1])

    def _squeezed(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return values if self.is_ranked else values[:, 0]

    def _of_neurons(self, sums: NeuronSums) -> Mapping[str, Any]:
        """Return means of all neurons by layer, NaN beyond a layer's last."""
        count = sums.count[:, None]
        mean = sums.total / count
        deviation = np.sqrt(np.maximum(sums.squares / count - mean**2, 0.0))
        axes = (*self._rank_axis, "layer", "neuron")
        found = {"neuron_mean": mean, "neuron_std": deviation, "neuron_mean_modulus": sums.modulus / count}
        return {name: (axes, self._by_layer(values)) for name, values in found.items()}

    def _by_layer(self, values: Wide) -> Wide:
        """Return `(rank, neuron of any layer)` by layer, without ranks where these are no axis."""
        grid = np.full((self.n_ranks, len(self.neuron_sizes), max(self.neuron_sizes)), np.nan)
        stops = np.cumsum(self.neuron_sizes)
        for layer, size in enumerate(self.neuron_sizes):
            grid[:, layer, :size] = values[:, stops[layer] - size : stops[layer]]
        return grid if self.is_ranked else grid[0]

"""Statistics of rows that come a few at a time: each batch gives a state, and states merge.

A state is a dict of arrays on the device of the rows. `of` makes one of a batch, `merge` puts two together in
float64, and `finish` turns the last one into what people read. Merging is associative up to rounding; in a fixed
order it gives the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

State = dict[str, torch.Tensor]
Arrays = dict[str, np.ndarray]

MANTISSA_BITS = 4
"""Bits of the mantissa that a bin of the histogram keeps: a bin is at most 1/16 of its value wide."""
_SHIFT = 23 - MANTISSA_BITS
_HALF = 1 << (31 - _SHIFT)
"""Bins of either sign."""


@dataclass(frozen=True)
class RowTokens:
    """What is known of each row of a batch, beside its values."""

    row: torch.Tensor
    position: torch.Tensor
    token: torch.Tensor


class Accumulator(Protocol):
    """One statistic, or several that share their sums."""

    def of(self, rows: torch.Tensor, tokens: RowTokens) -> State:
        """Return the state of a batch `(row, channel)`."""

    def merge(self, one: State, other: State) -> State:
        """Return the state of both together."""

    def finish(self, state: State) -> Arrays:
        """Return the statistics by name."""


@dataclass(frozen=True)
class Moments:
    """Mean and variance of each channel.

    Source:
        Chan, Golub and LeVeque (1979): sums of squares about the mean, merged without cancellation.
    """

    def of(self, rows: torch.Tensor, tokens: RowTokens) -> State:
        """Return count, mean and squares about it, in float64."""
        del tokens
        wide = rows.double()
        mean = wide.mean(0)
        return {"count": _count(rows), "mean": mean, "squares": (wide - mean).square().sum(0)}

    def merge(self, one: State, other: State) -> State:
        """Add the squares, and what the distance of the means adds to them."""
        both, gap = one["count"] + other["count"], other["mean"] - one["mean"]
        return {
            "count": both,
            "mean": one["mean"] + gap * (other["count"] / both),
            "squares": one["squares"] + other["squares"] + gap.square() * (one["count"] * other["count"] / both),
        }

    def finish(self, state: State) -> Arrays:
        """Return `count`, `mean` and `variance` (of the rows: divided by their number)."""
        count = state["count"]
        return _numpy({"count": count.long(), "mean": state["mean"], "variance": state["squares"] / count})


@dataclass(frozen=True)
class Covariance:
    """Covariance of every two channels.

    A batch's products are taken in float32 about the batch's own mean, and added up in float64.
    """

    def of(self, rows: torch.Tensor, tokens: RowTokens) -> State:
        """Return count, mean and products about it."""
        del tokens
        mean = rows.double().mean(0)
        centred = (rows.double() - mean).float()
        return {"count": _count(rows), "mean": mean, "products": (centred.T @ centred).double()}

    def merge(self, one: State, other: State) -> State:
        """Add the products, and what the distance of the means adds to them."""
        both, gap = one["count"] + other["count"], other["mean"] - one["mean"]
        return {
            "count": both,
            "mean": one["mean"] + gap * (other["count"] / both),
            "products": one["products"]
            + other["products"]
            + torch.outer(gap, gap) * (one["count"] * other["count"] / both),
        }

    def finish(self, state: State) -> Arrays:
        """Return `mean` and `covariance` (divided by the number of rows)."""
        return _numpy({"mean": state["mean"], "covariance": state["products"] / state["count"]})


@dataclass(frozen=True)
class Extremes:
    """Smallest and largest value of each channel, and the share of rows in which it is above zero."""

    def of(self, rows: torch.Tensor, tokens: RowTokens) -> State:
        """Return them of a batch."""
        del tokens
        return {
            "count": _count(rows),
            "min": rows.amin(0).double(),
            "max": rows.amax(0).double(),
            "above": (rows > 0).sum(0).double(),
        }

    def merge(self, one: State, other: State) -> State:
        """Take the outer ones."""
        return {
            "count": one["count"] + other["count"],
            "min": torch.minimum(one["min"], other["min"]),
            "max": torch.maximum(one["max"], other["max"]),
            "above": one["above"] + other["above"],
        }

    def finish(self, state: State) -> Arrays:
        """Return `min`, `max` and `density`."""
        return _numpy({"min": state["min"], "max": state["max"], "density": state["above"] / state["count"]})


@dataclass(frozen=True)
class Histogram:
    """How often values of all channels fall into fixed bins, and quantiles.

    A bin holds the float32 values of one sign, one exponent and one of sixteen mantissas, so that two histograms
    add up exactly, and a quantile is off by at most 1/32 of its value.
    """

    levels: tuple[float, ...] = (0.001, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999)

    def of(self, rows: torch.Tensor, tokens: RowTokens) -> State:
        """Return the counts of all bins."""
        del tokens
        bins = _ordered(rows.float()) >> _SHIFT
        return {"bins": torch.bincount((bins + _HALF).flatten(), minlength=2 * _HALF)}

    def merge(self, one: State, other: State) -> State:
        """Add the counts."""
        return {"bins": one["bins"] + other["bins"]}

    def finish(self, state: State) -> Arrays:
        """Return `bin_edge`, `bin_count` of the bins from the first used one to the last, and `quantile`."""
        counts = state["bins"].cpu().numpy()
        used = np.flatnonzero(counts)
        first, stop = int(used[0]), int(used[-1]) + 1
        edges = bin_edges()[first : stop + 1]
        counts = counts[first:stop]
        wanted = np.array(self.levels) * counts.sum()
        place = np.minimum(np.searchsorted(np.cumsum(counts), wanted), len(counts) - 1)
        return {"bin_edge": edges, "bin_count": counts, "quantile": (edges[place] + edges[place + 1]) / 2}


def bin_edges() -> np.ndarray:
    """Return the edges of all bins of `Histogram`, ascending, in float64; those at both ends are the largest floats."""
    keys = (np.arange(2 * _HALF + 1, dtype=np.int64) - _HALF) << _SHIFT
    keys = np.clip(keys, -(2**31), 2**31 - 1).astype(np.int32)
    edges = np.where(keys < 0, keys ^ 0x7FFFFFFF, keys).astype(np.int32).view(np.float32)
    largest = np.finfo(np.float32).max
    finite = np.where(np.isfinite(edges), edges, np.where(keys < 0, -largest, largest))
    return finite.astype(np.float64)


@dataclass(frozen=True)
class TopRows:
    """The rows with the largest values of each channel, the earlier row first where values are equal."""

    k: int

    def of(self, rows: torch.Tensor, tokens: RowTokens) -> State:
        """Return values and rows of the largest, by sorting value and row as one number."""
        base = tokens.row.min()
        behind = 2**31 - 1 - (tokens.row - base)
        keys = (_ordered(rows.float()).long() << 32) + behind.unsqueeze(-1)
        best = keys.topk(min(self.k, len(rows)), dim=0).values
        rows_of = base + 2**31 - 1 - (best & 0xFFFFFFFF)
        return {"value": _unordered(best >> 32).double(), "row": rows_of}

    def merge(self, one: State, other: State) -> State:
        """Take the largest of both, with whatever else is known of those rows."""
        both = {name: torch.cat([one[name], other[name]]) for name in one}
        by_row = both["row"].argsort(dim=0, stable=True)
        by_value = both["value"].gather(0, by_row).argsort(dim=0, descending=True, stable=True)
        order = by_row.gather(0, by_value)[: self.k]
        return {name: values.gather(0, order) for name, values in both.items()}

    def finish(self, state: State) -> Arrays:
        """Return `top_value`, `top_row` and what else is known of those rows, `(rank, channel)`."""
        return _numpy({f"top_{name}": values for name, values in state.items()})


@dataclass(frozen=True)
class MeanBy:
    """Mean of each channel by token id, or by position; only of those that occur."""

    key: str
    """`token` or `position`."""

    def of(self, rows: torch.Tensor, tokens: RowTokens) -> State:
        """Return key, count and sum of each."""
        return _grouped(getattr(tokens, self.key), torch.ones(len(rows), device=rows.device).double(), rows.double())

    def merge(self, one: State, other: State) -> State:
        """Add what has the same key."""
        return _grouped(*(torch.cat([one[name], other[name]]) for name in ("key", "count", "sum")))

    def finish(self, state: State) -> Arrays:
        """Return the keys in order, how often each occurs, and the means."""
        means = state["sum"] / state["count"].unsqueeze(-1)
        return _numpy(
            {
                self.key: state["key"],
                f"{self.key}_count": state["count"].long(),
                f"mean_by_{self.key}": means,
            }
        )


def _grouped(keys: torch.Tensor, counts: torch.Tensor, sums: torch.Tensor) -> State:
    unique, group = torch.unique(keys, sorted=True, return_inverse=True)
    count = torch.zeros(len(unique), dtype=torch.float64, device=keys.device).index_add_(0, group, counts)
    total = torch.zeros(len(unique), sums.shape[1], dtype=torch.float64, device=keys.device).index_add_(0, group, sums)
    return {"key": unique, "count": count, "sum": total}


def _count(rows: torch.Tensor) -> torch.Tensor:
    return torch.tensor(len(rows), dtype=torch.float64, device=rows.device)


def _ordered(values: torch.Tensor) -> torch.Tensor:
    """Return int32 that are ordered as these float32 are."""
    bits = values.contiguous().view(torch.int32)
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _unordered(keys: torch.Tensor) -> torch.Tensor:
    """Return the float32 of `_ordered` numbers."""
    keys = keys.to(torch.int32)
    return torch.where(keys < 0, keys ^ 0x7FFFFFFF, keys).view(torch.float32)


def _numpy(arrays: Mapping[str, torch.Tensor]) -> Arrays:
    return {name: array.cpu().numpy() for name, array in arrays.items()}

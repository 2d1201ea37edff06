"""Units of activations: neurons, heads, latents, directions; their statistics, and the rows where they are largest."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from actpipe.compute.accumulators import Accumulator, Arrays, Extremes, MeanBy, Moments, RowTokens, State, TopRows
from actpipe.compute.geometry import row_norms
from actpipe.jobs.accumulating import TOKEN, accumulate
from actpipe.jobs.blocks import Done, RowBlock, even_blocks, map_and_sum
from actpipe.jobs.geometry import flat_rows
from actpipe.stores.directions import Directions
from actpipe.stores.reading import ActivationStore

_VALUE_BYTES = 48
"""Room of one value of one unit: as it is, in float64 twice, and sorted."""
_SHARE = 8
"""So many answers of blocks may wait to be added up."""

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Units:
    """What the units of one stored activation are."""

    name: str
    """The activation."""
    row_shape: tuple[int, ...]
    axes: tuple[str, ...]
    """Axes of a row."""
    directions: Directions | None = None
    norms: bool = False
    """Whether a unit is the norm of the last axis."""
    n_latents: int | None = None
    """Where the largest latents are stored as values and indices: how many latents there are."""

    @property
    def arrays(self) -> tuple[str, ...]:
        """The arrays of the store that they are read from."""
        return (self.name,) if self.n_latents is None else (f"{self.name}/values", f"{self.name}/indices")

    @property
    def shape(self) -> tuple[int, ...]:
        """How many there are, along each axis that is left."""
        if self.n_latents is not None:
            return (self.n_latents,)
        if self.directions is not None:
            d_in, n_directions = self.directions.W.shape
            outer = self.row_shape[:-1] if d_in == self.row_shape[-1] else ()
            return (*outer, n_directions)
        return self.row_shape[:-1] if self.norms else self.row_shape

    @property
    def unit_axes(self) -> tuple[str, ...]:
        """The axes that `shape` is along."""
        if self.directions is not None:
            return (*self.axes[: len(self.shape) - 1], "direction")
        return self.axes[:-1] if self.norms else self.axes

    def read(self, block: RowBlock, wanted: Numbers) -> npt.NDArray[np.float32]:
        """Return the values of some units, `(row, unit)`; negative zeros as zeros."""
        if self.n_latents is not None:
            return self._latents(block, wanted)
        values: npt.NDArray[np.float64]
        rows = flat_rows(block, self.name)
        if self.directions is not None:
            values = self.directions(rows.reshape(-1, len(self.directions.W))).reshape(block.n_rows, -1)[:, wanted]
        elif self.norms:
            width = self.row_shape[-1]
            values = row_norms(rows.reshape(-1, width)).reshape(block.n_rows, -1)[:, wanted]
        else:
            values = rows[:, wanted].astype(np.float64)
        found: npt.NDArray[np.float32] = (values + 0.0).astype(np.float32)
        return found

    def _latents(self, block: RowBlock, wanted: Numbers) -> npt.NDArray[np.float32]:
        values, (_, indices) = flat_rows(block, self.arrays[0]), self.arrays
        places = block.read_integers(indices)
        column = np.full((self.n_latents or 0) + 1, len(wanted))  # the last is for -1: no latent
        column[wanted] = np.arange(len(wanted))
        found = np.zeros((block.n_rows, len(wanted) + 1), np.float32)
        found[np.arange(block.n_rows)[:, None], column[places]] = values + 0.0
        return found[:, :-1]


@dataclass(frozen=True)
class _Lowest(TopRows):
    """The rows with the smallest values."""

    def of(self, rows: torch.Tensor, tokens: RowTokens) -> State:
        return super().of(0.0 - rows, tokens)

    def finish(self, state: State) -> Arrays:
        return super().finish(state | {"value": 0.0 - state["value"]})


@dataclass(frozen=True)
class Measures:
    """What to know of each unit."""

    examples: int
    """Rows with the largest values."""
    lowest: bool = False
    """Whether to take those with the smallest too."""
    tokens: int = 0
    """So many token ids with the highest mean, and with the lowest."""
    min_count: int = 1
    """How often a token id must occur to be among them."""
    keep_means: bool = False
    """Whether to keep the means of all token ids."""

    @property
    def accumulators(self) -> dict[str, Accumulator]:
        """What adds them up."""
        found: dict[str, Accumulator] = {
            "moments": Moments(),
            "extremes": Extremes(),
            "highest": TopRows(self.examples),
        }
        if self.lowest:
            found["lowest"] = _Lowest(self.examples)
        if self.tokens:
            found["tokens"] = MeanBy("token")
        return found


def measure_units(
    store: ActivationStore,
    units: Units,
    wanted: Numbers,
    measures: Measures,
    *,
    block_bytes: int,
    done: Done = lambda _: None,
) -> dict[str, Arrays]:
    """Return statistics of some units over the whole store, units along the last axis.

    The store is read once for as many units as memory allows.

    Args:
        store: The activations.
        units: What the units are.
        wanted: Their numbers.
        measures: What to know of them.
        block_bytes: Memory of a block, and of what is summed in one pass, in bytes.
        done: Called with 1 after each block.

    Returns:
        `moments`, `extremes`, `highest`, and what else is measured; see `actpipe.compute.accumulators`. Of `tokens`
        there are `high_token`, `high_mean`, `high_count` and the like of `low`, `(rank, unit)`.
    """
    per_unit = 40 * (2 * measures.examples + 4)
    if measures.tokens:
        per_unit += 24 * min(store.shape.d_vocab, store.n_rows)
    at_once = max(1, block_bytes // (_SHARE * per_unit))
    accumulators = measures.accumulators
    pieces = []
    for start in range(0, len(wanted), at_once):
        some = wanted[start : start + at_once]
        blocks = _blocks(store, units, len(some), block_bytes)
        piece = accumulate(blocks, partial(units.read, wanted=some), accumulators, done)
        if measures.tokens:
            piece["tokens"] = _ends(piece["tokens"], measures)
        pieces.append(piece)
    return {name: _side_by_side([piece[name] for piece in pieces]) for name in accumulators}


def _blocks(store: ActivationStore, units: Units, n_wanted: int, block_bytes: int) -> list[RowBlock]:
    names = [*units.arrays, TOKEN]
    read = sum(4 * int(np.prod(store.array(name).manifest.row_shape, dtype=np.int64)) for name in names)
    share = read / (3 * read + _VALUE_BYTES * n_wanted)
    return even_blocks(store, names, max(1, int(block_bytes * share)))


def _ends(found: Arrays, measures: Measures) -> Arrays:
    """Return the token ids at both ends, and what else is kept of means by token."""
    means, token, count = found["mean_by_token"], found["token"], found["token_count"]
    kept = dict(found) if measures.keep_means else {}
    ends = choose_tokens(means, count, measures.tokens, measures.min_count)
    for end, places in zip(("high", "low"), ends, strict=True):
        kept[f"{end}_token"], kept[f"{end}_count"] = token[places], count[places]
        kept[f"{end}_mean"] = np.take_along_axis(means, places, 0)
    return kept


def _side_by_side(pieces: list[Arrays]) -> Arrays:
    """Put what units of several passes have along their last axis together; the rest is the same in all."""
    same = {"count", "token", "token_count"}
    return {
        name: array if name in same else np.concatenate([piece[name] for piece in pieces], -1)
        for name, array in pieces[0].items()
    }


def count_latents(store: ActivationStore, name: str, *, block_bytes: int) -> int:
    """Return one more than the largest number of a latent among those stored."""

    @dataclass(frozen=True)
    class Largest:
        value: int

        def __add__(self, other: Largest) -> Largest:
            return Largest(max(self.value, other.value))

    indices = f"{name}/indices"
    blocks = even_blocks(store, [indices] * 3, block_bytes)
    return map_and_sum(lambda block: Largest(int(block.read_integers(indices).max(initial=-1))), blocks).value + 1


def choose_tokens(
    mean: npt.NDArray[np.float64], count: Numbers, n_tokens: int, min_count: int
) -> tuple[Numbers, Numbers]:
    """Return the places of the token ids with the highest and with the lowest mean of each unit.

    Args:
        mean: `(token, unit)`.
        count: How often each token id occurs.
        n_tokens: So many of either end.
        min_count: How often one must occur.

    Returns:
        Two arrays `(rank, unit)`, the outermost first; where means are equal, the smaller id.
    """
    there = np.flatnonzero(count >= min_count)
    ends = []
    for sign in (-1.0, 1.0):
        order = np.argsort(sign * mean[there], axis=0, kind="stable")[:n_tokens]
        ends.append(there[order])
    return ends[0], ends[1]

"""Two stores of the same tokens, side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
import numpy.typing as npt

from actpipe.compute.comparing import compare_rows
from actpipe.compute.grouping import GroupSums, sum_by_range
from actpipe.errors import StoreMismatchError
from actpipe.jobs.blocks import Done, RowBlock, map_and_sum, require_arrays
from actpipe.jobs.metrics import MetricSums, stored_metrics
from actpipe.stores.reading import ActivationStore

_TOKENS = ("tokens/input_ids", "tokens/sequence", "tokens/position")
_CHECKED_ROWS = 2**20
_COPIES = 6
"""Room that comparing takes, in arrays of the block's rows in float32: both sides, their widened forms, the gap."""


@dataclass(frozen=True)
class Shared:
    """What two stores both hold."""

    metrics: tuple[str, ...]
    hooks: tuple[str, ...]


def shared_arrays(ours: ActivationStore, theirs: ActivationStore, patterns: Iterable[str]) -> Shared:
    """Name the metrics, and the activations of the same shape that a pattern names, that two stores both hold."""
    other = set(stored_metrics(theirs))
    hooks = [
        name
        for name in ours.hook_names
        if name in theirs.hook_names
        and ours.array(name).manifest.row_shape == theirs.array(name).manifest.row_shape
        and any(fnmatchcase(name, pattern) for pattern in patterns)
    ]
    return Shared(tuple(name for name in stored_metrics(ours) if name in other), tuple(hooks))


def require_same_tokens(ours: ActivationStore, theirs: ActivationStore) -> None:
    """Refuse two stores whose rows are not the same tokens.

    Raises:
        IncompleteStoreError: One of them is not finished.
        StoreMismatchError: Names the first row that differs, or the numbers of rows.
    """
    for store in (ours, theirs):
        require_arrays(store, _TOKENS, "compare_runs")
    n_rows = min(ours.n_rows, theirs.n_rows)
    for start in range(0, n_rows, _CHECKED_ROWS):
        stop = min(n_rows, start + _CHECKED_ROWS)
        for name in _TOKENS:
            mine, other = (store.array(name).read(start, stop) for store in (ours, theirs))
            if (mine != other).any():
                row = start + int((mine != other).argmax())
                raise StoreMismatchError(_first_difference(ours, theirs, row))
    if ours.n_rows != theirs.n_rows:
        raise StoreMismatchError(
            f"cannot compare {ours.folder.root}, which has {ours.n_rows:,} rows, with {theirs.folder.root}, which has "
            f"{theirs.n_rows:,}; the first {n_rows:,} are the same tokens, so tokenize both alike"
        )


def _first_difference(ours: ActivationStore, theirs: ActivationStore, row: int) -> str:
    places = []
    for store in (ours, theirs):
        token, sequence, position = (int(store.rows(name, [row])[0]) for name in _TOKENS)
        places.append(f"{store.folder.root} has token {token} at position {position} of sequence {sequence}")
    return f"cannot compare stores of different tokens: in row {row}, {places[0]}, and {places[1]}; tokenize both alike"


def clusters_of(store: ActivationStore, cluster: str) -> Callable[[RowBlock], npt.NDArray[np.int64]]:
    """Return what numbers the cluster of each row: its document, among those with rows, or its sequence.

    Raises:
        IncompleteStoreError: The corpus keeps no track of documents.
    """
    if cluster == "sequence":
        return lambda block: block.read_integers("tokens/sequence")
    documents = store.documents
    return lambda block: documents.of_rows(np.arange(block.start, block.stop))


def compare_stores(
    ours: ActivationStore,
    theirs: ActivationStore,
    shared: Shared,
    *,
    cluster: str = "document",
    block_bytes: int,
    done: Done = lambda _: None,
) -> tuple[GroupSums | None, dict[str, GroupSums]]:
    """Sum paired differences by cluster.

    Returns:
        For metrics: one column each of differences, then of ours, then of theirs, over rows in which both have a
        value (None without metrics); and by hook the columns of `compare_rows`.
    """
    group = clusters_of(ours, cluster)
    metrics = [f"metrics/{name}" for name in shared.metrics]
    names = [*metrics, *shared.hooks]

    def compared(blocks: tuple[RowBlock, RowBlock]) -> MetricSums:
        mine, other = blocks
        groups, found = group(mine), {}
        if metrics:
            pair = (np.stack([side.read(name) for name in metrics], -1).astype(np.float64) for side in blocks)
            left, right = pair
            gap = left - right
            both = np.where(np.isnan(gap), np.nan, 0.0)
            found["metrics"] = sum_by_range(np.concatenate([gap, left + both, right + both], axis=-1), groups)
        for name in shared.hooks:
            flat = [side.read(name).reshape(mine.n_rows, -1) for side in (mine, other)]
            found[name] = sum_by_range(compare_rows(*flat), groups)
        return MetricSums(found)

    sums = map_and_sum(compared, _paired_blocks(ours, theirs, names, block_bytes), done).by
    whole = {name: part.over(0, part.start + len(part.sums.count)) for name, part in sums.items()}
    return whole.pop("metrics", None), whole


def _paired_blocks(
    ours: ActivationStore, theirs: ActivationStore, names: list[str], block_bytes: int
) -> list[tuple[RowBlock, RowBlock]]:
    """Cut both stores at the same rows, into blocks whose widest array can be compared within `block_bytes`."""
    sides = [{name: store.array(name) for name in (*names, *_TOKENS)} for store in (ours, theirs)]
    widest = max(int(np.prod(array.manifest.row_shape, dtype=np.int64)) for array in sides[0].values())
    n_metrics = sum(name.startswith("metrics/") for name in names)
    size = max(1, block_bytes // (4 * _COPIES * (widest + 6 * n_metrics)))
    cuts = [(start, min(ours.n_rows, start + size)) for start in range(0, ours.n_rows, size)]
    return [(RowBlock(*cut, sides[0]), RowBlock(*cut, sides[1])) for cut in cuts]

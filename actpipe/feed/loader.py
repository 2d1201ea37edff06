"""Batches of stored activations."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from actpipe.describing import open_run
from actpipe.errors import IncompleteStoreError, UnknownHookError
from actpipe.feed.documents import Split, class_names, join_labels
from actpipe.feed.feeding import Feed
from actpipe.feed.mixing import Mixture
from actpipe.feed.normalizing import Normalize, Statistics
from actpipe.feed.order import Shuffle
from actpipe.feed.selection import RowSet, Selection, select_rows
from actpipe.feed.settings import Delivery, FeedSettings, this_rank
from actpipe.feed.stored import Source, StoredRows
from actpipe.hooks import HookName, build_catalogue, select_hooks
from actpipe.planning import plan_parts
from actpipe.stores.arrays import StoredArray
from actpipe.stores.layout import MAIN_CORPUS
from actpipe.stores.reading import ActivationStore
from actpipe.stores.writing import committed_parts

Run = str | Path | ActivationStore
BLOCK_ROWS = 128
BUFFER_ROWS = 131_072
STATISTICS_ROWS = 65_536


class ActivationLoader(Feed):
    """Batches of stored activations: dicts of tensors by name, in which row `i` of each is the same token.

    Each batch holds the arrays and labels asked for under their names and `row`, the rows' numbers in the store;
    with several runs `source` too, the number of the run. Iterating gives one epoch: every wanted row exactly
    once, in another order each time.

    Args:
        run: A run folder or an opened store, or several, whose rows are mixed.
        hooks: Names or patterns of activations, and names of other arrays (`tokens/input_ids`, `metrics/loss`).
        batch_size: Rows of a batch; only the last one of an epoch is shorter.
        shuffle: Within a batch, rows stand as in the store. `rows`: a random permutation of all rows.
            `blocks`: runs of `block_rows` rows, in random order, fill a buffer of `buffer_rows`, all of whose
            rows are mixed; reads in long stretches, for what does not fit into memory. None: as in the store.
        seed: Chooses the order of every epoch.
        drop_last: Leave out the short batch, and those that would give some ranks one more than others.
            Otherwise nothing is left out and ranks may differ by one batch.
        drop_special: Leave out tokens that have the id of BOS, separator or padding of this corpus; or a list
            of the ids to leave out.
        split: Only documents of the `train` or of the `validation` part; all of them by default.
        validation_fraction: Share of documents that is held out, by a hash of the document's id.
        split_seed: Chooses which; both splits need the same.
        labels: Columns of documents.parquet, as numbers for each row; see `classes`.
        normalize: `mean_norm` scales so that rows have the norm sqrt(n) on average, `n` numbers each;
            `standardize` brings each number to mean 0 and standard deviation 1. See `estimate_statistics`.
        statistics: Statistics to normalize by, those of the training split for validation; by default they are
            estimated from `statistics_rows` rows drawn by the seed.
        statistics_rows: How many rows to estimate statistics from.
        weights: Share of each run in an epoch; see `Mixture`. By default all rows of all runs.
        dtype: Element type of activations; by default that of the store, or float32 where they are normalized.
        device: Where batches go; to CUDA from pinned memory, without waiting.
        rank: Which of `world_size` processes this is; by default as torch.distributed says, if it is initialized.
        world_size: How many processes share each epoch.
        block_rows: Rows of a block; by default 128, or a whole part where the store is compressed.
        buffer_rows: Rows that are mixed with one another, for `blocks`; there are two buffers of this size, or none
            where memory holds all files that are read.
        read_ahead: Batches that wait ready; 0 reads each when it is asked for.
        corpus: Which corpus of each run.
        partial: Take what is committed where parts are missing.

    Raises:
        IncompleteStoreError: There is no such run, or it is not finished.
        UnknownHookError: A run does not hold an array.
    """

    def __init__(
        self,
        run: Run | Sequence[Run],
        hooks: str | Sequence[HookName],
        batch_size: int = 4096,
        shuffle: Shuffle = "rows",
        seed: int = 0,
        *,
        drop_last: bool = False,
        drop_special: bool | Iterable[int] = False,
        split: Split | None = None,
        validation_fraction: float = 0.1,
        split_seed: int = 0,
        labels: Sequence[str] = (),
        normalize: Normalize = None,
        statistics: Statistics | None = None,
        statistics_rows: int = STATISTICS_ROWS,
        weights: Sequence[float] | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str = "cpu",
        rank: int | None = None,
        world_size: int | None = None,
        block_rows: int | None = None,
        buffer_rows: int = BUFFER_ROWS,
        read_ahead: int = 4,
        corpus: str = MAIN_CORPUS,
        partial: bool = False,
    ) -> None:
        stores = open_stores(run, corpus, partial=partial)
        rank, world_size = this_rank(rank, world_size)
        settings = FeedSettings(
            batch_size=batch_size,
            shuffle=shuffle,
            seed=seed,
            drop_last=drop_last,
            block_rows=_block_rows(stores) if block_rows is None else block_rows,
            buffer_rows=buffer_rows,
            rank=rank,
            world_size=world_size,
        )
        selection = Selection(drop_special, split, validation_fraction, split_seed)
        sources = [Source(store, select_arrays(store, hooks), _select_rows(store, selection)) for store in stores]
        mixture = Mixture([len(source.rows) for source in sources], weights, seed if shuffle else None)
        self._labels = join_labels(labels, [store.documents for store in stores] if labels else [])
        super().__init__(
            StoredRows(sources, mixture, self._labels),
            settings,
            Delivery.of(device, dtype, read_ahead=read_ahead, normalize=normalize),
            statistics=statistics,
            statistics_rows=statistics_rows,
        )

    @property
    def classes(self) -> dict[str, tuple[str, ...]]:
        """For each label that is a text, the texts that its numbers stand for."""
        return class_names(self._labels)


def open_stores(run: Run | Sequence[Run], corpus: str, *, partial: bool) -> list[ActivationStore]:
    """Open one run or several, and refuse unfinished ones unless what there is of them is wanted."""
    runs = [run] if isinstance(run, str | Path | ActivationStore) else list(run)
    if not runs:
        raise ValueError("a feed needs at least one run, got none")
    stores = [
        run if isinstance(run, ActivationStore) else ActivationStore(open_run(Path(run)).corpus(corpus)) for run in runs
    ]
    for store in stores:
        if not partial:
            store.require_complete()
    return stores


def select_arrays(store: ActivationStore, hooks: str | Sequence[HookName]) -> dict[str, StoredArray]:
    """Return the arrays of a store that names and patterns mean, by the names they have in a batch."""
    stored = set(store.hook_names)
    points = {name: point for name, point in build_catalogue(store.shape).items() if name in stored}
    arrays: dict[str, StoredArray] = {}
    for hook in [hooks] if isinstance(hooks, str) else hooks:
        exact = isinstance(hook, str) and (hook in store or not points)
        names = (str(hook),) if exact else select_hooks([hook], points, n_layers=store.shape.n_layers)
        arrays |= {name: store.array(name) for name in names}
    if not arrays:
        raise UnknownHookError("a feed needs at least one array, got no name")
    return arrays


def _select_rows(store: ActivationStore, selection: Selection) -> RowSet:
    """Return the rows of committed parts that are wanted."""
    done = committed_parts(store.folder)
    parts = [part for part in plan_parts(store.n_rows, store.manifest.rows_per_part) if part.index in done]
    if not parts:
        raise IncompleteStoreError(f"{store.folder.store} has no finished part yet; run its recipe first")
    filters = selection.filters(
        lambda: store.tokens,
        lambda: store.documents,
        lambda start, stop: store.array("tokens/input_ids").read(start, stop),
    )
    return select_rows([(part.row_start, part.row_stop) for part in parts], filters)


def _block_rows(stores: Sequence[ActivationStore]) -> int:
    """Return the rows of a block: whole parts where a part is compressed, and so read as a whole."""
    compressed = [store.manifest.rows_per_part for store in stores if store.manifest.codec != "none"]
    return max([BLOCK_ROWS, *compressed])

"""Batches of activations straight from a model: where models, token tables and the feed meet."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import get_worker_info

from actpipe.describing import open_run
from actpipe.errors import UnknownHookError
from actpipe.feed.documents import Split, class_names, join_labels
from actpipe.feed.feeding import Feed, Rows
from actpipe.feed.live import LiveArray, LiveRows, TokenRows
from actpipe.feed.loader import BUFFER_ROWS, STATISTICS_ROWS
from actpipe.feed.normalizing import Normalize, Statistics
from actpipe.feed.selection import Selection, select_rows
from actpipe.feed.settings import Delivery, FeedSettings, this_rank
from actpipe.hooks import HookName
from actpipe.models.hooked_model import HookedModel
from actpipe.records import Batch, Sequence
from actpipe.stores.documents import RowDocuments
from actpipe.stores.layout import MAIN_CORPUS
from actpipe.stores.token_table import TokenTable
from actpipe.text.batching import make_batches


class LiveActivationLoader(Feed):
    """Batches of activations that a model computes when they are due; nothing is stored.

    Gives what `ActivationLoader` gives from a store of the same token table, under the same names and row numbers.
    An epoch runs the sequences in random order; `buffer_rows` rows of them at a time are mixed with one another,
    while the model fills the next buffer in a thread of its own. Nothing else may run the model meanwhile.

    A loaded state runs the sequences of the buffer that it was taken in again, and then goes on with the same
    batches: the forward passes are the same ones, so values are equal where the hardware's arithmetic repeats.

    Args:
        model: The model; it must be that of the tokens.
        run: A run folder that holds a token table, as the stage `tokenize_text` leaves it. All of its ids are kept
            in memory, 4 bytes each.
        hooks: Names or patterns of activations; not scores and patterns, whose rows have no fixed length.
        batch_size: Rows of a batch; only the last one of an epoch is shorter.
        shuffle: None for the order of the corpus.
        seed: Chooses the order of every epoch.
        batch_tokens: Tokens of a forward pass, padding included.
        drop_last: As in `ActivationLoader`, and so are all that follow.
        drop_special: Which special tokens to leave out.
        split: Which documents.
        validation_fraction: Share of documents that is held out.
        split_seed: Chooses which.
        labels: Columns of documents.parquet.
        normalize: How to normalize.
        statistics: By what.
        statistics_rows: From how many rows to estimate that.
        dtype: Element type; by default that of the model.
        device: Where batches go.
        rank: Which process this is.
        world_size: How many there are.
        buffer_rows: Rows that are mixed with one another.
        read_ahead: Batches that wait ready.
        corpus: Which corpus of the run.

    Raises:
        IncompleteStoreError: There is no such run, or it is not tokenized.
        UnknownHookError: The model has no such hook, or not one for each token.
    """

    def __init__(
        self,
        model: HookedModel,
        run: str | Path,
        hooks: str | SequenceOf[HookName],
        batch_size: int = 4096,
        *,
        shuffle: bool = True,
        seed: int = 0,
        batch_tokens: int = 8192,
        drop_last: bool = False,
        drop_special: bool | Iterable[int] = False,
        split: Split | None = None,
        validation_fraction: float = 0.1,
        split_seed: int = 0,
        labels: SequenceOf[str] = (),
        normalize: Normalize = None,
        statistics: Statistics | None = None,
        statistics_rows: int = STATISTICS_ROWS,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str = "cpu",
        rank: int | None = None,
        world_size: int | None = None,
        buffer_rows: int = BUFFER_ROWS,
        read_ahead: int = 4,
        corpus: str = MAIN_CORPUS,
    ) -> None:
        rank, world_size = this_rank(rank, world_size)
        table = TokenTable(open_run(Path(run)).corpus(corpus))
        tokens = TokenRows(table)
        filters = Selection(drop_special, split, validation_fraction, split_seed).filters(
            lambda: table, lambda: RowDocuments(table), tokens.read_ids
        )
        self._labels = join_labels(labels, [RowDocuments(table)] if labels else [])
        super().__init__(
            LiveRows(
                tokens,
                select_rows(tokens.ranges(), filters),
                arrays_of(model, [hooks] if isinstance(hooks, str) else hooks),
                Passes(model, hooks, batch_tokens),
                labels=self._labels,
                identity={
                    "batch_tokens": batch_tokens,
                    "convention": model.convention,
                    "tokens": table.manifest.checksums,
                },
            ),
            FeedSettings(
                batch_size=batch_size,
                shuffle="blocks" if shuffle else None,
                seed=seed,
                drop_last=drop_last,
                block_rows=1,
                buffer_rows=buffer_rows,
                rank=rank,
                world_size=world_size,
            ),
            Delivery.of(device, dtype, read_ahead=read_ahead, normalize=normalize),
            statistics=statistics,
            statistics_rows=statistics_rows,
        )

    @property
    def classes(self) -> dict[str, tuple[str, ...]]:
        """For each label that is a text, the texts that its numbers stand for."""
        return class_names(self._labels)


def arrays_of(model: HookedModel, hooks: Iterable[HookName]) -> dict[str, LiveArray]:
    """Return shapes and element types of what hooks give for one token."""
    arrays = {}
    for name in model.select(hooks):
        point = model.hook_points[name]
        why = point.not_stored or ("its rows are as long as the text" if point.looks_at_keys else "")
        if why:
            raise UnknownHookError(f"{name} cannot be fed: {why}; name hooks that have one row of fixed size a token")
        dtype = torch.int32 if point.integer else torch.float32 if point.float32 else model.dtype
        arrays[name] = LiveArray(point.row_shape(model.shape, 1), dtype)
    return arrays


class Passes:
    """Runs a model over sequences, as an extraction does."""

    def __init__(self, model: HookedModel, hooks: str | SequenceOf[HookName], batch_tokens: int) -> None:
        self._model = model
        self._names = model.select([hooks] if isinstance(hooks, str) else hooks)
        self._batch_tokens = batch_tokens

    def __call__(self, sequences: list[Sequence]) -> Iterator[list[tuple[Sequence, Rows]]]:
        """Yield each batch's sequences with the activations `(position, ...)` of each."""
        if get_worker_info() is not None:
            raise ValueError("a live feed runs its model in this process and a thread of it: leave out num_workers")
        for batch in make_batches(sequences, self._batch_tokens):
            yield self._run(batch)

    def _run(self, batch: Batch) -> list[tuple[Sequence, Rows]]:
        ids = np.zeros((len(batch.sequences), batch.width), np.int64)
        mask = np.zeros_like(ids)
        for number, sequence in enumerate(batch.sequences):
            ids[number, : len(sequence.ids)], mask[number, : len(sequence.ids)] = sequence.ids, 1
        inputs = torch.from_numpy(ids)
        self._model.check_ids(inputs)
        seen = {} if self._model.shape.causal else {"attention_mask": torch.from_numpy(mask).to(self._model.device)}
        taken: Rows = {}

        def take(name: str, tensor: torch.Tensor) -> None:
            taken[name] = tensor.clone()

        with torch.inference_mode(), self._model.capture(self._names, take, stop=True) as capture:
            capture.run(inputs.to(self._model.device), **seen)
        return [
            (sequence, {name: tensor[number] for name, tensor in taken.items()})
            for number, sequence in enumerate(batch.sequences)
        ]

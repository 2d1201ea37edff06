"""Forward passes over the sequences of parts, and which rows each of them gives."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from actpipe.devices import ran_out_of_memory, release_caches, shortage_in_words
from actpipe.errors import DeviceMemoryError
from actpipe.extraction.layout import GENERATED, TOKEN_ARRAYS
from actpipe.extraction.rows import WantedRows, rows_of_part
from actpipe.models.caching import KeyValueCache
from actpipe.models.capture import Capture
from actpipe.models.hooked_model import HookedModel
from actpipe.records import Batch, Part, Sequence
from actpipe.stores.kept_rows import KeptRows
from actpipe.stores.token_table import TokenTable
from actpipe.text.batching import make_batches

Runs = tuple[tuple[int, int], ...]
Note = Callable[..., None]


@dataclass(frozen=True)
class Placement:
    """Where the rows of one pass come from and go to."""

    pieces: tuple[WantedRows, ...]
    keep: torch.Tensor | None
    """Flat indices into `(batch, position)` of the wanted rows; None where that is all of them."""

    @property
    def n_rows(self) -> int:
        """Rows that the pass gives."""
        return sum(len(piece.positions) for piece in self.pieces)

    @cached_property
    def runs(self) -> Runs:
        """Consecutive rows: the first and how many."""
        runs = list[tuple[int, int]]()
        for piece in self.pieces:
            if runs and sum(runs[-1]) == piece.first_row:
                runs[-1] = (runs[-1][0], runs[-1][1] + len(piece.positions))
            else:
                runs.append((piece.first_row, len(piece.positions)))
        return tuple(runs)

    @property
    def rows(self) -> npt.NDArray[np.int64]:
        """Number of each row."""
        return np.concatenate([np.arange(first, first + count) for first, count in self.runs])

    @property
    def targets(self) -> torch.Tensor:
        """Id of the next token of each row, -1 where there is none."""
        targets = [np.append(piece.sequence.ids[1:], -1)[piece.positions] for piece in self.pieces]
        return torch.from_numpy(np.concatenate(targets).astype(np.int64))

    def tokens(self) -> dict[str, npt.NDArray[Any]]:
        """Return what is known of each row before any pass."""
        columns: dict[str, list[Any]] = {name: [] for name in (*TOKEN_ARRAYS, *GENERATED)}
        for piece in self.pieces:
            sequence, positions = piece.sequence, piece.positions
            columns["input_ids"].append(sequence.ids[positions])
            columns["position"].append(positions)
            columns["sequence"].append(np.full(len(positions), sequence.sequence))
            columns["generated"].append(
                positions >= (len(sequence.ids) if sequence.n_prompt is None else sequence.n_prompt)
            )
        return {name: np.concatenate(pieces) for name, pieces in columns.items()}


def _place(batch: Batch, wanted: Mapping[int, WantedRows], columns: range) -> Placement:
    """Say which of the wanted rows lie in some columns of a batch."""
    pieces, keep = [], []
    for number, sequence in enumerate(batch.sequences):
        piece = wanted[sequence.sequence].within(columns)
        if len(piece.positions):
            pieces.append(piece)
            keep.append(number * len(columns) + piece.positions - columns.start)
    n_rows = sum(map(len, keep))
    everything = n_rows == len(batch.sequences) * len(columns)
    return Placement(tuple(pieces), None if everything or not keep else torch.from_numpy(np.concatenate(keep)))


class Consumer(Protocol):
    """What is told of every pass; a pass without wanted rows is context alone, and is not told.

    Passes come in batches: one that runs out of memory counts for nothing, and its rows come again.
    """

    def mark(self) -> None:
        """A batch begins: what came before it is final."""

    def undo(self) -> None:
        """What came since the mark does not count; drop it, and return once nothing holds its memory."""

    def begin(self, placement: Placement) -> None:
        """A pass that gives these rows is about to run."""

    def take(self, name: str, rows: torch.Tensor, source: torch.Tensor) -> None:
        """Take the rows of one activation, inside the pass; `source` is what the model goes on to compute with."""

    def end(self, placement: Placement) -> None:
        """The pass is over."""


class Passes:
    """Runs the model over parts.

    A batch that does not fit into memory is taken back and run again as smaller ones, of half the tokens; that
    stays the size of batches from then on. A single sequence is cut into smaller pieces, where it runs in pieces.

    Args:
        model: The model.
        tokens: The model inputs.
        kept: The tokens that are wanted, where these are not all.
        consumer: Told of every pass.
        batch_tokens: Most tokens in one pass, padding included.
        chunk_tokens: Run longer inputs in pieces of so many tokens.
        note: Told, with a sentence, a kind of event and its fields, where batches have become smaller.
    """

    def __init__(
        self,
        model: HookedModel,
        tokens: TokenTable,
        kept: KeptRows | None,
        consumer: Consumer,
        *,
        batch_tokens: int,
        chunk_tokens: int | None = None,
        note: Note = lambda *_, **__: None,
    ) -> None:
        self._model = model
        self._tokens = tokens
        self._kept = kept
        self._consumer = consumer
        self._batch_tokens = batch_tokens
        self._chunk_tokens = chunk_tokens
        self._note = note
        self._did_not_fit: str | None = None
        """What is to be said of a batch that did not fit, once a smaller one has."""
        self._capture: Capture
        self._placement = Placement((), None)
        self._prefix: KeyValueCache | None = None

    @contextmanager
    def open(self, names: Iterable[str]) -> Iterator[Callable[[Part], None]]:
        """Hook the model, run the prefix, and give a function that runs every sequence with a row in a part."""
        with self._model.capture(list(names), self._take, stop=True) as self._capture, torch.inference_mode():
            self._run_prefix()
            yield self._run_part

    def _run_part(self, part: Part) -> None:
        wanted = {rows.sequence.sequence: rows for rows in rows_of_part(self._tokens, self._kept, part)}
        sequences = [rows.sequence for rows in wanted.values()]
        follows = [sequence for sequence in sequences if self._follows_prefix(sequence)]
        self._run_all(follows, wanted, self._prefix)
        self._run_all([sequence for sequence in sequences if not self._follows_prefix(sequence)], wanted, None)

    def _run_all(
        self, sequences: list[Sequence], wanted: Mapping[int, WantedRows], prefix: KeyValueCache | None
    ) -> None:
        """Run sequences in batches, in smaller ones from where memory runs out."""
        batches = deque(make_batches(sequences, self._batch_tokens))
        while batches:
            if self._fits(batches[0], wanted, prefix):
                batches.popleft()
            else:
                self._make_smaller(batches[0], 0 if prefix is None else prefix.n_tokens)
                left = [sequence for batch in batches for sequence in batch.sequences]
                batches = deque(make_batches(left, self._batch_tokens))

    def _fits(self, batch: Batch, wanted: Mapping[int, WantedRows], prefix: KeyValueCache | None) -> bool:
        """Run a batch; where memory runs out, take back what it gave and return False."""
        self._consumer.mark()
        try:
            self._run(batch, wanted, prefix)
        except Exception as error:
            if not ran_out_of_memory(error):
                raise
            self._did_not_fit = shortage_in_words(error)
        else:
            self._tell_of_smaller()
            return True
        self._consumer.undo()  # outside of the handler: the error's frames hold the tensors of the pass
        release_caches()
        return False

    def _make_smaller(self, batch: Batch, n_prefix: int) -> None:
        """Halve what runs at once.

        Raises:
            DeviceMemoryError: It is one sequence, which is not run in pieces, or one token.
        """
        n_sequences, length = len(batch.sequences), batch.width - n_prefix
        if n_sequences > 1:
            self._batch_tokens = n_sequences * batch.width // 2
            return
        if self._chunk_tokens is not None and min(self._chunk_tokens, length) > 1:
            self._chunk_tokens = min(self._chunk_tokens, length) // 2
            return
        at_once = f"{length:,} tokens, alone in its batch," if self._chunk_tokens is None else "one token after others"
        raise DeviceMemoryError(
            f"a model input of {batch.width:,} tokens cannot be run on {self._model.device}: {at_once} and the "
            f"activations that are read there do not fit into its memory ({self._did_not_fit}); shorten "
            "`context_length`, run it in pieces with `chunk_tokens`, name fewer hooks, or spread the model with "
            "`model.device_map: auto`"
        )

    def _tell_of_smaller(self) -> None:
        if self._did_not_fit is None:
            return
        pieces = "" if self._chunk_tokens is None else f", inputs in pieces of {self._chunk_tokens:,}"
        self._note(
            f"note: {self._model.device} ran out of memory ({self._did_not_fit}); batches have at most "
            f"{self._batch_tokens:,} tokens from here on{pieces}",
            "smaller batches",
            batch_tokens=self._batch_tokens,
            chunk_tokens=self._chunk_tokens,
            device=str(self._model.device),
        )
        self._did_not_fit = None

    def _follows_prefix(self, sequence: Sequence) -> bool:
        """Whether a sequence begins with the prefix; the prefix's own rows do not follow it."""
        return self._prefix is not None and sequence.n_context >= self._prefix.n_tokens

    def _run_prefix(self) -> None:
        """Run what every sequence begins with, and keep its keys and values."""
        ids = self._tokens.manifest.prefix_ids
        if ids:
            prefix = self._model.new_kv_cache()
            inputs = {"input_ids": torch.tensor([ids], device=self._model.device)}
            self._capture.run(**prefix.extend(inputs))
            self._prefix = prefix

    def _run(self, batch: Batch, wanted: Mapping[int, WantedRows], prefix: KeyValueCache | None) -> None:
        """Run a batch, after the prefix if there is one, in one pass or in several."""
        padded = np.zeros((len(batch.sequences), batch.width), np.int64)
        for number, sequence in enumerate(batch.sequences):
            padded[number, : len(sequence.ids)] = sequence.ids
        ids = torch.from_numpy(padded)
        self._model.check_ids(ids)
        inputs = {"input_ids": ids.to(self._model.device), **self._padding_of(batch)}
        held = None if prefix is None else prefix.repeated(len(batch.sequences))
        first = 0 if prefix is None else prefix.n_tokens
        at_once = self._chunk_tokens or batch.width
        if held is None and at_once < batch.width:
            held = self._model.new_kv_cache()
        for start in range(first, batch.width, at_once):
            columns = range(start, min(start + at_once, batch.width))
            here = {name: tensor[:, start : columns.stop] for name, tensor in inputs.items()}
            self._run_pass(_place(batch, wanted, columns), here if held is None else held.extend(here))

    def _run_pass(self, placement: Placement, inputs: dict[str, Any]) -> None:
        self._placement = placement
        if placement.pieces:
            self._consumer.begin(placement)
        self._capture.run(**inputs)
        if placement.pieces:
            self._consumer.end(placement)

    def _padding_of(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Return the mask that keeps padding out of sight where tokens see what follows them."""
        if self._model.shape.causal:
            return {}
        lengths = torch.tensor([len(sequence.ids) for sequence in batch.sequences])
        mask = torch.arange(batch.width) < lengths.unsqueeze(-1)
        return {"attention_mask": mask.to(self._model.device, torch.long)}

    def _take(self, name: str, tensor: torch.Tensor) -> None:
        """Hand on the wanted rows of one activation; called inside the forward pass."""
        if not self._placement.pieces:  # context alone: its rows are wanted elsewhere
            return
        rows = tensor.reshape(-1, *tensor.shape[2:])
        if self._placement.keep is not None:
            rows = rows.index_select(0, self._placement.keep.to(rows.device))
        self._consumer.take(name, rows, tensor)

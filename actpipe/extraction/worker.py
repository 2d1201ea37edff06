"""Does parts: forward passes in this thread, writing in another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from actpipe.compute.casting import cast_rows
from actpipe.compute.next_token import next_token_metrics
from actpipe.errors import DtypeOverflowError
from actpipe.extraction.deriving import Derivation
from actpipe.extraction.layout import GENERATED, TOKEN_ARRAYS
from actpipe.extraction.rows import WantedRows, rows_of_part
from actpipe.extraction.staging import Landing, Staging
from actpipe.models.caching import KeyValueCache
from actpipe.models.capture import Capture
from actpipe.models.hooked_model import HookedModel
from actpipe.models.taps import UNEMBED_INPUT
from actpipe.records import Batch, Part, Sequence
from actpipe.schemas.manifest import ArrayManifest, StoreManifest
from actpipe.schemas.recipe import ExtractActivationsConfig
from actpipe.stores.kept_rows import KeptRows
from actpipe.stores.layout import RunFolder
from actpipe.stores.token_table import TokenTable
from actpipe.stores.writing import PartWriter, allow_open_files
from actpipe.streaming import BackgroundWorker
from actpipe.telemetry import Meter
from actpipe.text.batching import make_batches

LOGITS_AT_ONCE = 2**25
"""Most logits computed together for the metrics: 128 MiB of float32, whatever the vocabulary."""

PARTS_IN_FLIGHT = 3
"""Parts that are begun and not committed: one that takes rows, and those that wait for the disk."""

Job = Callable[[], None]
Runs = tuple[tuple[int, int], ...]


class PartSink(Protocol):
    """What takes the rows of one part; `PartWriter` is one."""

    def write(self, array: str, first_row: int, rows: npt.NDArray[Any]) -> int:
        """Take consecutive rows of one array as bytes; return how many bytes."""

    def count_clipped(self, array: str, count: int) -> None:
        """Note that values were clipped."""

    def commit(self) -> None:
        """All rows were handed over."""

    def abandon(self) -> None:
        """No more rows come."""


@dataclass(frozen=True)
class _Placement:
    """Where the rows of one pass come from and go to."""

    pieces: tuple[WantedRows, ...]
    keep: torch.Tensor | None
    """Flat indices into `(batch, position)` of the rows to store; None where that is all of them."""

    @cached_property
    def runs(self) -> Runs:
        """Consecutive rows in the store: first row and how many."""
        runs = list[tuple[int, int]]()
        for piece in self.pieces:
            if runs and sum(runs[-1]) == piece.first_row:
                runs[-1] = (runs[-1][0], runs[-1][1] + len(piece.positions))
            else:
                runs.append((piece.first_row, len(piece.positions)))
        return tuple(runs)

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


def _place(batch: Batch, wanted: Mapping[int, WantedRows], columns: range) -> _Placement:
    """Say which of the wanted rows lie in some columns of a batch."""
    pieces, keep = [], []
    for number, sequence in enumerate(batch.sequences):
        piece = wanted[sequence.sequence].within(columns)
        if len(piece.positions):
            pieces.append(piece)
            keep.append(number * len(columns) + piece.positions - columns.start)
    n_rows = sum(map(len, keep))
    everything = n_rows == len(batch.sequences) * len(columns)
    return _Placement(tuple(pieces), None if everything or not keep else torch.from_numpy(np.concatenate(keep)))


class ExtractionWorker:
    """Does one part at a time: forward passes here, writing in a thread of its own."""

    def __init__(
        self,
        config: ExtractActivationsConfig,
        model: HookedModel,
        folder: RunFolder,
        manifest: StoreManifest,
        open_part: Callable[[Part], PartSink],
        derivations: Iterable[Derivation],
    ) -> None:
        self._config = config
        self._model = model
        self._open_part = open_part
        self._tokens = TokenTable(folder)
        self._kept = None if manifest.kept_rows is None else KeptRows(folder)
        self._arrays = {array.path: array for array in manifest.arrays}
        self._derivations: dict[str, list[Derivation]] = {}
        for derivation in derivations:
            self._derivations.setdefault(derivation.hook, []).append(derivation)
        self._n_keys = manifest.context_length
        self._staging = Staging()
        self._capture: Capture
        self._writing: BackgroundWorker[Job]
        self._meter: Meter
        self._writer: PartSink
        self._unfinished: set[PartSink] = set()
        self._placement: _Placement
        self._normalized: torch.Tensor
        self._prefix: KeyValueCache | None = None

    @classmethod
    @contextmanager
    def open(
        cls,
        config: ExtractActivationsConfig,
        model: HookedModel,
        folder: RunFolder,
        manifest: StoreManifest,
        meter: Meter,
        open_part: Callable[[Part], PartSink] | None = None,
        derivations: Iterable[Derivation] = (),
    ) -> Iterator[ExtractionWorker]:
        """Hook the model and start the writing thread; at the end everything handed over is on disk.

        `open_part` gives what takes the rows of a part, where that is not the store. `derivations` are those of
        the manifest.
        """
        allow_open_files(PARTS_IN_FLIGHT * len(manifest.arrays))
        open_part = open_part or partial(PartWriter, folder, manifest, fsync=config.fsync)
        worker = cls(config, model, folder, manifest, open_part, derivations)
        stored = [path.removeprefix("activations/") for path in worker._arrays if path.startswith("activations/")]
        names = list(dict.fromkeys([*stored, *worker._derivations]))
        if config.metrics:
            names.append(UNEMBED_INPUT)
        worker._meter = meter
        with ExitStack() as stack:
            stack.callback(worker._abandon_unfinished)
            worker._writing = stack.enter_context(BackgroundWorker(lambda job: job(), config.queue_bytes))
            worker._capture = stack.enter_context(model.capture(names, worker._take, stop=True))
            stack.enter_context(torch.inference_mode())
            worker._run_prefix()
            yield worker

    def __call__(self, part: Part) -> None:
        """Run every sequence that has a row in the part, and hand the part over for its commit."""
        self._writing.wait_until(lambda: len(self._unfinished) < PARTS_IN_FLIGHT)
        wanted = {rows.sequence.sequence: rows for rows in rows_of_part(self._tokens, self._kept, part)}
        sequences = [rows.sequence for rows in wanted.values()]
        self._writer = self._open_part(part)
        self._unfinished.add(self._writer)
        follows = [sequence for sequence in sequences if self._follows_prefix(sequence)]
        for batch in make_batches(follows, self._config.batch_tokens):
            self._run(batch, wanted, self._prefix)
        others = [sequence for sequence in sequences if not self._follows_prefix(sequence)]
        for batch in make_batches(others, self._config.batch_tokens):
            self._run(batch, wanted, None)
        self._writing.put(partial(self._finish, self._writer), 0)

    def _follows_prefix(self, sequence: Sequence) -> bool:
        """Whether a sequence begins with the prefix; the prefix's own rows do not follow it."""
        return self._prefix is not None and sequence.n_context >= self._prefix.n_tokens

    def _run_prefix(self) -> None:
        """Run what every sequence begins with, and keep its keys and values."""
        ids = self._tokens.manifest.prefix_ids
        if ids:
            prefix = self._model.new_kv_cache()
            self._placement = _Placement((), None)
            inputs = {"input_ids": torch.tensor([ids], device=self._model.device)}
            self._capture.run(**prefix.extend(inputs))
            self._prefix = prefix

    def _finish(self, writer: PartSink) -> None:
        writer.commit()
        self._unfinished.remove(writer)

    def _abandon_unfinished(self) -> None:
        """Remove the files of parts that an error or an interruption cut off."""
        for writer in self._unfinished:
            writer.abandon()

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
        at_once = self._config.chunk_tokens or batch.width
        if held is None and at_once < batch.width:
            held = self._model.new_kv_cache()
        for start in range(first, batch.width, at_once):
            columns = range(start, min(start + at_once, batch.width))
            self._placement = _place(batch, wanted, columns)
            self._store_tokens()
            here = {name: tensor[:, start : columns.stop] for name, tensor in inputs.items()}
            self._capture.run(**(here if held is None else held.extend(here)))
            if self._placement.pieces:
                self._finish_pass()

    def _finish_pass(self) -> None:
        if self._config.metrics:
            self._store_metrics(self._normalized)
        n_rows = sum(count for _, count in self._placement.runs)
        self._writing.put(partial(self._meter.advance, n_rows), 0)

    def _padding_of(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Return the mask that keeps padding out of sight where tokens see what follows them."""
        if self._model.shape.causal:
            return {}
        lengths = torch.tensor([len(sequence.ids) for sequence in batch.sequences])
        mask = torch.arange(batch.width) < lengths.unsqueeze(-1)
        return {"attention_mask": mask.to(self._model.device, torch.long)}

    def _take(self, name: str, tensor: torch.Tensor) -> None:
        """Store one activation of the batch; called inside the forward pass."""
        if not self._placement.pieces:  # context alone: its rows are stored elsewhere
            return
        rows = tensor.reshape(-1, *tensor.shape[2:])
        if self._placement.keep is not None:
            rows = rows.index_select(0, self._placement.keep.to(rows.device))
        if name == UNEMBED_INPUT:
            self._normalized = rows
            return
        if self._model.hook_points[name].looks_at_keys:
            masked = -torch.inf if name.endswith("scores") else 0.0
            rows = torch.nn.functional.pad(rows, (0, self._n_keys - rows.shape[-1]), value=masked)
        if array := self._arrays.get(f"activations/{name}"):
            self._store_values(name, array, rows, tensor)
        for derivation in self._derivations.get(name, ()):
            for path, values in zip(derivation.paths, derivation(rows), strict=True):
                self._store_values(name, self._arrays[path], values, tensor)

    def _store_values(self, name: str, array: ArrayManifest, rows: torch.Tensor, tensor: torch.Tensor) -> None:
        """Store values of a hook, cast as they are kept; `tensor` is what the model goes on to compute with."""
        if array.dtype == "int32":
            self._store(array.path, rows.to(torch.int32))
            return
        clip = self._config.on_overflow == "clip"
        cast, n_lost = cast_rows(rows, getattr(torch, array.dtype), clip=clip)
        if n_lost:
            self._overflow(name, array, n_lost)
        if cast.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr():
            cast = cast.clone()
        self._store(array.path, cast)

    def _overflow(self, name: str, array: ArrayManifest, count: int) -> None:
        if self._config.on_overflow == "clip":
            self._writer.count_clipped(array.path, count)
            return
        layer = self._model.hook_points[name].layer
        where = "" if layer is None else f" (layer {layer})"
        largest = torch.finfo(getattr(torch, array.dtype)).max
        raise DtypeOverflowError(
            f"{count:,} values of {name}{where} in one batch do not fit {array.dtype}, whose largest is {largest:g}; "
            "set `dtype: bfloat16`, or `on_overflow: clip` to clip them"
        )

    def _store_metrics(self, normalized: torch.Tensor) -> None:
        targets = self._placement.targets.to(normalized.device)
        at_once = max(1, LOGITS_AT_ONCE // self._model.shape.d_vocab)
        pieces = [
            next_token_metrics(self._model.conventional(self._model.unembed(rows)), wanted, self._config.metrics)
            for rows, wanted in zip(torch.split(normalized, at_once), torch.split(targets, at_once), strict=True)
        ]
        for metric in pieces[0]:
            self._store(f"metrics/{metric}", torch.cat([piece[metric] for piece in pieces]))

    def _store_tokens(self) -> None:
        """Store ids, positions and sequence numbers of the pass' rows."""
        if not self._placement.pieces:
            return
        for name, values in self._placement.tokens().items():
            array = self._arrays.get(f"tokens/{name}")
            if array is not None:
                self._store(array.path, torch.from_numpy(values.astype(array.dtype)))

    def _store(self, path: str, rows: torch.Tensor) -> None:
        landing = self._staging.send(rows)
        self._writing.put(partial(self._write, self._writer, path, landing, self._placement.runs), landing.n_bytes)

    def _write(self, writer: PartSink, path: str, landing: Landing, runs: Runs) -> None:
        start = 0
        with landing.bytes() as data:
            rows = data.reshape(sum(count for _, count in runs), -1)
            for first_row, count in runs:
                self._meter.advance(n_bytes=writer.write(path, first_row, rows[start : start + count]))
                start += count

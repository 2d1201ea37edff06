"""Does parts: forward passes in this thread, writing in another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from actpipe.compute.casting import cast_rows
from actpipe.compute.next_token import next_token_metrics
from actpipe.errors import DtypeOverflowError
from actpipe.extraction.layout import TOKEN_ARRAYS
from actpipe.extraction.staging import Landing, Staging
from actpipe.models.capture import Capture
from actpipe.models.hooked_model import HookedModel
from actpipe.models.taps import UNEMBED_INPUT
from actpipe.records import Batch, Part
from actpipe.schemas.manifest import StoreManifest
from actpipe.schemas.recipe import ExtractActivationsConfig
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
    """Where the rows of one batch come from and go to."""

    keep: torch.Tensor | None
    """Flat indices into `(batch, position)` of the rows to store; None where that is all of them."""
    runs: Runs
    """Consecutive rows in the store: first row and how many."""
    targets: torch.Tensor
    """Id of the next token of each row, -1 where there is none."""


def _place(batch: Batch, part: Part) -> _Placement:
    keep, targets, runs = [], [], list[tuple[int, int]]()
    for number, sequence in enumerate(batch.sequences):
        first = max(sequence.first_row, part.row_start)
        stop = min(sequence.row_stop, part.row_stop)
        offset = sequence.n_context + first - sequence.first_row
        positions = np.arange(offset, offset + stop - first)
        keep.append(number * batch.width + positions)
        targets.append(np.append(sequence.ids[1:], -1)[positions])
        if runs and sum(runs[-1]) == first:
            runs[-1] = (runs[-1][0], runs[-1][1] + stop - first)
        else:
            runs.append((first, stop - first))
    indices = np.concatenate(keep)
    everything = len(indices) == len(batch.sequences) * batch.width
    return _Placement(
        keep=None if everything else torch.from_numpy(indices),
        runs=tuple(runs),
        targets=torch.from_numpy(np.concatenate(targets).astype(np.int64)),
    )


class ExtractionWorker:
    """Does one part at a time: forward passes here, writing in a thread of its own."""

    def __init__(
        self,
        config: ExtractActivationsConfig,
        model: HookedModel,
        folder: RunFolder,
        manifest: StoreManifest,
        open_part: Callable[[Part], PartSink],
    ) -> None:
        self._config = config
        self._model = model
        self._open_part = open_part
        self._tokens = TokenTable(folder)
        self._arrays = {array.path: array for array in manifest.arrays}
        self._staging = Staging()
        self._capture: Capture
        self._writing: BackgroundWorker[Job]
        self._meter: Meter
        self._writer: PartSink
        self._unfinished: set[PartSink] = set()
        self._placement: _Placement
        self._normalized: torch.Tensor

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
    ) -> Iterator[ExtractionWorker]:
        """Hook the model and start the writing thread; at the end everything handed over is on disk.

        `open_part` gives what takes the rows of a part, where that is not the store.
        """
        allow_open_files(PARTS_IN_FLIGHT * len(manifest.arrays))
        open_part = open_part or partial(PartWriter, folder, manifest, fsync=config.fsync)
        worker = cls(config, model, folder, manifest, open_part)
        names = [path.removeprefix("activations/") for path in worker._arrays if path.startswith("activations/")]
        if config.metrics:
            names.append(UNEMBED_INPUT)
        worker._meter = meter
        with ExitStack() as stack:
            stack.callback(worker._abandon_unfinished)
            worker._writing = stack.enter_context(BackgroundWorker(lambda job: job(), config.queue_bytes))
            worker._capture = stack.enter_context(model.capture(names, worker._take, stop=True))
            stack.enter_context(torch.inference_mode())
            yield worker

    def __call__(self, part: Part) -> None:
        """Run every sequence that has a row in the part, and hand the part over for its commit."""
        self._writing.wait_until(lambda: len(self._unfinished) < PARTS_IN_FLIGHT)
        sequences = list(self._tokens.read_sequences(part.row_start, part.row_stop))
        self._writer = self._open_part(part)
        self._unfinished.add(self._writer)
        for batch in make_batches(sequences, self._config.batch_tokens):
            self._run(batch, part)
        self._writing.put(partial(self._finish, self._writer), 0)

    def _finish(self, writer: PartSink) -> None:
        writer.commit()
        self._unfinished.remove(writer)

    def _abandon_unfinished(self) -> None:
        """Remove the files of parts that an error or an interruption cut off."""
        for writer in self._unfinished:
            writer.abandon()

    def _run(self, batch: Batch, part: Part) -> None:
        self._placement = _place(batch, part)
        self._store_tokens(batch, part)
        padded = np.zeros((len(batch.sequences), batch.width), np.int64)
        for number, sequence in enumerate(batch.sequences):
            padded[number, : len(sequence.ids)] = sequence.ids
        ids = torch.from_numpy(padded)
        self._model.check_ids(ids)
        self._capture.run(ids.to(self._model.device), **self._padding_of(batch))
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
        rows = tensor.reshape(-1, *tensor.shape[2:])
        if self._placement.keep is not None:
            rows = rows.index_select(0, self._placement.keep.to(rows.device))
        if name == UNEMBED_INPUT:
            self._normalized = rows
            return
        array = self._arrays[f"activations/{name}"]
        if array.axes[-1] == "key_position":
            masked = -torch.inf if name.endswith("scores") else 0.0
            rows = torch.nn.functional.pad(rows, (0, array.row_shape[-1] - rows.shape[-1]), value=masked)
        if array.dtype == "int32":
            self._store(array.path, rows.to(torch.int32))
            return
        clip = self._config.on_overflow == "clip"
        cast, n_lost = cast_rows(rows, getattr(torch, array.dtype), clip=clip)
        if n_lost:
            self._overflow(name, n_lost, array.dtype)
        if cast.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr():
            cast = cast.clone()
        self._store(array.path, cast)

    def _overflow(self, name: str, count: int, dtype: str) -> None:
        if self._config.on_overflow == "clip":
            self._writer.count_clipped(f"activations/{name}", count)
            return
        layer = self._model.hook_points[name].layer
        where = "" if layer is None else f" (layer {layer})"
        raise DtypeOverflowError(
            f"{count:,} values of {name}{where} in one batch do not fit {dtype}, whose largest is "
            f"{torch.finfo(getattr(torch, dtype)).max:g}; set `dtype: bfloat16`, or `on_overflow: clip` to clip them"
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

    def _store_tokens(self, batch: Batch, part: Part) -> None:
        """Store ids, positions and sequence numbers of the batch's rows."""
        columns: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in TOKEN_ARRAYS}
        for sequence in batch.sequences:
            first = max(sequence.first_row, part.row_start)
            offset = sequence.n_context + first - sequence.first_row
            count = min(sequence.row_stop, part.row_stop) - first
            columns["input_ids"].append(sequence.ids[offset : offset + count])
            columns["position"].append(np.arange(offset, offset + count))
            columns["sequence"].append(np.full(count, sequence.sequence))
        for name, pieces in columns.items():
            self._store(f"tokens/{name}", torch.from_numpy(np.concatenate(pieces).astype(TOKEN_ARRAYS[name])))

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

"""Does parts: forward passes in this thread, writing in another."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Protocol

import numpy.typing as npt
import torch

from actpipe.compute.casting import cast_rows
from actpipe.compute.next_token import next_token_metrics
from actpipe.errors import DtypeOverflowError
from actpipe.extraction.batch_size import batch_tokens_of
from actpipe.extraction.deriving import Derivation
from actpipe.extraction.passes import Passes, Placement, Runs
from actpipe.extraction.staging import Landing, Staging
from actpipe.models.hooked_model import HookedModel
from actpipe.models.taps import UNEMBED_INPUT
from actpipe.records import Part
from actpipe.schemas.manifest import ArrayManifest, StoreManifest
from actpipe.schemas.recipe import ExtractActivationsConfig
from actpipe.stores.kept_rows import KeptRows
from actpipe.stores.layout import RunFolder
from actpipe.stores.token_table import TokenTable
from actpipe.stores.writing import PartWriter, allow_open_files
from actpipe.streaming import BackgroundWorker
from actpipe.telemetry import Meter

LOGITS_AT_ONCE = 2**25
"""Most logits computed together for the metrics: 128 MiB of float32, whatever the vocabulary."""

PARTS_IN_FLIGHT = 3
"""Parts that are begun and not committed: one that takes rows, and those that wait for the disk."""

Job = Callable[[], None]


class PartSink(Protocol):
    """What takes the rows of one part; `PartWriter` is one."""

    def write(self, array: str, first_row: int, rows: npt.NDArray[Any]) -> int:
        """Take consecutive rows of one array as bytes; return how many bytes."""

    def count_clipped(self, array: str, count: int) -> None:
        """Note that values were clipped."""

    def mark(self) -> None:
        """What came until now is final."""

    def undo(self) -> None:
        """The rows since the mark do not count, and will come again."""

    def commit(self) -> None:
        """All rows were handed over."""

    def abandon(self) -> None:
        """No more rows come."""


class ExtractionWorker:
    """Does one part at a time: forward passes here, writing in a thread of its own."""

    def __init__(
        self,
        config: ExtractActivationsConfig,
        model: HookedModel,
        manifest: StoreManifest,
        open_part: Callable[[Part], PartSink],
        derivations: Iterable[Derivation],
    ) -> None:
        self._config = config
        self._model = model
        self._open_part = open_part
        self._arrays = {array.path: array for array in manifest.arrays}
        self._derivations: dict[str, list[Derivation]] = {}
        for derivation in derivations:
            self._derivations.setdefault(derivation.hook, []).append(derivation)
        self._n_keys = manifest.context_length
        self._staging = Staging()
        self._run_part: Callable[[Part], None]
        self._writing: BackgroundWorker[Job]
        self._meter: Meter
        self._writer: PartSink
        self._unfinished: dict[PartSink, Future[None]] = {}
        self._marked = (0, 0)
        self._runs: Runs
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
        derivations: Iterable[Derivation] = (),
    ) -> Iterator[ExtractionWorker]:
        """Hook the model and start the writing thread; at the end everything handed over is on disk.

        `open_part` gives what takes the rows of a part, where that is not the store. `derivations` are those of
        the manifest.
        """
        allow_open_files(PARTS_IN_FLIGHT * len(manifest.arrays))
        open_part = open_part or partial(PartWriter, folder, manifest, fsync=config.fsync)
        worker = cls(config, model, manifest, open_part, derivations)
        stored = [path.removeprefix("activations/") for path in worker._arrays if path.startswith("activations/")]
        names = list(dict.fromkeys([*stored, *worker._derivations]))
        if config.metrics:
            names.append(UNEMBED_INPUT)
        worker._meter = meter
        passes = Passes(
            model,
            TokenTable(folder),
            None if manifest.kept_rows is None else KeptRows(folder),
            worker,
            batch_tokens=batch_tokens_of(config, folder),
            chunk_tokens=config.chunk_tokens,
            note=meter.note,
        )
        with ExitStack() as stack:
            stack.callback(worker._abandon_unfinished)
            worker._writing = stack.enter_context(BackgroundWorker(worker._do_job, config.queue_bytes))
            worker._run_part = stack.enter_context(passes.open(names))
            yield worker

    def __call__(self, part: Part) -> Future[None]:
        """Run every sequence that has a row in the part, and hand the part over for its commit.

        Returns:
            What is done once the part is committed, or holds the error that kept it from it.
        """
        self._writing.wait_until(lambda: len(self._unfinished) < PARTS_IN_FLIGHT)
        self._writer = self._open_part(part)
        committed = self._unfinished[self._writer] = Future[None]()
        self._run_part(part)
        self._writing.put(partial(self._finish, self._writer), 0)
        return committed

    def _finish(self, writer: PartSink) -> None:
        writer.commit()
        self._unfinished.pop(writer).set_result(None)

    def _do_job(self, job: Job) -> None:
        try:
            job()
        except BaseException as error:
            self._fail(error)
            raise

    def _fail(self, error: BaseException) -> None:
        """Tell those who wait that nothing more will be committed."""
        for committed in list(self._unfinished.values()):
            if not committed.done():
                committed.set_exception(error)

    def _abandon_unfinished(self) -> None:
        """Remove the files of parts that an error or an interruption cut off."""
        for writer in self._unfinished:
            writer.abandon()
        self._fail(InterruptedError("this worker was closed before the part was committed"))

    def mark(self) -> None:
        """Note, in the order of the writes, what is final."""
        self._writing.put(partial(self._mark, self._writer), 0)

    def _mark(self, writer: PartSink) -> None:
        writer.mark()
        self._marked = self._meter.done, self._meter.n_bytes

    def undo(self) -> None:
        """Let what was handed over be written, since what follows is written over it; then count as before."""
        self._normalized = torch.empty(0)
        undone = threading.Event()
        self._writing.put(partial(self._undo, self._writer, undone), 0)
        self._writing.wait_until(undone.is_set)

    def _undo(self, writer: PartSink, undone: threading.Event) -> None:
        writer.undo()
        done, n_bytes = self._marked
        self._meter.advance(done - self._meter.done, n_bytes - self._meter.n_bytes)
        undone.set()

    def begin(self, placement: Placement) -> None:
        """Store ids, positions and sequence numbers of a pass' rows."""
        self._runs = placement.runs
        for name, values in placement.tokens().items():
            array = self._arrays.get(f"tokens/{name}")
            if array is not None:
                self._store(array.path, torch.from_numpy(values.astype(array.dtype)))

    def end(self, placement: Placement) -> None:
        """Store the metrics of a pass' rows."""
        if self._config.metrics:
            self._store_metrics(self._normalized, placement.targets)
        self._writing.put(partial(self._meter.advance, placement.n_rows), 0)

    def take(self, name: str, rows: torch.Tensor, source: torch.Tensor) -> None:
        """Store the rows of one activation."""
        if name == UNEMBED_INPUT:
            self._normalized = rows
            return
        if self._model.hook_points[name].looks_at_keys:
            masked = -torch.inf if name.endswith("scores") else 0.0
            rows = torch.nn.functional.pad(rows, (0, self._n_keys - rows.shape[-1]), value=masked)
        if array := self._arrays.get(f"activations/{name}"):
            self._store_values(name, array, rows, source)
        for derivation in self._derivations.get(name, ()):
            for path, values in zip(derivation.paths, derivation(rows), strict=True):
                self._store_values(name, self._arrays[path], values, source)

    def _store_values(self, name: str, array: ArrayManifest, rows: torch.Tensor, source: torch.Tensor) -> None:
        """Store values of a hook, cast as they are kept; `source` is what the model goes on to compute with."""
        if array.dtype == "int32":
            self._store(array.path, rows.to(torch.int32))
            return
        clip = self._config.on_overflow == "clip"
        cast, n_lost = cast_rows(rows, getattr(torch, array.dtype), clip=clip)
        if n_lost:
            self._overflow(name, array, n_lost)
        if cast.untyped_storage().data_ptr() == source.untyped_storage().data_ptr():
            cast = cast.clone()
        self._store(array.path, cast)

    def _overflow(self, name: str, array: ArrayManifest, count: int) -> None:
        if self._config.on_overflow == "clip":
            self._writing.put(partial(self._writer.count_clipped, array.path, count), 0)
            return
        layer = self._model.hook_points[name].layer
        where = "" if layer is None else f" (layer {layer})"
        largest = torch.finfo(getattr(torch, array.dtype)).max
        raise DtypeOverflowError(
            f"{count:,} values of {name}{where} in one batch do not fit {array.dtype}, whose largest is {largest:g}; "
            "set `dtype: bfloat16`, or `on_overflow: clip` to clip them"
        )

    def _store_metrics(self, normalized: torch.Tensor, targets: torch.Tensor) -> None:
        targets = targets.to(normalized.device)
        at_once = max(1, LOGITS_AT_ONCE // self._model.shape.d_vocab)
        pieces = [
            next_token_metrics(self._model.conventional(self._model.unembed(rows)), wanted, self._config.metrics)
            for rows, wanted in zip(torch.split(normalized, at_once), torch.split(targets, at_once), strict=True)
        ]
        for metric in pieces[0]:
            self._store(f"metrics/{metric}", torch.cat([piece[metric] for piece in pieces]))

    def _store(self, path: str, rows: torch.Tensor) -> None:
        landing = self._staging.send(rows)
        self._writing.put(partial(self._write, self._writer, path, landing, self._runs), landing.n_bytes)

    def _write(self, writer: PartSink, path: str, landing: Landing, runs: Runs) -> None:
        start = 0
        with landing.bytes() as data:
            rows = data.reshape(sum(count for _, count in runs), -1)
            for first_row, count in runs:
                self._meter.advance(n_bytes=writer.write(path, first_row, rows[start : start + count]))
                start += count

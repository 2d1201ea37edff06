"""Token table -> activation store, part by part."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from actpipe.compute.casting import cast_rows
from actpipe.compute.next_token import next_token_metrics
from actpipe.errors import DtypeOverflowError, IdentityError, RecipeError
from actpipe.models.capture import Capture
from actpipe.models.hooked_model import HookedModel, ModelSpec
from actpipe.models.identities import check_identities, probe_ids, unproven
from actpipe.models.taps import UNEMBED_INPUT
from actpipe.planning import format_bytes, plan_parts, rows_per_part_for
from actpipe.records import Batch, Finding, Part
from actpipe.schemas.manifest import ArrayManifest, ShapeRecord, StoreManifest
from actpipe.schemas.recipe import ExtractActivationsConfig
from actpipe.stage import RunContext
from actpipe.stores.layout import RunFolder
from actpipe.stores.reading import ActivationStore
from actpipe.stores.token_table import TokenTable
from actpipe.stores.writing import PartWriter, create_store, missing_parts
from actpipe.streaming import BackgroundWorker
from actpipe.telemetry import Meter
from actpipe.text.batching import make_batches

_LOGITS_AT_ONCE = 2**25
"""Most logits computed together for the metrics: 128 MiB of float32, whatever the vocabulary."""
_PROBE_TOKENS = 16

Job = Callable[[], None]


@dataclass(frozen=True)
class ExtractActivations:
    """Run the model over the token table and store the named activations."""

    config: ExtractActivationsConfig
    needs: ClassVar[tuple[str, ...]] = ("token_table",)
    gives: ClassVar[str] = "store"

    def check(self, context: RunContext) -> None:
        """Refuse names that the model does not have, and parts that cut packed sequences."""
        names = context.spec.select(self.config.hooks)
        for name in names:
            if context.spec.hook_points[name].on_request:
                raise RecipeError(
                    f"{name} is never stored, it is {context.spec.shape.n_heads} times the residual stream: "
                    f"store {name.replace('hook_result', 'hook_z')}, and z W_O gives it"
                )

    def run(self, context: RunContext) -> None:
        """Do every part that has no commit record; doing one twice changes nothing."""
        folder = context.corpus(self.config)
        tokens = TokenTable(folder)
        manifest = _plan_store(self.config, tokens, context.spec)
        create_store(folder, manifest)
        parts = plan_parts(manifest.n_rows, manifest.rows_per_part)
        missing = missing_parts(folder, parts)
        rate = self._extract(context, folder, manifest, missing) if missing else None
        context.findings.append(_describe(ActivationStore(folder), rate))

    def _extract(
        self, context: RunContext, folder: RunFolder, manifest: StoreManifest, missing: list[Part]
    ) -> float:
        tokens = TokenTable(folder)
        _prove(context.model, tokens, context.spec.select(self.config.hooks))
        n_rows = sum(part.n_rows for part in missing)
        if n_rows < manifest.n_rows:
            context.telemetry.say(
                f"continuing: {manifest.n_rows - n_rows:,} of {manifest.n_rows:,} tokens are committed already"
            )
        with (
            context.telemetry.progress(f"extract {self.config.corpus}", n_rows, "tokens") as meter,
            ExtractionWorker.open(self.config, context.model, folder, manifest, meter) as worker,
        ):
            context.engine.run_parts(missing, worker)
        return meter.rate


def _plan_store(config: ExtractActivationsConfig, tokens: TokenTable, spec: ModelSpec) -> StoreManifest:
    """Settle shapes, types and parts of everything that will be stored."""
    context_length = tokens.manifest.context_length
    packed = tokens.manifest.layout != "documents"
    rows_per_part = config.rows_per_part
    if rows_per_part == "auto":
        rows_per_part = rows_per_part_for(tokens.manifest.n_rows, multiple_of=context_length if packed else 1)
    elif tokens.manifest.layout == "packed" and rows_per_part % context_length:
        raise RecipeError(
            f"rows_per_part ({rows_per_part}) is not a multiple of context_length ({context_length}): "
            "packed sequences would be run twice"
        )
    dtype = spec.identity.dtype if config.dtype == "model" else config.dtype
    arrays = [ArrayManifest(path=f"tokens/{n}", dtype=t, row_shape=(), axes=("row",)) for n, t in _TOKEN_ARRAYS.items()]
    for name in spec.select(config.hooks):
        point = spec.hook_points[name]
        arrays.append(
            ArrayManifest(
                path=f"activations/{name}",
                dtype=dtype,
                row_shape=point.row_shape(spec.shape, context_length),
                axes=("row", *point.axes),
            )
        )
    arrays += [
        ArrayManifest(path=f"metrics/{metric}", dtype="float32", row_shape=(), axes=("row",))
        for metric in dict.fromkeys(config.metrics)
    ]
    return StoreManifest(
        corpus=config.corpus,
        n_rows=tokens.manifest.n_rows,
        rows_per_part=rows_per_part,
        context_length=context_length,
        model=spec.identity,
        shape=ShapeRecord(**asdict(spec.shape)),
        arrays=tuple(arrays),
    )


_TOKEN_ARRAYS = {"input_ids": "int32", "position": "int32", "sequence": "int64"}


def _prove(model: HookedModel, tokens: TokenTable, names: tuple[str, ...]) -> None:
    """Refuse to store a name that contradicts the model's own arithmetic on this corpus' first tokens.

    Raises:
        IdentityError: Names the hook, the identity and the size of the error.
    """
    first = [sequence.ids[:_PROBE_TOKENS] for sequence, _ in zip(tokens.read_sequences(), range(2), strict=False)]
    length = min(map(len, first))
    real = torch.from_numpy(np.stack([ids[:length] for ids in first])) if len(first) == 2 else None
    ids = probe_ids(model, _PROBE_TOKENS) if real is None or length < 4 else real
    wrong = unproven(model, check_identities(model, ids), names)
    for name, outcome in wrong.items():
        raise IdentityError(
            f"{name} of this {model.anatomy.family.name} model is not stored: '{outcome.statement}' is off by "
            f"{outcome.error:.1e} of its size in {outcome.where} (at most {outcome.tolerance:.0e} is rounding); "
            "`actpipe check MODEL` lists every identity"
        )


@dataclass(frozen=True)
class _Placement:
    """Where the rows of one batch come from and go to."""

    keep: torch.Tensor | None
    """Flat indices into `(batch, position)` of the rows to store; None where that is all of them."""
    runs: tuple[tuple[int, int], ...]
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
        self, config: ExtractActivationsConfig, model: HookedModel, folder: RunFolder, manifest: StoreManifest
    ) -> None:
        self._config = config
        self._model = model
        self._folder = folder
        self._manifest = manifest
        self._tokens = TokenTable(folder)
        self._arrays = {array.path: array for array in manifest.arrays}
        self._capture: Capture
        self._writing: BackgroundWorker[Job]
        self._meter: Meter
        self._writer: PartWriter
        self._unfinished: set[PartWriter] = set()
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
    ) -> Iterator[ExtractionWorker]:
        """Hook the model and start the writing thread; at the end everything handed over is on disk."""
        worker = cls(config, model, folder, manifest)
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
        sequences = list(self._tokens.read_sequences(part.row_start, part.row_stop))
        self._writer = PartWriter(self._folder, self._manifest, part, fsync=self._config.fsync)
        self._unfinished.add(self._writer)
        for batch in make_batches(sequences, self._config.batch_tokens):
            self._run(batch, part)
        self._writing.put(partial(self._finish, self._writer), 0)

    def _finish(self, writer: PartWriter) -> None:
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
        self._capture.run(ids.to(self._model.device))
        if self._config.metrics:
            self._store_metrics(self._normalized)
        n_rows = sum(count for _, count in self._placement.runs)
        self._writing.put(partial(self._meter.advance, n_rows), 0)

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
        at_once = max(1, _LOGITS_AT_ONCE // self._model.shape.d_vocab)
        pieces = [
            next_token_metrics(self._model.unembed(rows), wanted, self._config.metrics)
            for rows, wanted in zip(normalized.split(at_once), targets.split(at_once), strict=True)
        ]
        for metric in pieces[0]:
            self._store(f"metrics/{metric}", torch.cat([piece[metric] for piece in pieces]))

    def _store_tokens(self, batch: Batch, part: Part) -> None:
        """Store ids, positions and sequence numbers of the batch's rows."""
        columns: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in _TOKEN_ARRAYS}
        for sequence in batch.sequences:
            first = max(sequence.first_row, part.row_start)
            offset = sequence.n_context + first - sequence.first_row
            count = min(sequence.row_stop, part.row_stop) - first
            columns["input_ids"].append(sequence.ids[offset : offset + count])
            columns["position"].append(np.arange(offset, offset + count))
            columns["sequence"].append(np.full(count, sequence.sequence))
        for name, pieces in columns.items():
            self._store(f"tokens/{name}", torch.from_numpy(np.concatenate(pieces).astype(_TOKEN_ARRAYS[name])))

    def _store(self, path: str, rows: torch.Tensor) -> None:
        data = rows.reshape(len(rows), -1).contiguous().cpu().view(torch.uint8).numpy()
        self._writing.put(partial(self._write, self._writer, path, data, self._placement.runs), data.nbytes)

    def _write(self, writer: PartWriter, path: str, data: npt.NDArray[np.uint8], runs: tuple[tuple[int, int], ...]) -> None:
        start = 0
        for first_row, count in runs:
            self._meter.advance(n_bytes=writer.write(path, first_row, data[start : start + count]))
            start += count


def _describe(store: ActivationStore, rate: float | None) -> Finding:
    n_bytes = sum(array.row_bytes for array in map(store.array, store.array_names)) * store.n_rows
    rows = [
        ("tokens", f"{store.n_rows:,}", f"{store.n_parts} parts"),
        ("arrays", f"{len(store.array_names)}", f"{len(store.hook_names)} hooks"),
        ("written", format_bytes(n_bytes), "activations, metrics and tokens"),
    ]
    if rate is not None:
        rows.append(("speed", f"{rate:,.0f}", "tokens/s, tokens read and activations written"))
    return Finding(f"Store: {store.manifest.corpus}", ("", "value", ""), tuple(rows))

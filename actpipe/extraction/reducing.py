"""Statistics of activations while the model runs: nothing of them is stored but sums."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import google_crc32c
import numpy as np
import torch
from safetensors.torch import load, save

from actpipe.compute.accumulators import (
    Accumulator,
    Arrays,
    Covariance,
    Extremes,
    Histogram,
    MeanBy,
    Moments,
    RowTokens,
    State,
    TopRows,
)
from actpipe.compute.heads import HeadScoreSums, score_heads
from actpipe.compute.patterns import TRANSFORMERLENS_PATTERNS
from actpipe.errors import DtypeOverflowError, RecipeError
from actpipe.extraction.batch_size import batch_tokens_of
from actpipe.extraction.deriving import Derivation, captured_hooks
from actpipe.extraction.passes import Passes, Placement
from actpipe.hooks import HookPoint, ModelShape
from actpipe.models.hooked_model import HookedModel
from actpipe.records import Part
from actpipe.schemas.commit import ChunkRecord, Commit
from actpipe.schemas.reducing import ReduceActivationsConfig
from actpipe.stores.kept_rows import KeptRows
from actpipe.stores.layout import RunFolder, write_whole
from actpipe.stores.remote import publish
from actpipe.stores.token_table import TokenTable
from actpipe.stores.writing import read_commit, withdraw
from actpipe.streaming import already_done
from actpipe.telemetry import Meter

_PATTERN_SCORES = "pattern_scores"


def accumulators_of(config: ReduceActivationsConfig) -> dict[str, Accumulator]:
    """Return what computes the statistics that are asked for, by a name of its own."""
    known: dict[str, tuple[str, Accumulator]] = {
        "mean": ("moments", Moments()),
        "variance": ("moments", Moments()),
        "extremes": ("extremes", Extremes()),
        "covariance": ("covariance", Covariance()),
        "histogram": ("histogram", Histogram()),
        "top_rows": ("top_rows", TopRows(config.k)),
        "mean_by_token": ("mean_by_token", MeanBy("token")),
        "mean_by_position": ("mean_by_position", MeanBy("position")),
    }
    return dict(known[statistic] for statistic in config.statistics if statistic != _PATTERN_SCORES)


@dataclass(frozen=True)
class Reduced:
    """Something that there are statistics of."""

    name: str
    axes: tuple[str, ...]
    """Axes of a row; `shape` has their sizes."""
    shape: tuple[int, ...]


def reduced_of(
    points: Iterable[HookPoint], derivations: Iterable[Derivation], shape: ModelShape, context_length: int
) -> tuple[Reduced, ...]:
    """Return what there are statistics of: activations, and what is made of them."""
    plain = [Reduced(point.name, tuple(point.axes), point.row_shape(shape, context_length)) for point in points]
    return (*plain, *(Reduced(one.result, one.row[1], one.row[0]) for one in derivations))


def check_statistics(
    config: ReduceActivationsConfig,
    points: Iterable[HookPoint],
    derivations: Iterable[Derivation],
    shape: ModelShape,
    context_length: int,
) -> None:
    """Refuse statistics that an activation does not have, and those that need too much memory.

    Raises:
        RecipeError: Says which, and the way out.
    """
    points, derivations = tuple(points), tuple(derivations)
    scored = _PATTERN_SCORES in config.statistics
    for point in points:
        is_pattern = point.name.endswith("attn.hook_pattern")
        if point.integer or (point.looks_at_keys and not is_pattern):
            raise RecipeError(f"{point.name} has no mean or variance worth the name; leave it out of {config.name}")
        if is_pattern != scored and (is_pattern or not accumulators_of(config)):
            raise RecipeError(
                f"{point.name}: `pattern_scores` is of attn.hook_pattern, and all other statistics are of other "
                "activations; give each a stage of its own"
            )
        if is_pattern and accumulators_of(config):
            raise RecipeError(f"{point.name} has `pattern_scores` only; give the other statistics a stage of their own")
    if scored and derivations:
        raise RecipeError("pattern_scores are of attn.hook_pattern itself; give `derive` a stage of its own")
    if scored and config.keep is not None:
        raise RecipeError("pattern_scores are of whole sequences; leave out `keep`")
    reduced = reduced_of(points, derivations, shape, context_length)
    needed = statistics_bytes(config, reduced, shape, context_length)
    if needed > config.max_bytes:
        raise RecipeError(
            f"{config.name} needs {needed:,} bytes of memory for {', '.join(config.statistics)} of {len(reduced)} "
            f"activations, and max_bytes is {config.max_bytes:,}; name fewer hooks or raise it"
        )


def statistics_bytes(
    config: ReduceActivationsConfig, reduced: Iterable[Reduced], shape: ModelShape, context_length: int
) -> int:
    """Return the bytes that statistics take on the model's device."""
    return sum(_state_bytes(config, prod(one.shape), shape, context_length) for one in reduced)


def _state_bytes(config: ReduceActivationsConfig, d: int, shape: ModelShape, context_length: int) -> int:
    """Return the bytes of what is kept of one activation: of a part, of all before it, and of both together."""
    values = {
        "covariance": d * d,
        "top_rows": 5 * config.k * d,
        "mean_by_token": min(shape.d_vocab, 2 * config.rows_per_part) * d,
        "mean_by_position": context_length * d,
        "histogram": 8192,
    }
    return 3 * 8 * sum(values.get(statistic, 2 * d) for statistic in config.statistics)


@dataclass(frozen=True)
class PartialSums:
    """What finished parts gave, on the disk until all are done: a file for each, and its commit record.

    A worker that is late with a part finds the folder gone, and does not make it again.
    """

    folder: RunFolder

    def begin(self) -> None:
        """Make the folder."""
        self.folder.commits.mkdir(parents=True, exist_ok=True)

    def write(self, part: Part, states: Mapping[str, State]) -> None:
        """Write what a part gave, its record last."""
        name = f"part-{part.index:08d}.safetensors"
        fields = ((f"{key}|{field}", values) for key, state in states.items() for field, values in state.items())
        data = save({path: values.cpu().contiguous() for path, values in fields})
        write_whole(self.folder.root / name, data, parents=False)
        publish([self.folder.root / name])
        record = ChunkRecord(path=name, n_bytes=len(data), crc32c=f"{google_crc32c.value(data):08x}")
        commit = Commit(part=part.index, row_start=part.row_start, row_stop=part.row_stop, chunks=(record,))
        write_whole(self.folder.part_commit(part.index), commit.to_json().encode(), parents=False)
        publish([self.folder.part_commit(part.index)])

    def read(self, part: Part) -> dict[str, State] | None:
        """Return what a part gave; None where its file is not as it was committed, and its record is withdrawn."""
        (record,) = read_commit(self.folder.part_commit(part.index)).chunks
        path = self.folder.root / record.path
        data = path.read_bytes() if path.is_file() else b""
        if f"{google_crc32c.value(data):08x}" != record.crc32c:
            withdraw(self.folder.part_commit(part.index))
            return None
        states: dict[str, State] = {}
        for name, values in load(data).items():
            key, field = name.rsplit("|", 1)
            states.setdefault(key, {})[field] = values
        return states


@dataclass(frozen=True)
class _Mark:
    """What a worker had when a batch began."""

    states: dict[str, State]
    not_finite: dict[str, torch.Tensor]
    n_known: int
    n_done: int


class ReducingWorker:
    """Does one part at a time: forward passes, sums on the model's device, and what they gave on the disk."""

    def __init__(
        self,
        config: ReduceActivationsConfig,
        model: HookedModel,
        sums: PartialSums,
        meter: Meter,
        derivations: Iterable[Derivation],
    ) -> None:
        self._accumulators = accumulators_of(config)
        self._model = model
        self._plain = set(model.select(config.hooks))
        self._derivations = tuple(derivations)
        self._sums = sums
        self._meter = meter
        self._run_part: Any
        self._states: dict[str, State] = {}
        self._not_finite: dict[str, torch.Tensor] = {}
        self._known: list[dict[str, np.ndarray]] = []
        self._placement: Placement
        self._tokens: RowTokens
        self._marked: _Mark

    @classmethod
    @contextmanager
    def open(
        cls,
        config: ReduceActivationsConfig,
        model: HookedModel,
        tokens: TokenTable,
        kept: KeptRows | None,
        sums: PartialSums,
        *,
        meter: Meter,
        derivations: Iterable[Derivation] = (),
    ) -> Iterator[ReducingWorker]:
        """Hook the model."""
        worker = cls(config, model, sums, meter, derivations)
        passes = Passes(model, tokens, kept, worker, batch_tokens=batch_tokens_of(config, sums.folder), note=meter.note)
        with passes.open(model.select(captured_hooks(config))) as worker._run_part:
            yield worker

    def __call__(self, part: Part) -> Future[None]:
        """Run every sequence of a part, and write what it gave.

        Returns:
            What is done: the part counts.

        Raises:
            DtypeOverflowError: A value is not finite, which would spoil every mean.
        """
        self._states, self._not_finite, self._known = {}, {}, []
        self._run_part(part)
        for name, count in self._not_finite.items():
            if int(count):
                raise DtypeOverflowError(
                    f"{int(count):,} values of {name} in tokens {part.row_start:,} to {part.row_stop:,} are not "
                    "finite, and would spoil every mean; run the model in bfloat16 or float32, or leave the hook out"
                )
        self._look_up_tokens(part)
        self._sums.write(part, self._states)
        return already_done()

    def mark(self) -> None:
        """Keep what there is; merging makes new states and leaves these as they are."""
        self._marked = _Mark(dict(self._states), dict(self._not_finite), len(self._known), self._meter.done)

    def undo(self) -> None:
        """Go back to what was there at the mark."""
        self._states, self._not_finite = dict(self._marked.states), dict(self._marked.not_finite)
        del self._known[self._marked.n_known :]
        self._meter.advance(self._marked.n_done - self._meter.done)

    def begin(self, placement: Placement) -> None:
        """Note which rows a pass gives."""
        known = {"row": placement.rows, **placement.tokens()}
        self._placement = placement
        self._known.append(known)
        device = self._model.device
        row, position, token = (
            torch.from_numpy(known[name].astype(np.int64)).to(device) for name in ("row", "position", "input_ids")
        )
        self._tokens = RowTokens(row, position, token)

    def take(self, name: str, rows: torch.Tensor, source: torch.Tensor) -> None:
        """Add the rows of one activation to its sums."""
        del source
        if name.endswith("attn.hook_pattern"):
            for pattern, state in self._pattern_states(rows).items():
                self._add(f"{name}|{pattern}", state, merge_scores)
            return
        if name in self._plain:
            self._add_rows(name, rows)
        for derivation in self._derivations:
            if derivation.hook == name:
                (values,) = derivation(rows)
                self._add_rows(derivation.result, values)

    def _add_rows(self, name: str, rows: torch.Tensor) -> None:
        flat = rows.flatten(1)
        bad = (~flat.isfinite()).sum()
        self._not_finite[name] = self._not_finite.get(name, torch.zeros_like(bad)) + bad
        tokens = RowTokens(*(each.to(flat.device) for each in vars(self._tokens).values()))
        for statistic, accumulator in self._accumulators.items():
            self._add(f"{name}|{statistic}", accumulator.of(flat, tokens), accumulator.merge)

    def end(self, placement: Placement) -> None:
        """Tell how far it is."""
        self._meter.advance(placement.n_rows)

    def _add(self, key: str, state: State, merge: Any) -> None:
        self._states[key] = merge(self._states[key], state) if key in self._states else state

    def _pattern_states(self, rows: torch.Tensor) -> dict[str, State]:
        """Score each sequence of the pass; those of one token have no pattern to speak of."""
        attention, start, sums = rows.float().cpu().numpy(), 0, dict[str, HeadScoreSums]()
        for piece in self._placement.pieces:
            ids, count = piece.sequence.ids, len(piece.positions)
            seen = attention[start : start + count, :, : len(ids)]
            start += count
            if len(ids) < 2:
                continue
            for pattern in TRANSFORMERLENS_PATTERNS:
                scored = score_heads(seen, pattern.of(ids)[piece.positions])
                sums[pattern.name] = sums[pattern.name] + scored if pattern.name in sums else scored
        return {
            pattern: {field: torch.as_tensor(value, dtype=torch.float64) for field, value in asdict(scores).items()}
            for pattern, scores in sums.items()
        }

    def _look_up_tokens(self, part: Part) -> None:
        """Say of the top rows which tokens they are."""
        tops = [state for key, state in self._states.items() if key.endswith("|top_rows")]
        if not tops:
            return
        columns = {name: np.concatenate([known[name] for known in self._known]) for name in self._known[0]}
        place = np.empty(part.n_rows, np.int64)
        place[columns["row"] - part.row_start] = np.arange(part.n_rows)
        for state in tops:
            at = place[state["row"].cpu().numpy() - part.row_start]
            for name, column in (("sequence", "sequence"), ("position", "position"), ("token", "input_ids")):
                state[name] = torch.from_numpy(columns[column][at].astype(np.int64)).to(state["row"].device)


def merge_scores(one: State, other: State) -> State:
    """Add scores of heads up."""
    return {field: one[field] + other[field] for field in one}


def merge_all(config: ReduceActivationsConfig, states: Iterable[Mapping[str, State]]) -> dict[str, Arrays]:
    """Merge what the parts gave, in their order, and finish it.

    Returns:
        The statistics of each activation by name, over flat channels.
    """
    accumulators, total = accumulators_of(config), dict[str, State]()
    for part in states:
        for key, state in part.items():
            accumulator = accumulators.get(key.rsplit("|", 1)[1])
            merge = merge_scores if accumulator is None else accumulator.merge
            total[key] = merge(total[key], state) if key in total else state
    finished: dict[str, Arrays] = {}
    for key, state in total.items():
        hook, statistic = key.rsplit("|", 1)
        if statistic in accumulators:
            finished.setdefault(hook, {}).update(accumulators[statistic].finish(state))
        else:
            sums: dict[str, Any] = {
                field: values.numpy() if values.ndim else values.item() for field, values in state.items()
            }
            finished.setdefault(hook, {})[f"score_{statistic}"] = HeadScoreSums(
                **sums | {"n_sequences": int(sums["n_sequences"])}
            ).means
    return finished

"""Run batches as a stage will and keep nothing: how fast they are, and what they take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from actpipe.compute.accumulators import RowTokens
from actpipe.devices import devices_in_use, memory_of, ran_out_of_memory, release_caches
from actpipe.extraction.deriving import Derivation, captured_hooks
from actpipe.extraction.estimate import PassLoad, working_bytes
from actpipe.extraction.reducing import accumulators_of
from actpipe.extraction.worker import LOGITS_AT_ONCE
from actpipe.models.capture import Capture
from actpipe.models.hooked_model import HookedModel
from actpipe.models.taps import UNEMBED_INPUT
from actpipe.schemas.recipe import ExtractActivationsConfig
from actpipe.schemas.reducing import ReduceActivationsConfig

Config = ExtractActivationsConfig | ReduceActivationsConfig
_TIMED_TOKENS = 2048
_SHARE_OF_FREE = 0.8
"""Of the memory that is free, what a batch may take: other batches have other shapes, and fragment it."""
_GAIN = 1.05
"""A larger batch must be so much faster to be worth its memory."""
_LONGEST_SECONDS = 20.0
_MOST_TOKENS = {"cuda": 2**18}
_MOST_TOKENS_ELSEWHERE = 2**14


@dataclass(frozen=True)
class Measured:
    """One size of batches."""

    batch_tokens: int
    tokens_per_second: float
    share: float
    """Of the memory that a batch may take."""
    seconds: float


def best_batch(measure: Callable[[int], Measured | None], *, first: int, most: int) -> Measured | None:
    """Double the number of sequences in a batch until memory runs short or it no longer pays.

    Smaller batches than the first are not asked for their speed: what they take is too little to tell it from noise.

    A size is tried only where twice the memory of the one before it is there. Among those that were tried,
    the smallest is taken that is as fast as the fastest, or nearly so.

    Args:
        measure: Runs a batch of so many sequences; None where it ran out of memory.
        first: Sequences to begin with: half as many, and half of those, only where they do not fit.
        most: Most sequences.

    Returns:
        The size; None where not even one sequence fits.
    """
    tried: list[Measured] = []
    n_sequences, without_gain = min(first, most), 0
    while (found := measure(n_sequences)) is None:
        if n_sequences == 1:
            return None
        n_sequences //= 2
    while found is not None:
        fastest = max((one.tokens_per_second for one in tried), default=0.0)
        without_gain = 0 if found.tokens_per_second > _GAIN * fastest else without_gain + 1
        tried.append(found)
        if found.share > 0.5 or without_gain == 2 or found.seconds > _LONGEST_SECONDS:
            break
        n_sequences *= 2
        found = measure(n_sequences) if n_sequences <= most else None
    fastest = max(one.tokens_per_second for one in tried)
    return next(one for one in tried if one.tokens_per_second * _GAIN >= fastest)


class Trial:
    """The passes of a stage, on random tokens.

    Args:
        config: Of the stage.
        model: The model.
        derivations: What is made of activations.
        length: Tokens of a sequence.
    """

    def __init__(self, config: Config, model: HookedModel, derivations: Iterable[Derivation], length: int) -> None:
        self._config = config
        self._model = model
        self._derivations = tuple(derivations)
        self._metrics = bool(config.metrics) if isinstance(config, ExtractActivationsConfig) else False
        self._names = [*model.select(captured_hooks(config)), *([UNEMBED_INPUT] if self._metrics else [])]
        self._length = length
        self._normalized: torch.Tensor
        self._accumulators = accumulators_of(config) if isinstance(config, ReduceActivationsConfig) else {}
        self._devices = devices_in_use(model.native.parameters(), model.device)
        self._allowed = {device: _SHARE_OF_FREE * memory_of(device).free_bytes for device in self._devices}

    def best(self) -> Measured | None:
        """Return the best size of batches; None where not even one sequence fits."""
        most = _MOST_TOKENS.get(self._model.device.type, _MOST_TOKENS_ELSEWHERE)
        first = max(1, _TIMED_TOKENS // self._length)
        return best_batch(self.measure, first=first, most=max(1, most // self._length))

    def measure(self, n_sequences: int) -> Measured | None:
        """Run a batch; None where memory runs out, or is known not to suffice."""
        n_tokens = n_sequences * self._length
        share = self._expected_share(n_tokens)
        if share > 1:
            return None
        before = {device: _reset_peak(device) for device in self._devices if device.type == "cuda"}
        seconds = self._seconds_or_none(n_sequences)
        if seconds is None:
            release_caches()
            return None
        for device, held in before.items():
            share = max(share, (torch.cuda.max_memory_allocated(device) - held) / self._allowed[device])
        return Measured(n_tokens, n_tokens / seconds, share, seconds)

    def _expected_share(self, n_tokens: int) -> float:
        """Return what the bound of the working memory says, where no device tells what was used."""
        if self._model.device.type == "cuda":
            return 0.0
        looks_at_keys = any(
            self._model.hook_points[name].looks_at_keys for name in self._names if name != UNEMBED_INPUT
        )
        chunk_tokens = self._config.chunk_tokens if isinstance(self._config, ExtractActivationsConfig) else None
        load = PassLoad(n_tokens, self._length, chunk_tokens, looks_at_keys, self._metrics)
        return working_bytes(self._model.shape, load) / self._allowed[self._model.device]

    def _seconds_or_none(self, n_sequences: int) -> float | None:
        try:
            return self.seconds(n_sequences)
        except Exception as error:
            if not ran_out_of_memory(error):
                raise
            return None

    def seconds(self, n_sequences: int) -> float:
        """Run a batch twice, and return the shorter time: the first one warms up."""
        draw = torch.Generator().manual_seed(0)
        ids = torch.randint(0, self._model.shape.d_vocab, (n_sequences, self._length), generator=draw)
        ids = ids.to(self._model.device)
        seconds = []
        with torch.inference_mode(), self._model.capture(self._names, self._take, stop=True) as capture:
            for _ in range(2):
                started = time.perf_counter()
                self._run(capture, ids)
                for device in self._devices:
                    if device.type == "cuda":
                        torch.cuda.synchronize(device)
                seconds.append(time.perf_counter() - started)
        return min(seconds)

    def _run(self, capture: Capture, ids: torch.Tensor) -> None:
        chunk_tokens = self._config.chunk_tokens if isinstance(self._config, ExtractActivationsConfig) else None
        if chunk_tokens is None or chunk_tokens >= self._length:
            self._run_pass(capture, {"input_ids": ids})
            return
        held = self._model.new_kv_cache()
        for piece in torch.split(ids, chunk_tokens, dim=1):
            self._run_pass(capture, held.extend({"input_ids": piece}))

    def _run_pass(self, capture: Capture, inputs: dict[str, Any]) -> None:
        capture.run(**inputs)
        if self._metrics:
            for piece in torch.split(self._normalized, max(1, LOGITS_AT_ONCE // self._model.shape.d_vocab)):
                self._model.unembed(piece)

    def _take(self, name: str, tensor: torch.Tensor) -> None:
        rows = tensor.reshape(-1, *tensor.shape[2:])
        if name == UNEMBED_INPUT:
            self._normalized = rows
            return
        made = (values for one in self._derivations if one.hook == name for values in one(rows))
        for values in (rows, *made):
            self._use(name, values)

    def _use(self, name: str, values: torch.Tensor) -> None:
        """Do with values what the stage does: copy them to the host, or add them up."""
        if not self._accumulators or name.endswith("attn.hook_pattern"):
            values.clone().cpu()
            return
        numbers = torch.arange(len(values), device=values.device)
        tokens = RowTokens(numbers, numbers, numbers)
        for accumulator in self._accumulators.values():
            accumulator.of(values.flatten(1), tokens)


def _reset_peak(device: torch.device) -> int:
    """Let the device's count of its peak begin anew, and return the bytes that are held now."""
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def tokens_per_second(
    config: Config, model: HookedModel, derivations: Iterable[Derivation], context_length: int
) -> float:
    """Run one batch as the stage will, without storing it, and return its speed (the better of two)."""
    chunk_tokens = config.chunk_tokens if isinstance(config, ExtractActivationsConfig) else None
    length = min(context_length, chunk_tokens or context_length)
    at_most = _TIMED_TOKENS if config.batch_tokens == "auto" else min(_TIMED_TOKENS, config.batch_tokens)
    n_sequences = max(1, at_most // length)
    return n_sequences * length / Trial(config, model, derivations, length).seconds(n_sequences)


def device_names(model: HookedModel) -> list[dict[str, Any]]:
    """Return kind and memory of each device that a model computes on."""
    found = [memory_of(device) for device in devices_in_use(model.native.parameters(), model.device)]
    return [{"name": one.name, "bytes": one.total_bytes} for one in found]

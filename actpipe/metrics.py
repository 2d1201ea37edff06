"""Numbers of a run while it works: counters and gauges in memory, for whoever asks."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

from actpipe.errors import ActpipeError

Kind = Literal["counter", "gauge"]
Labels = tuple[tuple[str, str], ...]
_NAME = re.compile(r"[a-z][a-z0-9_]*")

KNOWN: dict[str, tuple[Kind, str]] = {
    "tokens": ("counter", "Tokens done by this process."),
    "documents": ("counter", "Documents tokenized by this process."),
    "blocks": ("counter", "Blocks of rows that analyses have read."),
    "bytes": ("counter", "Bytes written or read by the work that counts them."),
    "retries": ("counter", "Pieces of work done again after a failure that may pass."),
    "parts": ("counter", "Parts with a commit record, those of earlier attempts included."),
    "parts_planned": ("gauge", "Parts of the whole store."),
    "parts_in_flight": ("gauge", "Parts that somebody works on."),
    "workers": ("gauge", "Processes that do parts."),
    "queue_bytes": ("gauge", "Bytes that wait to be written or are being written."),
    "queue_items": ("gauge", "Pieces that wait to be written or are being written."),
    "stage_seconds": ("gauge", "Time that a stage has taken in this attempt."),
    "progress_ratio": ("gauge", "Share of the work at hand that is done, from 0 to 1."),
    "run_info": ("gauge", "1; the labels name the run and the attempt."),
    "build_info": ("gauge", "1; the labels name the versions."),
}
"""What is measured, by name: a counter only grows. Stages may count under other names as well."""


@dataclass(frozen=True)
class Sample:
    """One number."""

    name: str
    kind: Kind
    labels: Labels
    value: float


Source = Callable[[], Iterable[Sample]]


def sample_of(name: str, value: float, /, **labels: str) -> Sample:
    """Return a number that is known only when somebody asks; under a name of a stage's own it is a counter."""
    return Sample(name, KNOWN[name][0] if name in KNOWN else "counter", _labels(labels), value)


@dataclass
class Metrics:
    """Holds counters and gauges; adding to one is cheap and safe from any thread."""

    _values: dict[tuple[str, Labels], float] = field(default_factory=dict)
    _kinds: dict[str, Kind] = field(default_factory=dict)
    _sources: list[Source] = field(default_factory=list)
    _changing: threading.Lock = field(default_factory=threading.Lock)

    def count(self, name: str, amount: float = 1, /, **labels: str) -> None:
        """Add to a counter.

        Raises:
            ValueError: The name is that of a gauge or no name, or the amount is negative.
        """
        if amount < 0:
            raise ValueError(f"the counter {name!r} cannot fall by {-amount}")
        key = (name, _labels(labels))
        with self._changing:
            self._check(name, "counter")
            self._values[key] = self._values.get(key, 0) + amount

    def gauge(self, name: str, value: float, /, **labels: str) -> None:
        """Set a gauge.

        Raises:
            ValueError: The name is that of a counter, or no name.
        """
        with self._changing:
            self._check(name, "gauge")
            self._values[name, _labels(labels)] = value

    def total(self, name: str) -> float | None:
        """Return the sum of a counter or gauge over its labels; None where nobody has set it."""
        with self._changing:
            found = [value for (other, _), value in self._values.items() if other == name]
        return sum(found) if found else None

    def add_source(self, source: Source) -> Callable[[], None]:
        """Ask `source` for more samples at every look; return a function that ends that."""
        self._sources.append(source)
        return lambda: self._sources.remove(source)

    def samples(self) -> list[Sample]:
        """Return all numbers as they are now, equal counters added up; a source in trouble is left out."""
        with self._changing:
            found = [Sample(name, self._kinds[name], labels, value) for (name, labels), value in self._values.items()]
        for source in list(self._sources):
            try:
                found += source()
            except (OSError, ActpipeError):
                continue  # a file system that is away for a moment: the next look tells
        merged: dict[tuple[str, Labels], Sample] = {}
        for sample in found:
            key = (sample.name, sample.labels)
            if sample.kind == "counter" and key in merged:
                sample = replace(sample, value=merged[key].value + sample.value)
            merged[key] = sample
        return list(merged.values())

    def _check(self, name: str, kind: Kind) -> None:
        if name not in self._kinds:
            if not _NAME.fullmatch(name):
                raise ValueError(f"{name!r} is no name of a metric: lower case, digits and _ only")
            self._kinds[name] = KNOWN[name][0] if name in KNOWN else kind
        if self._kinds[name] != kind:
            raise ValueError(f"{name!r} is a {self._kinds[name]}, not a {kind}")


def _labels(labels: dict[str, str]) -> Labels:
    return tuple(sorted(labels.items()))


def counter_of(unit: str) -> str:
    """Return the name under which units of work are counted: `prompt tokens` are `prompt_tokens`, `B` is `bytes`."""
    name = "bytes" if unit == "B" else re.sub(r"[^a-z0-9]+", "_", unit.lower()).strip("_")
    fits = _NAME.fullmatch(name) and KNOWN.get(name, ("counter",))[0] == "counter"
    return name if fits else "units"

"""What a run says while it works: a bar, plain lines or JSON lines, a log with one line per event, and metrics.

Durations and rates are taken from the monotonic clock: setting the time of day changes `time` in the log, nothing else.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from actpipe import __version__
from actpipe.errors import ActpipeError, StorageError, exit_code_of
from actpipe.event_log import EventLog
from actpipe.metrics import Metrics, Sample, counter_of, sample_of
from actpipe.planning import format_bytes
from actpipe.streaming import under_way

_LINE_SECONDS = 10.0
REPORT_SECONDS = 30.0
"""How often the log says how far the work at hand is."""
_REPORTED = ("workers", "parts_in_flight", "retries")
"""Metrics that are said with the progress."""
_MESSAGE_LENGTH = 4000


class Meter:
    """Counts units and bytes of one piece of work, and shows them.

    Args:
        title: What the work is.
        total: How many units there are, where that is known.
        unit: What is counted.
        note: Who is told of what happens on the way: `(text, kind of event, **fields)`.
    """

    def __init__(
        self, title: str, total: int | None, unit: str, note: Callable[..., None] = lambda *_, **__: None
    ) -> None:
        self.title = title
        self.total = total
        self.unit = unit
        self.note = note
        self.done = 0
        self.n_bytes = 0
        self._started = time.monotonic()
        self._advancing = threading.Lock()
        self._watchers: list[Any] = []

    def advance(self, done: int = 0, n_bytes: int = 0) -> None:
        """Count more work done, from any thread."""
        with self._advancing:
            self.done += done
            self.n_bytes += n_bytes
        for watcher in self._watchers:
            watcher()

    def watch(self, watcher: Any) -> None:
        """Call `watcher` after every advance."""
        self._watchers.append(watcher)

    @property
    def seconds(self) -> float:
        """Time since the work began."""
        return time.monotonic() - self._started

    @property
    def rate(self) -> float:
        """Units per second so far."""
        return self.done / max(self.seconds, 1e-9)

    def line(self) -> str:
        """Return the state as one plain line."""
        share = f"{self.done / self.total:4.0%} " if self.total else ""
        of = f"/{self.total:,}" if self.total else ""
        left = f", {(self.total - self.done) / self.rate:,.0f} s left" if self.total and self.rate else ""
        size = f", {format_bytes(self.n_bytes)}" if self.n_bytes else ""
        return f"{self.title}: {share}{self.done:,}{of} {self.unit}, {self.rate:,.0f} {self.unit}/s{size}{left}"


class _RateColumn(ProgressColumn):
    """Units done and per second, and bytes."""

    def render(self, task: Task) -> Text:
        meter: Meter = task.fields["meter"]
        size = f" · {format_bytes(meter.n_bytes)}" if meter.n_bytes else ""
        return Text(f"{meter.done:,} {meter.unit} · {meter.rate:,.0f}/s{size}", style="cyan")


@dataclass
class _Work:
    """A piece of work, at hand or done, and the stage that it belongs to."""

    meter: Meter
    stage: dict[str, str]
    is_at_hand: bool = True

    def samples(self) -> Iterator[Sample]:
        """Yield what it counted so far."""
        meter = self.meter
        yield sample_of(counter_of(meter.unit), meter.done, **self.stage)
        if meter.n_bytes:
            yield sample_of("bytes", meter.n_bytes, **self.stage)
        if self.is_at_hand and meter.total:
            yield sample_of("progress_ratio", meter.done / meter.total, work=meter.title, **self.stage)


class Telemetry:
    """Shows progress to people on a console, writes events to a log file, and keeps metrics.

    Args:
        console: Where people look; a bar on a terminal, a line every ten seconds elsewhere.
        log: File that gets one JSON line per event, if any.
        lines: Stream that gets the same JSON lines, in place of what people would see.
    """

    def __init__(self, console: Console | None = None, log: Path | None = None, *, lines: TextIO | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.metrics = Metrics()
        self.metrics.add_source(self._live_samples)
        self._log = None if log is None else EventLog(log)
        self._lines = lines
        self._keep: Callable[[], None] = _keep_nothing
        self._names: dict[str, str] = {}
        self._stage: dict[str, str] = {}
        self._began = self._stage_began = time.monotonic()
        self._works: list[_Work] = []
        self._failure_told = self._complained = False

    def event(self, kind: str, /, **fields: Any) -> None:
        """Append an event to the log; where that cannot be done, the run goes on, and people hear of it once."""
        if self._log is None and self._lines is None:
            return
        line = {
            "time": round(time.time(), 3),
            "event": kind,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            **self._names,
            "elapsed": round(time.monotonic() - self._began, 3),
            **self._stage,
            **fields,
        }
        text = json.dumps(line, default=str)
        if self._lines is not None:
            with suppress(OSError, ValueError):  # nobody reads there any more
                self._lines.write(text + "\n")
                self._lines.flush()
        trouble = None if self._log is None else self._log.append(text)
        if trouble is not None and not self._complained:
            self._complained = True
            self.say(f"note: the log cannot be written ({trouble}); the run goes on without it")

    def say(self, text: str) -> None:
        """Tell people something, once; the log has it too."""
        self.note(text, "note")

    def note(self, text: str, kind: str, **fields: Any) -> None:
        """Tell people something, and log it as an event of some kind."""
        self._show(text)
        self.event(kind, text=text, **fields)

    def count(self, name: str, amount: float = 1, /, **labels: str) -> None:
        """Add to a counter of `metrics`; see `Metrics.count`."""
        self.metrics.count(name, amount, **labels)

    def gauge(self, name: str, value: float, /, **labels: str) -> None:
        """Set a gauge of `metrics`; see `Metrics.gauge`."""
        self.metrics.gauge(name, value, **labels)

    @contextmanager
    def attempt(
        self,
        log: Path,
        place: str,
        *,
        keep: Callable[[], None] | None = None,
        source: Callable[[], Iterable[Sample]] | None = None,
    ) -> Iterator[None]:
        """Log everything within to a run's log, how it began and how it ended.

        Args:
            log: The run's log.
            place: The run folder, or its URL.
            keep: Puts the log where it lasts, called now and then; it may fail while the run works.
            source: More samples for `metrics`.
        """
        before, self._log = self._log, EventLog(log)
        self._keep = keep or _keep_nothing
        self._names = {"run": place, "attempt": uuid.uuid4().hex[:12]}
        self._began, self._failure_told, self._complained = time.monotonic(), False, False
        self.gauge("run_info", 1, **self._names)
        self.gauge("workers", 1)
        forget = None if source is None else self.metrics.add_source(source)
        self.event("run started", actpipe=__version__)
        try:
            self._keep_if_possible()
            yield
            self.event("run finished", seconds=self._seconds)
            self._keep()
        except BaseException as error:
            self.tell_failure(error)
            if not isinstance(error, StorageError):
                self._keep_if_possible()
            raise
        finally:
            self._log, self._keep, self._stage = before, _keep_nothing, {}
            if forget is not None:
                forget()

    def tell_failure(self, error: BaseException) -> None:
        """Log an error that ends the run; one that has been told already is not told again."""
        if self._failure_told:
            return
        self._failure_told = True
        stopped = isinstance(error, KeyboardInterrupt | SystemExit)
        fields: dict[str, Any] = {"seconds": self._seconds, "exit_code": exit_code_of(error)}
        if not stopped:
            fields |= {"error": type(error).__name__, "message": str(error)[:_MESSAGE_LENGTH]}
            if not isinstance(error, ActpipeError):
                fields["traceback"] = "".join(traceback.format_exception(error))[-_MESSAGE_LENGTH:]
        self.event("run stopped" if stopped else "run failed", **fields)

    @contextmanager
    def stage(self, name: str, corpus: str) -> Iterator[None]:
        """Log and measure one stage; an error leaves its name on the lines that follow."""
        self._stage, self._stage_began = {"stage": name, "corpus": corpus}, time.monotonic()
        self.event("stage started")
        self._keep_if_possible()
        yield
        seconds = time.monotonic() - self._stage_began
        self.gauge("stage_seconds", seconds, **self._stage)
        self.event("stage finished", seconds=round(seconds, 3))
        self._stage = {}

    @contextmanager
    def progress(self, title: str, total: int | None, unit: str) -> Iterator[Meter]:
        """Show the progress of one piece of work; log it every `REPORT_SECONDS`, and its end."""
        meter = Meter(title, total, unit, self.note)
        work = _Work(meter, dict(self._stage))
        self._works.append(work)
        try:
            with self._shown(meter), self._reported(meter):
                yield meter
        finally:
            work.is_at_hand = False
        self.event("work finished", **_state_of(meter))

    @property
    def _seconds(self) -> float:
        return round(time.monotonic() - self._began, 3)

    def _show(self, text: str) -> None:
        if self._lines is None:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _keep_if_possible(self) -> None:
        with suppress(OSError):  # the place is away: the work itself will tell
            self._keep()

    def _live_samples(self) -> Iterator[Sample]:
        """Yield what is known only at the moment."""
        stage = dict(self._stage)
        if stage:
            yield sample_of("stage_seconds", time.monotonic() - self._stage_began, **stage)
        for work in list(self._works):
            yield from work.samples()
        n_items, n_bytes = under_way()
        yield sample_of("queue_items", n_items)
        yield sample_of("queue_bytes", n_bytes)

    def _shown(self, meter: Meter) -> Any:
        if self._lines is not None:
            return nullcontext()
        return self._bar(meter) if self.console.is_terminal else self._lines_of(meter)

    @contextmanager
    def _reported(self, meter: Meter) -> Iterator[None]:
        """Log the progress now and then, also while nothing advances."""
        ended = threading.Event()

        def report() -> None:
            while not ended.wait(REPORT_SECONDS):
                known = {name: self.metrics.total(name) for name in _REPORTED}
                self.event("progress", **_state_of(meter), **{k: v for k, v in known.items() if v is not None})
                self._keep_if_possible()

        reporter = threading.Thread(target=report, name="actpipe-reporter", daemon=True)
        reporter.start()
        try:
            yield
        finally:
            ended.set()
            reporter.join()

    @contextmanager
    def _bar(self, meter: Meter) -> Iterator[None]:
        columns = (TextColumn("{task.description}"), BarColumn(), _RateColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.console, transient=False) as progress:
            task = progress.add_task(meter.title, total=meter.total, meter=meter)
            meter.watch(lambda: progress.update(task, completed=meter.done))
            yield

    @contextmanager
    def _lines_of(self, meter: Meter) -> Iterator[None]:
        last = time.monotonic()

        def tell() -> None:
            nonlocal last
            if time.monotonic() - last >= _LINE_SECONDS:
                last = time.monotonic()
                self._show(meter.line())

        meter.watch(tell)
        yield
        self._show(meter.line())


def _keep_nothing() -> None:
    """Keep a log that is where it lasts already."""


def _state_of(meter: Meter) -> dict[str, Any]:
    """Return how far a piece of work is, as the log says it."""
    state = {
        "what": meter.title,
        "unit": meter.unit,
        "done": meter.done,
        "total": meter.total,
        "n_bytes": meter.n_bytes,
        "seconds": round(meter.seconds, 3),
        "rate": round(meter.rate, 3),
    }
    return {name: value for name, value in state.items() if value is not None}

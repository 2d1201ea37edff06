"""What a run says while it works: a progress bar or plain lines, and one JSON line per event."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from actpipe.planning import format_bytes

_LINE_SECONDS = 10.0


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
        self._watchers: list[Any] = []

    def advance(self, done: int = 0, n_bytes: int = 0) -> None:
        """Count more work done."""
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


class Telemetry:
    """Shows progress to people on a console and writes events to a log file.

    Args:
        console: Where people look; a bar on a terminal, a line every ten seconds elsewhere.
        log: File that gets one JSON line per event, if any.
    """

    def __init__(self, console: Console | None = None, log: Path | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.log = log

    def event(self, kind: str, **fields: Any) -> None:
        """Append an event to the log."""
        if self.log is not None:
            with self.log.open("a") as file:
                file.write(json.dumps({"time": round(time.time(), 3), "event": kind, **fields}) + "\n")

    def say(self, text: str) -> None:
        """Tell people something, once."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def note(self, text: str, kind: str, **fields: Any) -> None:
        """Tell people something, and log it as an event."""
        self.say(text)
        self.event(kind, **fields)

    @contextmanager
    def progress(self, title: str, total: int | None, unit: str) -> Iterator[Meter]:
        """Show the progress of one piece of work, and log its end."""
        meter = Meter(title, total, unit, self.note)
        show = self._bar(meter) if self.console.is_terminal else self._lines(meter)
        with show:
            yield meter
        self.event(
            "finished",
            what=title,
            unit=unit,
            done=meter.done,
            n_bytes=meter.n_bytes,
            seconds=round(meter.seconds, 3),
        )

    @contextmanager
    def _bar(self, meter: Meter) -> Iterator[None]:
        columns = (TextColumn("{task.description}"), BarColumn(), _RateColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.console, transient=False) as progress:
            task = progress.add_task(meter.title, total=meter.total, meter=meter)
            meter.watch(lambda: progress.update(task, completed=meter.done))
            yield

    @contextmanager
    def _lines(self, meter: Meter) -> Iterator[None]:
        last = time.monotonic()

        def tell() -> None:
            nonlocal last
            if time.monotonic() - last >= _LINE_SECONDS:
                last = time.monotonic()
                self.say(meter.line())

        meter.watch(tell)
        yield
        self.say(meter.line())

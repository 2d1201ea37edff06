"""What stands on a worker of a cluster: the model, loaded once, and hooked for one kind of work at a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distributed import Worker, WorkerPlugin, get_worker
from rich.console import Console

from actpipe.contexts import load_recipe, make_context
from actpipe.jobs.engine import InProcess
from actpipe.recipes import RecipeText
from actpipe.records import Part
from actpipe.stage import DoesParts, MapsItems, PartWorker, RunContext
from actpipe.stores.layout import RunFolder
from actpipe.stores.remote import fetch_all
from actpipe.stores.worker_fronts import forget_front, front_of_worker
from actpipe.telemetry import Meter, Telemetry

RESOURCE = "GPU"
"""What a worker has one of for each replica of the model; a part takes half, so that one is computed while
another is written."""
SHARE = 0.5
TASKS = 2
"""Tasks that a worker takes at once: one part is computed while another is written."""
_EVENT_SECONDS = 0.5


@dataclass(frozen=True)
class Place:
    """Everything that a worker needs to know to work for a run."""

    name: str
    """Of the run, among all that a cluster works for; also the topic of what workers tell."""
    recipe: dict[str, Any]
    base: str
    folder: str
    """Run folder, which every worker must see under this path, or its URL."""


@dataclass(frozen=True)
class Report:
    """What a worker says of a finished part, and of all that it has done so far."""

    worker: str
    seconds: float
    n_rows: int
    n_bytes: int


class Site(WorkerPlugin):  # type: ignore[misc]
    """Does parts on a worker, in a thread of its own, since hooks and inference mode belong to a thread."""

    def __init__(self, place: Place) -> None:
        self.name = place.name
        self._place = place

    async def setup(self, worker: Worker) -> None:
        """Offer a place for one replica, unless the worker was started with its own number of them."""
        self._worker = worker
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="actpipe-site")
        self._context: RunContext | None = None
        self._opened: _Opened | None = None
        self._mapping = threading.Lock()
        self._mapped: tuple[str, Callable[[Any], Any]] | None = None
        if RESOURCE not in worker.state.total_resources:
            await worker.set_resources(**{RESOURCE: 1})

    def teardown(self, worker: Worker) -> None:
        """Take the hooks off; files of unfinished parts are removed."""
        del worker
        self._thread.submit(self._leave)
        self._thread.shutdown(wait=False)

    @property
    def context(self) -> RunContext:
        """What stages are given, made when it is first needed."""
        with self._lock:
            if self._context is None:
                place = self._place
                text = RecipeText("recipe", place.recipe)
                folder = RunFolder(front_of_worker(place.folder))
                telemetry = Telemetry(Console(quiet=True))
                self._context = make_context(load_recipe(text), Path(place.base), folder, telemetry, InProcess())
            return self._context

    def do_part(self, key: str, work_key: str, work: DoesParts, part: Part) -> Report:
        """Do one part; when this returns, it counts."""
        started = time.monotonic()
        self._tell(key=key, worker=self._worker.address)
        opened, counts = self._thread.submit(self._compute, work_key, work, part).result()
        try:
            counts.result()
        except BaseException as error:
            self._thread.submit(self._close, error, opened).result()
            raise
        return Report(self._worker.address, time.monotonic() - started, opened.meter.done, opened.meter.n_bytes)

    def do_item(self, work_key: str, work: MapsItems, item: Any) -> Any:
        """Apply the function of some work to an item; one at a time, since tokenizers take no two threads."""
        with self._mapping:
            if self._mapped is None or self._mapped[0] != work_key:
                self._mapped = work_key, work.mapped(self.context)
            return self._mapped[1](item)

    def _compute(self, work_key: str, work: DoesParts, part: Part) -> tuple[_Opened, Future[None]]:
        """Compute a part; in this site's own thread."""
        if self._opened is None or self._opened.key != work_key:
            self._close(None)
            fetch_all(self.context.folder.root)
            self._opened = _Opened.open(work_key, work, self.context, self._tell_progress, self._tell_note)
        opened = self._opened
        try:
            return opened, opened.worker(part)
        except BaseException as error:
            self._close(error, opened)
            raise

    def _close(self, error: BaseException | None, which: _Opened | None = None) -> None:
        """Close what is open (if it is still `which`), in order or because of an error; in this site's own thread."""
        opened = self._opened
        if opened is not None and which in (None, opened):
            self._opened = None
            opened.close(error)

    def _leave(self) -> None:
        self._close(InterruptedError("the worker ends"))
        forget_front(self._place.folder)

    def _tell_progress(self, meter: Meter) -> None:
        self._tell(worker=self._worker.address, done=meter.done, n_bytes=meter.n_bytes)

    def _tell_note(self, text: str, kind: str, **fields: Any) -> None:
        self._tell(note=text, kind=kind, fields={**fields, "worker": self._worker.address})

    def _tell(self, **message: Any) -> None:
        self._worker.log_event(self.name, message)


@dataclass(eq=False)
class _Opened:
    """The model hooked for one kind of work."""

    key: str
    worker: PartWorker
    meter: Meter
    _stack: ExitStack

    @classmethod
    def open(
        cls, key: str, work: DoesParts, context: RunContext, tell: Callable[[Meter], None], note: Callable[..., None]
    ) -> _Opened:
        meter = Meter(key, None, "", note=note)
        last = 0.0

        def now_and_then() -> None:
            nonlocal last
            if time.monotonic() - last >= _EVENT_SECONDS:
                last = time.monotonic()
                tell(meter)

        meter.watch(now_and_then)
        stack = ExitStack()
        return cls(key, stack.enter_context(work.open_worker(context, meter)), meter, stack)

    def close(self, error: BaseException | None) -> None:
        try:
            self._stack.__exit__(type(error) if error else None, error, None)
        except BaseException as again:
            if error is None:
                raise
            error.add_note(f"while closing: {again!r}")


def do_part(name: str, key: str, work_key: str, work: DoesParts, part: Part) -> Report:
    """Do a part at this worker's site; the task that a cluster is given."""
    return _here(name).do_part(key, work_key, work, part)


def do_item(name: str, work_key: str, work: MapsItems, item: Any) -> Any:
    """Map an item at this worker's site; the task that a cluster is given."""
    return _here(name).do_item(work_key, work, item)


def _here(name: str) -> Site:
    site: Site = get_worker().plugins[name]
    return site

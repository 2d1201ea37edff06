"""Parts as tasks of a Dask cluster: handed out, watched, and given to another worker where one fails or hangs."""

from __future__ import annotations

import json
import queue
import time
import traceback
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from functools import partial
from typing import Any

from distributed import Client, Future, KilledWorker

from actpipe.cluster.analysing import OnWorkers
from actpipe.cluster.ledger import Attempt, Ledger, RetriesExhausted
from actpipe.cluster.site import RESOURCE, SHARE, Place, Report, Site, do_item, do_part
from actpipe.cluster.starting import connected
from actpipe.errors import ActpipeError, ClusterError
from actpipe.interrupting import INTERRUPTION
from actpipe.jobs.blocks import computed_by
from actpipe.records import Part
from actpipe.schemas.engine import EngineConfig
from actpipe.stage import DoesParts, MapsItems, RunContext
from actpipe.stores.layout import SAME_EVERYWHERE
from actpipe.stores.remote import fetch_pieces, publish_all, remote_of
from actpipe.telemetry import Meter

_LOOK_SECONDS = 0.5
"""How often slow parts, lost workers and requests to end are looked for."""
_AHEAD = 4
"""Parts that are handed over for each worker: two at work, two that wait, so that none waits for this process."""
_ITEMS_AHEAD = 4
_LEAVE_SECONDS = 10
_FETCH_SECONDS = 30
_STUCK_SECONDS = 5


class DaskEngine:
    """Gives parts to the workers of a Dask cluster, which is started or found when it is first needed.

    Args:
        config: Which cluster, and how patient to be with its workers.
    """

    is_here = False

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._stack = ExitStack()
        self._client: Client | None = None
        self._name = ""
        self._news: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()

    def run_parts(self, parts: Sequence[Part], work: DoesParts, context: RunContext, meter: Meter) -> None:
        """Do every part once, wherever; parts that fail or hang are done again elsewhere.

        Raises:
            ClusterError: A part has failed too often, or the cluster is gone.
            ActpipeError: Trying again would not help; the other parts at work are let go.
        """
        client = self._ready(context)
        publish_all(context.folder.root)
        with ExitStack() as at_end:
            at_end.callback(fetch_pieces, context.folder.root)
            _Watch(client, self._config, self._name, self._news, context, meter).do(parts, work)

    def map_items(self, items: Iterable[Any], work: MapsItems, context: RunContext) -> Iterator[Any]:
        """Yield what becomes of each item, in the order of the items; some are worked on ahead."""
        client = self._ready(context)
        under_way: deque[tuple[Callable[[], Future], Future]] = deque()
        work_key = uuid.uuid4().hex[:12]
        try:
            for item in items:
                INTERRUPTION.raise_if_asked()
                submit = partial(client.submit, do_item, self._name, work_key, work, item, pure=False)
                under_way.append((submit, submit()))
                if len(under_way) >= _ITEMS_AHEAD * max(1, len(_workers_of(client))):
                    yield self._result(client, *under_way.popleft())
            while under_way:
                yield self._result(client, *under_way.popleft())
        finally:
            client.cancel([future for _, future in under_way])

    def _result(self, client: Client, submit: Callable[[], Future], future: Future) -> Any:
        """Return what became of an item; one that was lost, or that a worker sits on for long, is given out again."""
        for tries_left in range(self._config.retries, -1, -1):
            try:
                return future.result(timeout=self._config.slow_seconds if tries_left else None)
            except Exception as error:
                if client.status != "running":
                    raise _gone() from None
                if _is_final(error):
                    raise
                if not tries_left:
                    n_tries = _times(self._config.retries + 1)
                    raise ClusterError(f"an item failed {n_tries}, at last with {_said(error)}") from error
                future.cancel()
                future = submit()
        raise AssertionError("the last try returns or raises")

    def analysing(self, context: RunContext) -> AbstractContextManager[None]:
        """Within, graphs over the blocks of a store are computed by the workers, or here where they see no store."""
        if remote_of(context.folder.root) is not None:
            return nullcontext()
        return computed_by(OnWorkers(lambda: self._ready(context), self._config.retries))

    def close(self) -> None:
        """Let go of the cluster; one that was started for this run ends, others lose this run's models."""
        client, self._client = self._client, None
        if client is not None and self._config.scheduler is not None and client.status == "running":
            with suppress(Exception):  # a worker that hangs is told by whoever comes next
                client.sync(client._unregister_worker_plugin, self._name, callback_timeout=_LEAVE_SECONDS)
        self._stack.close()

    def _ready(self, context: RunContext) -> Client:
        """Return the cluster with this run's site on each of its workers, those that come later included."""
        if self._client is None:
            client = self._stack.enter_context(connected(self._config, context.telemetry))
            client.run_on_scheduler(_forget_the_dead)
            self._name = f"actpipe-{client.id}"
            remote = remote_of(context.folder.root)
            place = Place(
                name=self._name,
                recipe=json.loads(context.recipe.model_dump_json()),
                base=str(context.base.resolve()),
                folder=str(context.folder.root.resolve()) if remote is None else remote.url,
            )
            client.register_plugin(Site(place), name=self._name)
            client.subscribe_topic(self._name, lambda event: self._news.put(("told", event[1])))
            self._client = client
        return self._client


def _gone() -> ClusterError:
    return ClusterError(
        "the scheduler of the cluster is gone; what is committed stays valid, start the cluster again and give the "
        "same command"
    )


def _workers_of(client: Client) -> set[str]:
    """Return the addresses of all workers.

    Raises:
        ClusterError: There is no one to ask any more.
    """
    try:
        if client.status == "running":
            return set(client.nthreads())
    except OSError:  # cut off while it was asked
        pass
    raise _gone()


async def _restart(client: Client, worker: str) -> None:
    """Restart a worker; one without a nanny cannot be, and stays as it is."""
    with suppress(Exception):
        await client._restart_workers([worker], timeout=_LEAVE_SECONDS, raise_for_error=False)


async def _forget_the_dead(dask_scheduler: Any) -> None:
    """Take away the sites, models included, of runs whose process is gone."""
    alive = {f"actpipe-{client}" for client in dask_scheduler.clients}
    for name in [name for name in dask_scheduler.worker_plugins if name.startswith("actpipe-")]:
        if name not in alive:
            await dask_scheduler.unregister_worker_plugin(None, name)


class _Watch:
    """Hands out the parts of one piece of work, and watches over them."""

    def __init__(
        self,
        client: Client,
        config: EngineConfig,
        name: str,
        news: queue.SimpleQueue[tuple[str, Any]],
        context: RunContext,
        meter: Meter,
    ) -> None:
        self._client = client
        self._config = config
        self._name = name
        self._news = news
        self._telemetry = context.telemetry
        self._meter = meter
        self._work_key = uuid.uuid4().hex[:12]
        self._futures: dict[str, Future] = {}
        self._hung: dict[str, tuple[Attempt, Future, float]] = {}
        """Attempts that are not needed any more and still hold a worker, and since when."""
        self._sites: dict[str, Report] = {}
        self._workers: set[str] = set()
        self._shown_rows = self._shown_bytes = 0

    def do(self, parts: Sequence[Part], work: DoesParts) -> None:
        self._work = work
        self._all_wait_since: float | None = None
        self._ledger = Ledger(
            parts,
            retries=self._config.retries,
            factor=self._config.slow_factor,
            least_seconds=self._config.slow_seconds,
        )
        looked = 0.0
        try:
            while not self._ledger.is_done:
                if time.monotonic() - looked >= _LOOK_SECONDS:
                    self._look_after()
                    looked = time.monotonic()
                self._hand_out()
                if INTERRUPTION.asked and self._ledger.n_under_way == 0:
                    INTERRUPTION.raise_if_asked()
                self._hear()
            INTERRUPTION.raise_if_asked()
        except RetriesExhausted as failed:
            raise ClusterError(
                f"tokens {failed.part.row_start:,} to {failed.part.row_stop:,} (part {failed.part.index}) failed "
                f"{_times(len(failed.reasons))}, at last with {failed.reasons[-1]}; what is committed stays valid, the "
                "same command continues"
            ) from None
        finally:
            with suppress(Exception):  # the cluster may be what is gone
                self._client.cancel([*self._futures.values(), *(future for _, future, _ in self._hung.values())])

    def _hand_out(self) -> None:
        if INTERRUPTION.asked:
            for attempt in self._ledger.unbegun():
                self._drop(attempt)
                self._ledger.give_up(attempt.key)
            return
        while self._ledger.is_waiting and self._ledger.n_under_way < _AHEAD * max(1, len(self._workers)):
            self._submit(self._ledger.next_part())

    def _submit(self, part: Part) -> None:
        self._give(self._ledger.hand_over(part, time.monotonic()))

    def _give(self, attempt: Attempt) -> None:
        others = sorted(self._workers - self._ledger.workers_to_avoid(attempt.part))
        avoided = others and len(others) < len(self._workers)
        avoid = {"workers": others, "allow_other_workers": True} if avoided else {}
        future = self._client.submit(
            do_part,
            self._name,
            attempt.key,
            self._work_key,
            self._work,
            attempt.part,
            key=f"{attempt.key}-{uuid.uuid4().hex[:12]}",
            resources={RESOURCE: SHARE},
            pure=False,
            **avoid,
        )
        self._futures[attempt.key] = future
        future.add_done_callback(lambda future, key=attempt.key: self._news.put(("done", (key, future))))

    def _hear(self) -> None:
        """Take in what has happened; wait a little where nothing has."""
        try:
            kind, news = self._news.get(timeout=_LOOK_SECONDS)
        except queue.Empty:
            return
        if kind == "done":
            self._end(*news)
        elif "note" in news:
            self._telemetry.note(news["note"], news["kind"], **news["fields"])
        elif "key" in news:
            self._ledger.begin(news["key"], news["worker"], time.monotonic())
        else:
            self._sites[news["worker"]] = Report(news["worker"], 0.0, news["done"], news["n_bytes"])
        self._show()

    def _end(self, key: str, future: Future) -> None:
        self._hung.pop(key, None)
        if self._futures.get(key) is not future:
            return  # another attempt was first, or this one was given anew
        del self._futures[key]
        done = _outcome_of(future)
        if isinstance(done, Report):
            self._sites[done.worker] = done
            for other in self._ledger.finish(key, time.monotonic()):
                self._drop(other)
            return
        self._fail(key, done)

    def _fail(self, key: str, error: BaseException) -> None:
        if self._client.status != "running":
            raise _gone()
        if _is_final(error):
            raise error
        self._telemetry.count("retries", 1)
        trace = "".join(traceback.format_exception(error))
        self._telemetry.event("retry", key=key, error=type(error).__name__, message=str(error), traceback=trace)
        part = self._ledger.fail(key, _said(error))
        if part is not None:
            self._submit(part)

    def _drop(self, attempt: Attempt) -> None:
        """Let go of an attempt that is not needed any more; one that is begun cannot be stopped."""
        future = self._futures.pop(attempt.key, None)
        if future is None:
            return
        if attempt.begun is None:
            future.cancel()
        else:
            self._hung[attempt.key] = (attempt, future, time.monotonic())

    def _look_after(self) -> None:
        """Start slow parts again elsewhere, and restart workers that hang."""
        before, self._workers = self._workers, _workers_of(self._client)
        if before and not self._workers:
            self._telemetry.say("no worker is left; waiting for others, Ctrl-C ends")
        self._telemetry.gauge("workers", len(self._workers))
        self._telemetry.gauge("parts_in_flight", self._ledger.n_under_way)
        now = time.monotonic()
        self._give_anew_what_is_stuck(now)
        if len(self._workers) > 1 and not INTERRUPTION.asked:
            for attempt in self._ledger.slow(now):
                self._telemetry.event("slow", part=attempt.part.index, worker=attempt.worker)
                self._submit(attempt.part)
        for key, (attempt, _, since) in list(self._hung.items()):
            if now - since > self._config.slow_seconds:
                del self._hung[key]
                self._telemetry.event("restart", worker=attempt.worker)
                self._client.loop.add_callback(_restart, self._client, attempt.worker)

    def _give_anew_what_is_stuck(self, now: float) -> None:
        """Hand out anew what waits for workers that are gone, where there are others, and none of them has work.

        Dask keeps tasks that no worker could take when they came, or when the last worker went, for ever.
        """
        stuck = self._ledger.not_at_work(self._workers)
        if not self._workers or len(stuck) < self._ledger.n_under_way:
            self._all_wait_since = None
        elif self._all_wait_since is None:
            self._all_wait_since = now
        elif now - self._all_wait_since > _STUCK_SECONDS:
            self._all_wait_since = now
            for attempt in stuck:
                self._futures.pop(attempt.key).cancel()
                attempt.begun = attempt.worker = None
                self._give(attempt)

    def _show(self) -> None:
        """Bring the meter up to what is done: whole parts, and what workers tell of those under way."""
        done = self._ledger.n_rows_done
        total = max(done, min(sum(site.n_rows for site in self._sites.values()), self._meter.total or done))
        n_bytes = sum(site.n_bytes for site in self._sites.values())
        rows, written = max(0, total - self._shown_rows), max(0, n_bytes - self._shown_bytes)
        self._shown_rows += rows
        self._shown_bytes += written
        self._meter.advance(rows, written)


def _outcome_of(future: Future) -> Report | BaseException:
    """Return what a task gave, or why it gave nothing; what it gave may be lost with its worker."""
    try:
        report: Report = future.result(timeout=_FETCH_SECONDS)
    except Exception as error:  # noqa: BLE001 - whatever a worker raised
        return error
    return report


def _times(number: int) -> str:
    return "once" if number == 1 else f"{number} times"


def _said(error: BaseException) -> str:
    """Return what an error says, in one line."""
    if isinstance(error, KilledWorker):
        return (
            f"the worker at {error.last_worker.address} ended while it was at work on it: killed, or out of memory "
            "(engine.memory, batch_tokens)"
        )
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _is_final(error: BaseException) -> bool:
    """Whether trying again would end in the same way: what was said on purpose, and a disk that takes nothing."""
    return isinstance(error, ActpipeError) or (isinstance(error, OSError) and error.errno in SAME_EVERYWHERE)

"""A worker of a cluster that leaves in order: asked to end, it finishes the parts at hand and takes no more."""

from __future__ import annotations

import asyncio
import logging
import signal
import uuid
from contextlib import suppress
from typing import Any

from distributed import Security, Worker, rpc

from actpipe.cluster.site import RESOURCE, TASKS
from actpipe.errors import ClusterError

_LOOK_SECONDS = 0.05
_REGISTER_SECONDS = 60
"""Time after which a worker gives up that cannot register: Dask's would wait for ever."""
_PATIENCE_SECONDS = 10
"""Time for which a scheduler is waited for that does not answer a worker that leaves."""
_TELL_SECONDS = 0.5
"""Time in which the scheduler hears of what was finished last."""


def work_for(
    scheduler: str,
    *,
    name: str | None,
    seconds: float | None,
    interface: str | None = None,
    security: Security | None = None,
) -> None:
    """Do parts for whoever gives some to a scheduler, until it ends or this process is asked to.

    SIGTERM and SIGINT let the parts at hand be finished; a second one ends the process at once.

    Args:
        scheduler: Address, such as `tcp://10.0.0.1:8786`.
        name: Name of the worker in logs and on the dashboard.
        seconds: Leave in order after this time, before a batch system would end the process.
        interface: Network interface to listen on, such as `ib0`; by default the one that leads to the scheduler.
        security: Certificates; by default those of Dask's settings.

    Raises:
        ClusterError: There is no scheduler at that address.
    """
    logging.getLogger("distributed").setLevel(logging.ERROR)
    options = {"name": name, "interface": interface, "security": security or Security()}
    asyncio.run(_work(scheduler, seconds, options))


async def _work(scheduler: str, seconds: float | None, options: dict[str, Any]) -> None:
    try:
        async with rpc(scheduler, connection_args=options["security"].get_connection_args("worker")) as there:
            await there.identity()
    except (OSError, TimeoutError, ValueError) as error:
        raise ClusterError(
            f"there is no Dask scheduler at {scheduler} ({error}); start one with `dask scheduler`"
        ) from error
    try:
        worker = await Worker(
            scheduler,
            nthreads=TASKS,
            resources={RESOURCE: 1},
            memory_limit=0,
            dashboard=False,
            death_timeout=_REGISTER_SECONDS,
            **options,
        )
    except TimeoutError as error:
        raise ClusterError(f"the scheduler at {scheduler} is gone before this worker could register") from error
    asked = asyncio.Event()
    loop = asyncio.get_running_loop()

    def hear(number: signal.Signals) -> None:
        loop.remove_signal_handler(number)
        asked.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, hear, number)
    if seconds is not None:
        loop.call_later(seconds, asked.set)
    ended = asyncio.create_task(worker.finished())
    waiting = asyncio.create_task(asked.wait())
    await asyncio.wait({ended, waiting}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if not ended.done():
        await _leave(worker)
    with suppress(TimeoutError):
        await asyncio.wait_for(ended, _PATIENCE_SECONDS)


async def _leave(worker: Worker) -> None:
    """Take no more tasks, finish those at hand, then go; a scheduler that is ending too is not waited for."""
    with suppress(OSError, TimeoutError):
        retired = worker.scheduler.retire_workers(
            workers=[worker.address], close_workers=False, remove=False, stimulus_id=f"leave-{uuid.uuid4().hex}"
        )
        await asyncio.wait_for(retired, _PATIENCE_SECONDS)
    while worker.state.executing_count:
        await asyncio.sleep(_LOOK_SECONDS)
    await asyncio.sleep(_TELL_SECONDS)
    with suppress(TimeoutError):
        await asyncio.wait_for(worker.close(nanny=False, reason="asked to end"), _PATIENCE_SECONDS)

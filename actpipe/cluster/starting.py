"""Start a cluster, or find one that is there."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import dask
from distributed import Client, LocalCluster, Security

from actpipe.cluster.batch_systems import jobs_of_slurm, pods_of_kubernetes
from actpipe.cluster.site import RESOURCE, TASKS
from actpipe.errors import ClusterError, ClusterSetupError
from actpipe.interrupting import INTERRUPTION
from actpipe.schemas.engine import EngineConfig
from actpipe.telemetry import Telemetry

_CONNECT_SECONDS = 30
_NOT_FOR_WORKERS = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"
"""What workers on this machine run first: a terminal sends Ctrl-C to them too, and the run ends them in order."""


@contextmanager
def connected(config: EngineConfig, telemetry: Telemetry) -> Iterator[Client]:
    """Give a client of the cluster; one that was started for it ends with the block.

    Raises:
        ClusterSetupError: It wants certificates, and there are none.
        ClusterError: There is none at that address, or it cannot be started.
    """
    logging.getLogger("distributed.client").setLevel(logging.CRITICAL)  # a lost scheduler is a ClusterError
    with ExitStack() as stack:
        stack.enter_context(
            dask.config.set(
                {
                    "distributed.scheduler.allowed-failures": 0,  # who tries again, and where, is decided here
                    "distributed.comm.timeouts.connect": f"{_CONNECT_SECONDS}s",
                    "distributed.worker.memory.target": False,
                    "distributed.worker.memory.spill": False,
                    "distributed.worker.memory.pause": False,
                    "distributed.worker.profile.enabled": False,  # looks at every thread a hundred times a second
                    # Dask's own value makes the C library hand every large tensor back at once, and every forward pass
                    # fetch its memory anew, page by page: 1.4 times the time.
                    "distributed.nanny.pre-spawn-environ.MALLOC_TRIM_THRESHOLD_": None,
                }
            )
        )
        if config.scheduler is not None:
            client = stack.enter_context(_client_of(config.scheduler))
        else:
            client = stack.enter_context(Client(stack.enter_context(_started(config)), set_as_default=False))
        telemetry.say(f"cluster: {client.scheduler.address}{_dashboard(client)}")
        _wait_for_a_worker(client, telemetry)
        yield client


def _client_of(address: str) -> Client:
    if address.startswith("tls://") and Security().get_connection_args("client").get("ssl_context") is None:
        raise ClusterSetupError(
            f"{address} takes TLS only, and this process has no certificate for it; set "
            "DASK_DISTRIBUTED__COMM__TLS__CA_FILE, ..._CLIENT__CERT and ..._CLIENT__KEY (docs/security.md)"
        )
    try:
        return Client(address, timeout=_CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError, TimeoutError) as error:
        reason = str(error).strip().splitlines()
        raise ClusterError(
            f"there is no Dask scheduler at {address} ({reason[0] if reason else type(error).__name__}); start one "
            "with `dask scheduler --host 127.0.0.1`, and workers with `actpipe worker ADDRESS`"
        ) from error


@contextmanager
def _started(config: EngineConfig) -> Iterator[Any]:
    """Start a cluster of the kind that is asked for."""
    if config.slurm is not None:
        with jobs_of_slurm(config, config.slurm) as cluster:
            yield cluster
    elif config.kubernetes is not None:
        with pods_of_kubernetes(config, config.kubernetes) as cluster:
            yield cluster
    else:
        with tempfile.TemporaryDirectory(prefix="actpipe-") as scratch, _local(config, scratch) as cluster:
            yield cluster


def _local(config: EngineConfig, scratch: str) -> Any:
    """Start worker processes on this machine, on loopback and encrypted: others on it must not send them tasks."""
    devices = _cuda_devices()
    per_worker = config.devices_per_worker
    n_workers = config.workers or (max(1, len(devices) // per_worker) if devices else _n_cores())
    threads = str(config.threads or max(1, _n_cores() // n_workers))
    environment = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), threads)
    cluster = LocalCluster(
        n_workers=0,
        threads_per_worker=TASKS,
        processes=True,
        host="127.0.0.1",
        security=Security.temporary(),
        dashboard_address=f"127.0.0.1:{config.dashboard_port}" if config.dashboard_port is not None else None,
        worker_dashboard_address=None,
        memory_limit=config.memory or 0,
        local_directory=scratch,
        silence_logs=logging.CRITICAL,
        env=environment,
        preload=[_NOT_FOR_WORKERS],
        resources={RESOURCE: 1},
    )
    for number in range(n_workers):
        mine = devices[number * per_worker % len(devices) :][:per_worker] if devices else []
        spec = cluster.new_worker_spec()
        ((name, worker),) = spec.items()
        if mine:
            worker["options"] = {
                **worker["options"],
                "env": {**environment, "CUDA_VISIBLE_DEVICES": ",".join(mine)},
            }
        cluster.worker_spec[name] = worker
    cluster.sync(cluster._correct_state)
    return cluster


def _wait_for_a_worker(client: Client, telemetry: Telemetry) -> None:
    """Wait until there is someone to give parts to, and say so."""
    if not client.nthreads():
        telemetry.say("waiting for the first worker: `actpipe worker ADDRESS` starts one, here or on another host")
    while not client.nthreads():
        INTERRUPTION.raise_if_asked()
        with suppress(TimeoutError):
            client.wait_for_workers(1, timeout=1)


def _dashboard(client: Client) -> str:
    try:
        import bokeh  # noqa: F401
    except ImportError:
        return ""
    link = client.dashboard_link
    return f", dashboard at {link}" if link else ""


def _cuda_devices() -> list[str]:
    """Return the CUDA devices that this process may use, as `CUDA_VISIBLE_DEVICES` names them."""
    import torch

    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return [name for name in visible.split(",") if name]
    return [str(number) for number in range(torch.cuda.device_count())]


def _n_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

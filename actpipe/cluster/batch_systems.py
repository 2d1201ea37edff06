"""Clusters whose workers a batch system starts: jobs of SLURM, pods of Kubernetes."""

from __future__ import annotations

import shlex
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distributed import Security
from distributed.core import Status
from tornado.ioloop import PeriodicCallback

from actpipe.cluster.site import TASKS
from actpipe.errors import ClusterError, ClusterSetupError
from actpipe.schemas.engine import EngineConfig, KubernetesConfig, SlurmConfig

_REPLACE_SECONDS = 20.0
"""Time between two looks for jobs that have ended."""
_GRACE_SECONDS = 120
"""Time that a worker has to finish the parts at hand before its job or pod is ended."""


@contextmanager
def jobs_of_slurm(config: EngineConfig, slurm: SlurmConfig) -> Iterator[Any]:
    """Start workers as jobs of SLURM, and others in place of those that end, through dask-jobqueue.

    Raises:
        ClusterSetupError: dask-jobqueue is missing.
        ClusterError: The first jobs cannot be submitted.
    """
    with certificate_in(slurm.shared_folder) as security, slurm_cluster(config, slurm, security) as cluster:
        for _ in range(config.workers or 1):
            cluster.worker_spec.update(cluster.new_worker_spec())
        try:
            cluster.sync(cluster._correct_state)
        except (OSError, RuntimeError) as error:
            _forget_refused(cluster)
            raise ClusterError(f"no job can be submitted with `sbatch`: {error}") from error

        async def submit_again() -> None:
            """Submit anew what has ended; what `sbatch` refuses now is submitted later."""
            try:
                await cluster._correct_state()
            except (OSError, RuntimeError):
                _forget_refused(cluster)

        again = PeriodicCallback(submit_again, _REPLACE_SECONDS * 1000)
        cluster.loop.add_callback(again.start)
        try:
            yield cluster
        finally:
            cluster.loop.add_callback(again.stop)


def _forget_refused(cluster: Any) -> None:
    """Take out the jobs that were not submitted: the cluster takes them for started, and does not close with them."""
    for name, job in [*cluster.workers.items()]:
        if job.job_id is None:
            job.status = Status.failed
            del cluster.workers[name]


@contextmanager
def certificate_in(folder: str) -> Iterator[Security]:
    """Write a new certificate where all nodes see it, for nobody else to read, and remove it in the end.

    Raises:
        ClusterSetupError: The folder cannot be written to.
    """
    made = Security.temporary()
    try:
        private = tempfile.TemporaryDirectory(prefix=".actpipe-", dir=Path(folder).expanduser())
    except OSError as error:
        raise ClusterSetupError(
            f"engine.slurm.shared_folder: the certificate cannot be written there: {error}"
        ) from error
    with private:
        certificate, key = Path(private.name, "certificate.pem"), Path(private.name, "key.pem")
        certificate.write_text(made.tls_ca_file)
        key.write_text(made.tls_worker_key)
        files = {f"tls_{role}_cert": str(certificate) for role in ("client", "scheduler", "worker")}
        files |= {f"tls_{role}_key": str(key) for role in ("client", "scheduler", "worker")}
        yield Security(tls_ca_file=str(certificate), require_encryption=True, **files)


def slurm_cluster(config: EngineConfig, slurm: SlurmConfig, security: Security) -> Any:
    """Return a dask-jobqueue cluster that has no jobs yet; `job_script()` of it is what they will be.

    Raises:
        ClusterSetupError: dask-jobqueue is missing.
        ClusterError: The interface is not there.
    """
    try:
        from dask_jobqueue import SLURMCluster
    except ImportError as error:
        raise ClusterSetupError("engine.slurm needs `pip install 'actpipe[slurm]'` (dask-jobqueue)") from error
    devices = [f"--gres=gpu:{slurm.gpus}"] if slurm.gpus else []
    port = config.dashboard_port
    try:
        return SLURMCluster(
            queue=slurm.queue,
            account=slurm.account,
            walltime=slurm.walltime,
            cores=TASKS,
            processes=1,
            job_cpu=slurm.cpus,
            memory=slurm.memory,
            # SLURM signals the batch shell, which `exec` has made the worker. A job that has failed is submitted
            # anew from here, so SLURM must not do so as well.
            job_extra_directives=[*devices, "--no-requeue", f"--signal=B:TERM@{_GRACE_SECONDS}"],
            python=f"exec {shlex.quote(sys.executable)}",
            worker_command="actpipe.cluster.job_worker",
            protocol="tls://",
            security=security,
            interface=slurm.interface,
            scheduler_options={
                "dashboard": port is not None,
                "dashboard_address": f"127.0.0.1:{port or 0}",
            },
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ClusterError(f"a scheduler for workers of SLURM cannot be started: {error}") from error


@contextmanager
def pods_of_kubernetes(config: EngineConfig, kubernetes: KubernetesConfig) -> Iterator[Any]:
    """Start workers as pods, through dask-kubernetes and its operator.

    Raises:
        ClusterSetupError: dask-kubernetes is missing.
        ClusterError: There is no Kubernetes that lets this user in.
    """
    try:
        from dask_kubernetes.operator import KubeCluster
    except ImportError as error:
        raise ClusterSetupError(
            "engine.kubernetes needs `pip install 'actpipe[kubernetes]'` (dask-kubernetes)"
        ) from error
    spec = kubernetes_spec(kubernetes, config.workers or 1)
    try:
        pods = KubeCluster(custom_cluster_spec=spec, namespace=kubernetes.namespace, quiet=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise ClusterError(f"no pods can be started in Kubernetes: {error}; see docs/cluster.md") from error
    with pods as cluster:
        yield cluster


def kubernetes_spec(config: KubernetesConfig, n_workers: int) -> dict[str, Any]:
    """Describe the scheduler and the workers as the operator's `DaskCluster`.

    dask-kubernetes' own description asks for the workers' devices for the scheduler as well, and starts it as
    `dask-scheduler`, which distributed no longer installs.
    """
    memory = config.memory.replace(" ", "").removesuffix("B").replace("ki", "Ki")
    limits = {"cpu": str(config.cpus), "memory": memory}
    if config.gpus:
        limits["nvidia.com/gpu"] = str(config.gpus)
    names = {"dask.org/cluster-name": config.name, "dask.org/component": "scheduler"}
    ports = {"tcp-comm": 8786, "http-dashboard": 8787}
    health = {"httpGet": {"port": "http-dashboard", "path": "/health"}}
    scheduler = {
        "name": "scheduler",
        "image": config.image,
        "args": ["dask", "scheduler", "--host", "0.0.0.0"],
        "ports": [{"name": name, "containerPort": port, "protocol": "TCP"} for name, port in ports.items()],
        "readinessProbe": {**health, "periodSeconds": 1, "timeoutSeconds": 300},
        "livenessProbe": {**health, "initialDelaySeconds": 15, "periodSeconds": 20},
    }
    service = {
        "type": "ClusterIP",
        "selector": names,
        "ports": [{"name": name, "protocol": "TCP", "port": port, "targetPort": name} for name, port in ports.items()],
    }
    worker = {
        "name": "worker",
        "image": config.image,
        "args": ["actpipe", "worker", "$(DASK_SCHEDULER_ADDRESS)", "--name", "$(DASK_WORKER_NAME)"],
        "resources": {"requests": limits, "limits": limits},
    }
    return {
        "apiVersion": "kubernetes.dask.org/v1",
        "kind": "DaskCluster",
        "metadata": {"name": config.name},
        "spec": {
            "idleTimeout": 0,
            "scheduler": {"spec": {"containers": [scheduler]}, "service": service},
            "worker": {
                "replicas": n_workers,
                "spec": {"containers": [worker], "terminationGracePeriodSeconds": _GRACE_SECONDS},
            },
        },
    }

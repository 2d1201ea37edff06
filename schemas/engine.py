"""Who does the parts of a run: one process, or the workers of a Dask cluster. No setting changes a stored byte."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from actpipe.schemas.base import Contract
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

Address = Annotated[str, Field(pattern=r"^(tcp|tls|ucx|ws|wss)://\S+$")]
Memory = Annotated[str, Field(pattern=r"^\d+(\.\d+)? ?[kMGT]i?B$")]
Label = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/:@-]*$", max_length=253)]
"""What a cluster's own names look like; nothing that a shell would read as more than one word."""


class SlurmConfig(Contract):
    """Workers as jobs of SLURM, through dask-jobqueue."""

    queue: Label | None = None
    """Partition."""
    account: Label | None = None
    """Account that is charged."""
    walltime: Annotated[str, Field(pattern=r"^(\d+-)?\d{1,2}:\d{2}(:\d{2})?$")] = "04:00:00"
    """How long a job may run; its worker ends in order before, and another job takes its place."""
    cpus: PositiveInt = 8
    """Cores of a job."""
    memory: Memory = "64GB"
    """Memory of a job."""
    gpus: NonNegativeInt = 1
    """Devices of a job."""
    interface: Label | None = None
    """Network interface between the nodes, such as `ib0`."""
    shared_folder: Annotated[str, Field(pattern=r"^[~/][A-Za-z0-9._/-]*$")] = "~"
    """Folder that all nodes see under this path: the run's certificate lies there, for you alone to read, while it is
    at work."""


class KubernetesConfig(Contract):
    """Workers as pods, through dask-kubernetes and its operator."""

    image: Label
    """Container image with actpipe in it."""
    name: Annotated[str, Field(pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$", max_length=40)] = "actpipe"
    """Name of the cluster: small letters, digits and hyphens. One that is there already is used as it is."""
    namespace: Label = "default"
    """Namespace of its pods."""
    cpus: PositiveInt = 8
    """Cores of a pod."""
    memory: Memory = "64GB"
    """Memory of a pod."""
    gpus: NonNegativeInt = 1
    """Devices of a pod."""


class EngineConfig(Contract):
    """Who does the parts. `engine: dask` alone starts workers on this machine."""

    kind: Literal["process", "dask"] = "process"
    """`process`: this one, one part after another. `dask`: the workers of a Dask cluster."""
    scheduler: Address | None = None
    """Address of a Dask scheduler that is there already; without it a cluster is started for this run."""
    workers: PositiveInt | None = None
    """Workers to start; by default one for each device (or `devices_per_worker` of them), or one for each core."""
    devices_per_worker: PositiveInt = 1
    """Devices over which each worker spreads its replica of the model, by `model.device_map`."""
    threads: PositiveInt | None = None
    """Threads that each worker started here computes with; by default the cores shared out evenly."""
    memory: Memory | None = None
    """Memory at which a worker started here is ended and its part done elsewhere; by default no such bound."""
    dashboard_port: NonNegativeInt | None = 0
    """Port of Dask's dashboard, on loopback; 0 takes a free one. It needs `bokeh`."""
    slurm: SlurmConfig | None = None
    """Start the workers as jobs of SLURM."""
    kubernetes: KubernetesConfig | None = None
    """Start the workers as pods of Kubernetes."""
    retries: NonNegativeInt = 3
    """How often a part is tried again, on another worker where there is one, before the run ends with its error."""
    slow_factor: Annotated[float, Field(ge=1.5)] = 3.0
    """A part that takes so many times the median is started again elsewhere; the first to commit counts."""
    slow_seconds: Annotated[float, Field(gt=0)] = 60.0
    """But not before so many seconds; and a worker that hangs so long after that is restarted."""

    @model_validator(mode="after")
    def _one_cluster(self) -> Self:
        given = [name for name in ("scheduler", "slurm", "kubernetes") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other")
        if given and self.kind != "dask":
            raise ValueError(f"`{given[0]}` needs `kind: dask`")
        return self

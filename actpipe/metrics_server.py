"""Serve the numbers of a run to Prometheus."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from actpipe import __version__
from actpipe.errors import MetricsError
from actpipe.metrics import KNOWN, Metrics, Sample

if TYPE_CHECKING:
    from prometheus_client.core import Metric

PREFIX = "actpipe_"


class _Collector:
    """Hands over what is measured, as Prometheus' library asks for it."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        """Yield one family per name."""
        from prometheus_client.core import Metric

        families: dict[str, Metric] = {}
        for sample in self._metrics.samples():
            family = families.get(sample.name)
            if family is None:
                family = Metric(PREFIX + sample.name, _help(sample), sample.kind)
                families[sample.name] = family
            ending = "_total" if sample.kind == "counter" else ""
            family.add_sample(family.name + ending, dict(sample.labels), sample.value)
        yield from families.values()


def _help(sample: Sample) -> str:
    return KNOWN[sample.name][1] if sample.name in KNOWN else "Counted by a stage."


@contextmanager
def serving(metrics: Metrics, host: str, port: int) -> Iterator[str]:
    """Serve metrics over HTTP within; gives the address.

    Args:
        metrics: What is served.
        host: Address to listen on; 127.0.0.1 lets only this machine in.
        port: TCP port; 0 takes one that is free.

    Raises:
        MetricsError: The library is missing, or the port is not to be had.
    """
    try:
        from prometheus_client import CollectorRegistry, start_http_server
    except ImportError as error:
        raise MetricsError("--metrics-port needs `pip install 'actpipe[metrics]'`") from error
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(metrics))
    metrics.gauge("build_info", 1, version=__version__, python=platform.python_version())
    try:
        server, thread = start_http_server(port, addr=host, registry=registry)
    except (OSError, OverflowError) as error:
        raise MetricsError(
            f"cannot serve metrics on {host}:{port} ({error}); choose another --metrics-port or --metrics-host"
        ) from error
    try:
        yield f"http://{host}:{server.server_port}/metrics"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

"""Graphs over the blocks of a store, computed by the workers of a cluster."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from distributed import Client, get_worker


@dataclass(frozen=True)
class _Counted:
    """A function that tells a topic after each call."""

    function: Callable[[Any], Any]
    topic: str

    def __call__(self, block: Any) -> Any:
        answer = self.function(block)
        get_worker().log_event(self.topic, 1)
        return answer


class OnWorkers:
    """Computes graphs by the workers of a cluster.

    Args:
        client: Gives the cluster, which is started when the first graph is there.
        retries: How often a block is tried again.
    """

    def __init__(self, client: Callable[[], Client], retries: int) -> None:
        self._client = client
        self._retries = retries

    @contextmanager
    def counted(
        self, function: Callable[[Any], Any], blocks: list[Any], done: Callable[[int], None]
    ) -> Iterator[Callable[[Any], Any]]:
        """Give the function for use on these blocks within, telling `done` after each call, wherever it is made."""
        del blocks
        topic = f"blocks-{uuid.uuid4().hex[:12]}"
        client = self._client()
        client.subscribe_topic(topic, lambda event: done(event[1]))
        try:
            yield _Counted(function, topic)
        finally:
            client.unsubscribe_topic(topic)

    def compute(self, graph: Any) -> Any:
        """Return what a graph of delayed calls gives."""
        return self._client().compute(graph, retries=self._retries).result()

"""Items that a worker sits on, or loses, are given out again."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from actpipe.schemas.engine import EngineConfig

from actpipe.cluster.engine import DaskEngine
from actpipe.errors import ClusterError, DatasetError

CLIENT = SimpleNamespace(status="running")


class Item:
    """Stands for a future that ends as it is told; remembers how long it was waited for."""

    def __init__(self, outcome):
        self.outcome, self.is_cancelled = outcome, False

    def result(self, timeout):
        self.timeout = timeout
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome

    def cancel(self):
        self.is_cancelled = True


def result_of(*outcomes, client=CLIENT, retries=2):
    items = [Item(outcome) for outcome in outcomes]
    coming = iter(items[1:])
    engine = DaskEngine(EngineConfig(kind="dask", retries=retries, slow_seconds=60))
    try:
        return engine._result(client, lambda: next(coming), items[0]), items
    except Exception as error:  # noqa: BLE001 - what comes out is what is looked at
        return error, items


def test_an_item_that_a_worker_sits_on_for_long_is_given_out_again():
    found, (first, second) = result_of(TimeoutError(), "tokens")
    assert found == "tokens"
    assert first.is_cancelled
    assert first.timeout == second.timeout == 60


def test_the_last_try_may_take_as_long_as_it_wants():
    found, items = result_of(TimeoutError(), OSError("lost"), "tokens")
    assert found == "tokens"
    assert [item.timeout for item in items] == [60, 60, None]


def test_an_item_that_fails_again_and_again_is_an_error_that_says_why():
    found, _ = result_of(*[OSError("the disk is away")] * 3)
    assert isinstance(found, ClusterError)
    assert "failed 3 times, at last with OSError: the disk is away" in str(found)


def test_what_would_fail_again_is_not_tried_again():
    found, (first,) = result_of(DatasetError("line 3 is no JSON"))
    assert isinstance(found, DatasetError)
    assert not first.is_cancelled


def test_a_scheduler_that_is_gone_is_said():
    found, _ = result_of(OSError("closed"), client=SimpleNamespace(status="closed"))
    assert isinstance(found, ClusterError)
    assert "the scheduler of the cluster is gone" in str(found)


@pytest.mark.parametrize("retries", [0, 1])
def test_as_many_tries_as_are_allowed(retries):
    found, items = result_of(*[OSError("away")] * (retries + 1), retries=retries)
    assert isinstance(found, ClusterError)
    assert all(hasattr(item, "timeout") for item in items)

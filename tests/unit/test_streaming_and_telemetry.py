"""Hand-over between threads, and what a run says while it works."""

from __future__ import annotations

import io
import json
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from actpipe.streaming import BackgroundWorker
from actpipe.telemetry import Telemetry


def put_all(items, function, budget):
    """Hand over items that cost one each."""
    with BackgroundWorker(function, budget) as worker:
        for item in items:
            worker.put(item, 1)


@given(st.lists(st.integers(0, 9), max_size=30), st.integers(1, 12))
def test_every_item_is_worked_on_once_in_order(items, budget):
    seen = []
    with BackgroundWorker(seen.append, budget) as worker:
        for item in items:
            worker.put(item, item)

    assert seen == items


def test_the_producer_waits_while_too_much_is_under_way():
    release, started, waiting = threading.Event(), threading.Event(), threading.Event()
    most = 0
    under_way = 0

    def work(_):
        nonlocal under_way
        started.set()
        release.wait(10)
        under_way -= 1

    def produce(worker):
        nonlocal under_way, most
        for number in range(6):
            if number == 3:
                waiting.set()
            worker.put(number, 1)
            under_way += 1
            most = max(most, under_way)

    with BackgroundWorker(work, budget=3) as worker:
        producer = threading.Thread(target=produce, args=(worker,))
        producer.start()
        assert started.wait(10)
        assert waiting.wait(10)
        producer.join(0.05)
        assert producer.is_alive()
        release.set()
        producer.join(10)
    assert most <= 4


def test_the_producer_can_wait_for_what_the_thread_brings_about():
    done = []
    with BackgroundWorker(done.append, budget=10) as worker:
        for item in range(5):
            worker.put(item, 0)
        worker.wait_until(lambda: len(done) == 5)
        assert done == list(range(5))


def test_waiting_ends_with_the_error_of_the_thread():
    def fail(_):
        raise OSError("disk full")

    def produce():
        with BackgroundWorker(fail, budget=10) as worker:
            worker.put(0, 0)
            worker.wait_until(lambda: False)

    with pytest.raises(OSError, match="disk full"):
        produce()


def test_an_error_in_the_thread_reaches_the_producer():
    def fail(item):
        raise OSError(f"disk full at {item}")

    with pytest.raises(OSError, match="disk full at 0"):
        put_all(range(1000), fail, budget=2)


def test_an_error_in_the_last_item_is_not_lost():
    def fail(item):
        if item == 2:
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        put_all(range(3), fail, budget=10)


def test_an_error_of_the_producer_drops_what_still_waits():
    seen = []
    release = threading.Event()

    def work(item):
        release.wait(10)
        seen.append(item)

    def produce():
        with BackgroundWorker(work, budget=100) as worker:
            for item in range(50):
                worker.put(item, 1)
            threading.Timer(0.05, release.set).start()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        produce()
    assert len(seen) <= 1


def test_without_a_terminal_progress_is_plain_lines(tmp_path):
    text = io.StringIO()
    telemetry = Telemetry(Console(file=text, force_terminal=False, width=200), tmp_path / "log.jsonl")
    with telemetry.progress("extract main", 1000, "tokens") as meter:
        meter.advance(1000, 5_000_000)

    line = text.getvalue()
    assert line.startswith("extract main: 100% 1,000/1,000 tokens, ")
    assert "tokens/s, 5 MB" in line
    assert "\x1b" not in line
    (event,) = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    assert (event["event"], event["what"], event["done"], event["n_bytes"]) == (
        "work finished",
        "extract main",
        1000,
        5_000_000,
    )


def test_on_a_terminal_progress_is_a_bar():
    text = io.StringIO()
    telemetry = Telemetry(Console(file=text, force_terminal=True, width=120))
    with telemetry.progress("extract main", 1000, "tokens") as meter:
        meter.advance(250)
        meter.advance(750)

    assert "1,000 tokens" in text.getvalue()
    assert "━" in text.getvalue()

"""What Prometheus sees of a run."""

from __future__ import annotations

import socket
import threading
import urllib.error
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from actpipe.errors import MetricsError
from actpipe.metrics import Metrics, counter_of, sample_of
from actpipe.metrics_server import serving
from actpipe.streaming import BackgroundWorker
from actpipe.telemetry import Telemetry


def scrape(address: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Return every sample by name and labels."""
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(address, timeout=30) as answer:
        text = answer.read().decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


EXTRACT = (("corpus", "main"), ("stage", "extract_activations"))


def test_work_is_counted_by_stage_and_corpus_and_its_share_is_shown(tmp_path):
    telemetry = Telemetry(Console(quiet=True))
    with serving(telemetry.metrics, "127.0.0.1", 0) as address:
        with telemetry.attempt(tmp_path / "log.jsonl", "runs/one"), telemetry.stage("extract_activations", "main"):
            with telemetry.progress("extract main", 200, "tokens") as meter:
                meter.advance(50, 1000)
                telemetry.count("retries", 1)
                telemetry.gauge("workers", 4)
                telemetry.gauge("parts_in_flight", 3)
                at_work = scrape(address)
                meter.advance(150)
        after = scrape(address)

    assert at_work["actpipe_tokens_total", EXTRACT] == 50
    assert at_work["actpipe_bytes_total", EXTRACT] == 1000
    assert at_work["actpipe_progress_ratio", (*EXTRACT, ("work", "extract main"))] == 0.25
    assert at_work["actpipe_stage_seconds", EXTRACT] > 0
    assert at_work["actpipe_retries_total", ()] == 1
    assert (at_work["actpipe_workers", ()], at_work["actpipe_parts_in_flight", ()]) == (4, 3)
    assert after["actpipe_tokens_total", EXTRACT] == 200
    assert not any(name == "actpipe_progress_ratio" for name, _ in after)
    assert any(name == "actpipe_build_info" for name, _ in after)


def test_it_listens_on_the_address_it_was_given_and_no_longer_than_the_run():
    with serving(Metrics(), "127.0.0.1", 0) as address:
        port = int(address.split(":")[2].split("/")[0])
        with socket.create_connection(("127.0.0.1", port), timeout=10):
            pass
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.2", port), timeout=10)
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", port), timeout=10)


def test_a_port_that_is_taken_is_said_so():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(MetricsError, match=f"cannot serve metrics on 127.0.0.1:{port}.*choose another"):
            with serving(Metrics(), "127.0.0.1", port):
                pytest.fail("two on one port")


def test_what_waits_to_be_written_is_seen():
    telemetry, release, started = Telemetry(Console(quiet=True)), threading.Event(), threading.Event()

    def work(_):
        started.set()
        release.wait(30)

    with BackgroundWorker(work, budget=1000) as worker:
        worker.put("a", 300)
        assert started.wait(30)
        worker.put("b", 400)
        found = {sample.name: sample.value for sample in telemetry.metrics.samples()}
        release.set()
    assert (found["queue_items"], found["queue_bytes"]) == (1, 700)


def test_counters_only_grow_and_no_name_is_both():
    metrics = Metrics()
    metrics.count("tokens", 5)
    with pytest.raises(ValueError, match="cannot fall"):
        metrics.count("tokens", -1)
    with pytest.raises(ValueError, match="'workers' is a gauge, not a counter"):
        metrics.count("workers")
    with pytest.raises(ValueError, match="no name of a metric"):
        metrics.gauge("per cent", 1)
    assert metrics.total("tokens") == 5
    assert metrics.total("documents") is None


def test_counting_from_several_threads_loses_nothing():
    telemetry = Telemetry(Console(quiet=True))
    with telemetry.progress("extract main", None, "tokens") as meter:
        threads = [threading.Thread(target=lambda: [meter.advance(1, 2) for _ in range(5000)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert (meter.done, meter.n_bytes) == (20_000, 40_000)
    found = {sample.name: sample.value for sample in telemetry.metrics.samples()}
    assert (found["tokens"], found["bytes"]) == (20_000, 40_000)


def test_what_several_pieces_of_work_count_adds_up_and_never_falls():
    telemetry, seen = Telemetry(Console(quiet=True)), []

    def look():
        seen.extend(sample.value for sample in telemetry.metrics.samples() if sample.name == "tokens")

    with telemetry.stage("extract_activations", "main"):
        for amount in (5, 0, 7):
            with telemetry.progress("extract main", 10, "tokens") as meter:
                look()
                meter.advance(amount)
                look()
            look()
    telemetry.count("tokens", 100, stage="extract_activations", corpus="main")
    look()
    assert seen == [0, 5, 5, 5, 5, 5, 5, 12, 12, 112]


def test_a_source_in_trouble_leaves_the_rest_as_it_is():
    metrics = Metrics()
    metrics.count("tokens", 5)

    def away():
        yield sample_of("parts", 1)
        raise OSError("the file system is away")

    metrics.add_source(away)
    assert "tokens" in {sample.name for sample in metrics.samples()}


@pytest.mark.parametrize(
    ("unit", "name"),
    [("tokens", "tokens"), ("prompt tokens", "prompt_tokens"), ("B", "bytes"), ("workers", "units"), ("%", "units")],
)
def test_units_become_names(unit, name):
    assert counter_of(unit) == name

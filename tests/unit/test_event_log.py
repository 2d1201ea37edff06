"""The log of a run: whole lines, whatever happens to disk, clock and processes."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from actpipe import event_log
from actpipe import telemetry as telemetry_module
from actpipe.errors import StorageError
from actpipe.event_log import EventLog, read_events
from actpipe.telemetry import Telemetry


def spoken(log: Path | None = None) -> tuple[Telemetry, io.StringIO]:
    """Return a telemetry and what people see of it."""
    text = io.StringIO()
    return Telemetry(Console(file=text, width=500), log), text


def events(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_of_several_processes_stay_whole(tmp_path):
    path, n_processes, n_lines = tmp_path / "log.jsonl", 4, 300
    code = (
        "import sys, json; from pathlib import Path; from actpipe.event_log import EventLog\n"
        "log = EventLog(Path(sys.argv[1]))\n"
        f"for number in range({n_lines}):\n"
        "    log.append(json.dumps({'who': sys.argv[2], 'number': number, 'text': 'x' * (37 * number % 6000)}))\n"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code, path, str(who)]) for who in range(n_processes)]
    assert [process.wait() for process in processes] == [0] * n_processes

    found = events(path)
    for who in range(n_processes):
        assert [event["number"] for event in found if event["who"] == str(who)] == list(range(n_lines))


def test_a_line_that_another_process_is_writing_is_not_taken_for_cut_off(tmp_path, monkeypatch):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"event": "half')
    monkeypatch.setattr(event_log.time, "sleep", lambda _: path.write_bytes(b'{"event": "half"}\n'))
    EventLog(path).append('{"event": "next"}')

    assert path.read_bytes() == b'{"event": "half"}\n{"event": "next"}\n'


def test_a_line_that_was_cut_off_spoils_only_itself(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"event": "run started"}\n{"event": "prog')
    EventLog(path).append('{"event": "run finished"}')

    assert [event["event"] for event in read_events(path.read_bytes())] == ["run started", "run finished"]


def test_every_line_says_where_and_of_which_attempt(tmp_path):
    telemetry, _ = spoken()
    with telemetry.attempt(tmp_path / "log.jsonl", "runs/one"):
        telemetry.say("hello")
        with telemetry.stage("extract_activations", "main"), telemetry.progress("extract main", 10, "tokens") as meter:
            meter.advance(10, 40)
        telemetry.event("retry", kind="worker lost", part=7)

    found = events(tmp_path / "log.jsonl")
    assert [event["event"] for event in found] == [
        "run started",
        "note",
        "stage started",
        "work finished",
        "stage finished",
        "retry",
        "run finished",
    ]
    assert {(event["run"], event["attempt"], event["host"], event["pid"]) for event in found} == {
        (found[0]["run"], found[0]["attempt"], found[0]["host"], found[0]["pid"])
    }
    assert found[1]["text"] == "hello"
    assert (found[3]["stage"], found[3]["corpus"], found[3]["done"], found[3]["n_bytes"]) == (
        "extract_activations",
        "main",
        10,
        40,
    )
    assert "stage" not in found[5]


@pytest.mark.parametrize(
    ("error", "event", "expected"),
    [
        (StorageError("disk full"), "run failed", {"error": "StorageError", "message": "disk full", "exit_code": 75}),
        (ValueError("a bug"), "run failed", {"error": "ValueError", "message": "a bug", "exit_code": 1}),
        (KeyboardInterrupt(), "run stopped", {"exit_code": 130}),
        (SystemExit(143), "run stopped", {"exit_code": 143}),
    ],
)
def test_the_last_line_says_why_it_ended_and_in_which_stage(tmp_path, error, event, expected):
    telemetry, _ = spoken()
    with pytest.raises(type(error)), telemetry.attempt(tmp_path / "log.jsonl", "runs/one"):
        with telemetry.stage("score_heads", "repeated"):
            raise error

    last = events(tmp_path / "log.jsonl")[-1]
    assert last | expected == last
    assert (last["event"], last["stage"], last["corpus"]) == (event, "score_heads", "repeated")
    assert ("traceback" in last) == isinstance(error, ValueError)


def test_progress_is_logged_now_and_then_also_while_nothing_advances(tmp_path, monkeypatch):
    monkeypatch.setattr(telemetry_module, "REPORT_SECONDS", 0.001)
    telemetry, path = Telemetry(Console(quiet=True), tmp_path / "log.jsonl"), tmp_path / "log.jsonl"
    telemetry.gauge("workers", 3)
    telemetry.count("retries", 2)
    with telemetry.progress("extract main", 100, "tokens") as meter:
        meter.advance(25, 1000)
        while not path.exists() or path.read_bytes().count(b"\n") < 3:
            pass

    found = [event for event in events(path) if event["event"] == "progress"]
    assert len(found) >= 3
    last = found[-1]
    assert (last["done"], last["total"], last["n_bytes"], last["workers"], last["retries"]) == (25, 100, 1000, 3, 2)


def test_a_log_that_cannot_be_written_is_said_once_and_the_run_goes_on(tmp_path):
    telemetry, text = spoken()
    with telemetry.attempt(Path("/dev/full"), "runs/one"):
        for number in range(5):
            telemetry.event("progress", done=number)

    assert text.getvalue().count("the log cannot be written") == 1
    assert "No space left on device" in text.getvalue()


def test_a_log_that_can_be_written_again_is_written_again(tmp_path):
    folder = tmp_path / "away"
    log = EventLog(folder / "log.jsonl")
    assert isinstance(log.append('{"number": 0}'), OSError)
    folder.mkdir()

    assert log.append('{"number": 1}') is None
    assert log.n_lost == 1
    assert [event["number"] for event in read_events(log.path.read_bytes())] == [1]


@pytest.mark.parametrize("jump", [-86_400.0, 86_400.0, -1.8e9])
def test_setting_the_clock_changes_no_duration_and_no_rate(tmp_path, monkeypatch, jump):
    right, jumped = time.time, 0.0
    monkeypatch.setattr(time, "time", lambda: right() + jumped)
    telemetry, _ = spoken()
    began = time.monotonic()
    with telemetry.attempt(tmp_path / "log.jsonl", "runs/one"), telemetry.stage("extract_activations", "main"):
        with telemetry.progress("extract main", 100, "tokens") as meter:
            meter.advance(50)
            jumped = jump
            meter.advance(50)
            line = meter.line()
    took = time.monotonic() - began

    found = events(tmp_path / "log.jsonl")
    elapsed = [event["elapsed"] for event in found]
    assert elapsed == sorted(elapsed)
    assert all(0 <= event.get("seconds", 0.0) <= took + 0.001 for event in found)
    assert next(event for event in found if event["event"] == "work finished")["rate"] >= 100 / (took + 0.001)
    assert "0 s left" in line
    assert abs(found[-1]["time"] - found[0]["time"] - jump) <= took + 0.01


def test_as_lines_for_machines_nothing_else_is_said():
    stream, text = io.StringIO(), io.StringIO()
    telemetry = Telemetry(Console(file=text), lines=stream)
    telemetry.say("hello")
    with telemetry.progress("extract main", 10, "tokens") as meter:
        meter.advance(10)

    assert text.getvalue() == ""
    assert [json.loads(line)["event"] for line in stream.getvalue().splitlines()] == ["note", "work finished"]

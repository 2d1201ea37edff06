"""A run that others watch: its status, its metrics, its log for machines, and what it exits with."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from ruamel.yaml import YAML
from support import SPEECHES, all_bytes, make_recipe, run

from actpipe.errors import DatasetError, IncompleteStoreError
from actpipe.event_log import read_events
from actpipe.status import describe_status, follow_run, read_status
from actpipe.stores.layout import RunFolder
from actpipe.stores.locking import only_run_in

N_PARTS = 80


@pytest.fixture
def recipe(tmp_path) -> Path:
    """80 parts, so that there is always one to be watched in."""
    settings = make_recipe(SPEECHES, rows_per_part=256, batch_tokens=256, metrics=["loss"])
    settings["stages"][0] |= {"max_tokens": 256 * N_PARTS, "context_length": 64}
    settings["stages"].append({"stage": "summarize_metrics"})
    path = tmp_path / "recipe.yaml"
    with path.open("w") as file:
        YAML().dump(settings, file)
    return path


def start(recipe: Path, out: Path, *options: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "actpipe", "run", str(recipe), "--out", str(out), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True)


def n_commits(out: Path) -> int:
    return len(list((out / "commits").glob("part-*.json")))


def wait_for_commits(process: subprocess.Popen, out: Path, wanted: int) -> None:
    while n_commits(out) < wanted and process.poll() is None:
        time.sleep(0.01)


def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    whole = [sys.executable, "-m", "actpipe", *map(str, arguments)]
    return subprocess.run(whole, capture_output=True, text=True, env=environment, timeout=200)


def scrape(address: str) -> dict[str, float]:
    """Return every sample by name, for the corpus `main` or no corpus."""
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(address, timeout=30) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    return {
        sample.name + "".join(f" {value}" for key, value in sample.labels.items() if key == "stage"): sample.value
        for family in families
        for sample in family.samples
    }


@pytest.mark.slow
def test_killed_and_continued_it_is_seen_at_every_moment_and_not_disturbed(recipe, tmp_path):
    out = tmp_path / "run"
    process = start(recipe, out)
    wait_for_commits(process, out, 5)
    found = read_status(out)
    process.kill()
    process.communicate()
    assert (found.state, found.exit_code, found.pid) == ("at work", 0, process.pid)
    assert [(stage.stage, stage.state) for stage in found.stages] == [
        ("tokenize_text", "done"),
        ("extract_activations", "at work"),
        ("summarize_metrics", "to do"),
    ]
    (corpus,) = found.corpora
    assert corpus.n_tokens == 256 * N_PARTS
    assert 5 <= corpus.parts_done < corpus.parts_total == N_PARTS
    assert corpus.tokens_done == 256 * corpus.parts_done

    killed, before = read_status(out), all_bytes(out)
    assert (killed.state, killed.exit_code) == ("killed", 3)
    assert killed.corpora[0].parts_done == n_commits(out)
    (summary, _) = describe_status(killed)
    assert f"actpipe run RECIPE --out {out}" in summary.note
    assert all_bytes(out) == before

    process = start(recipe, out)
    wait_for_commits(process, out, n_commits(out) + 1)
    seen = list(follow_run(out, every=0.2))
    process.communicate()
    assert process.returncode == 0
    assert {status.state for status in seen[:-1]} == {"at work"}
    assert (seen[-1].state, seen[-1].attempts, seen[-1].corpora[0].parts_done) == ("finished", 2, N_PARTS)
    assert {stage.state for stage in seen[-1].stages} == {"done"}


def test_metrics_are_served_on_loopback_while_it_works_and_stderr_is_json(recipe, tmp_path):
    out = tmp_path / "run"
    process = start(recipe, out, "--metrics-port", "0", "--log-format", "json")
    address = re.search(r"http://127\.0\.0\.1:\d+/metrics", process.stderr.readline())[0]
    wait_for_commits(process, out, 5)
    found = scrape(address)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=100)

    assert process.returncode == 143
    assert 5 <= found["actpipe_parts_total"] <= found["actpipe_parts_planned"] == N_PARTS
    assert found["actpipe_tokens_total extract_activations"] >= 256 * 4
    assert found["actpipe_bytes_total extract_activations"] > 0
    assert found["actpipe_documents_total tokenize_text"] > 0
    assert 0 < found["actpipe_progress_ratio extract_activations"] < 1
    assert found["actpipe_workers"] == 1
    said, logged = map(json.loads, errors.splitlines()), (out / "log.jsonl").read_bytes()
    names = [event["event"] for event in said]
    assert names[:2] == ["run started", "stage started"]
    assert names[-2:] == ["run stopped", "note"]
    assert [event["event"] for event in read_events(logged)] == names[:-1]
    result = command("status", out, "--json")
    assert result.returncode == 3
    status = json.loads(result.stdout)
    assert (status["state"], status["exit_code_of_run"], status["exit_code"]) == ("stopped", 143, 3)


def test_a_run_that_failed_says_why_and_one_that_finished_says_so(corpus, tmp_path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text(corpus.read_text() * 1000 + "{not json\n")
    with pytest.raises(DatasetError):
        run(make_recipe(broken), tmp_path / "run")
    failed = read_status(tmp_path / "run")
    run(make_recipe(corpus), tmp_path / "other")

    assert (failed.state, failed.exit_code, failed.exit_code_of_run) == ("failed", 3, 1)
    assert "DatasetError: " in failed.reason
    assert "line 6001" in failed.reason
    assert "mend what it says" in describe_status(failed)[0].note
    assert (read_status(tmp_path / "other").state, read_status(tmp_path / "other").exit_code) == ("finished", 0)
    with pytest.raises(IncompleteStoreError, match=r"no run at .*/ran; did you mean '.*/run'"):
        read_status(tmp_path / "ran")


def test_without_a_log_the_records_tell(corpus, tmp_path):
    out = tmp_path / "run"
    run(make_recipe(corpus), out)
    (out / "log.jsonl").unlink()
    whole = read_status(out)
    (out / "commits/part-00000001.json").unlink()

    assert whole.state == "finished"
    assert (read_status(out).state, read_status(out).exit_code) == ("stopped", 3)


def test_a_log_that_cannot_be_written_stops_nothing(corpus, tmp_path):
    (tmp_path / "run" / "log.jsonl").mkdir(parents=True)
    (tmp_path / "run" / ".lock").touch()
    run(make_recipe(corpus), tmp_path / "run")

    assert read_status(tmp_path / "run").state == "finished"


def test_a_folder_in_use_is_exit_code_75_and_for_machines_one_line(recipe, tmp_path):
    with only_run_in(RunFolder(tmp_path / "run")):
        result = command("run", recipe, "--out", tmp_path / "run", "--log-format", "json")

    assert result.returncode == 75
    (line,) = map(json.loads, result.stderr.splitlines())
    assert (line["event"], line["error"], line["exit_code"]) == ("run failed", "RunInUseError", 75)

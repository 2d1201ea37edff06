"""Workers that were started beside a run: they come, leave in order, and give the bytes of one process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from support import INDUCTION, all_bytes, make_recipe
from test_resuming import n_commits, wait_for_commits, write_recipe

BIN = Path(sys.executable).parent
SINGLE = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def actpipe(*arguments: object) -> subprocess.Popen:
    command = [sys.executable, "-m", "actpipe", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=SINGLE, text=True)


@contextmanager
def scheduler(folder: Path):
    """Start a scheduler, and give its address."""
    file = folder / "scheduler.json"
    command = [BIN / "dask", "scheduler", "--host", "127.0.0.1", "--port", "0", "--scheduler-file", file]
    command += ["--no-dashboard"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=SINGLE)
    try:
        while not file.is_file() or not file.read_text().strip():
            assert process.poll() is None
            time.sleep(0.05)
        yield json.loads(file.read_text())["address"]
    finally:
        process.terminate()
        process.wait()


def recipe_of(corpus: Path) -> dict:
    recipe = make_recipe(
        corpus, hooks=["blocks.*.hook_resid_post", "blocks.*.attn.hook_pattern"], metrics=["loss"], batch_tokens=256
    )
    recipe["stages"][0] |= {"max_tokens": 20_480, "context_length": 64}
    recipe["stages"][1] |= {"rows_per_part": 256}
    recipe["stages"] += [
        {"stage": "summarize_metrics", "block_bytes": 100_000},
        {"stage": "score_heads", "block_bytes": 1_000_000},
        {"stage": "describe_residual", "block_bytes": 1_000_000},
    ]
    return recipe


@pytest.fixture(scope="module")
def by_one_process(tmp_path_factory):
    from support import SPEECHES

    folder = tmp_path_factory.mktemp("one")
    recipe = write_recipe(recipe_of(SPEECHES), folder / "recipe.yaml")
    process = actpipe("run", recipe, "--out", folder / "run")
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    return recipe, all_bytes(folder / "run")


@pytest.mark.slow
def test_a_worker_that_is_asked_to_end_finishes_its_parts_and_the_rest_goes_on_without_it(tmp_path, by_one_process):
    recipe, expected = by_one_process
    out = tmp_path / "run"
    with scheduler(tmp_path) as address:
        run = actpipe("run", recipe, "--out", out, "--scheduler", address)
        first = actpipe("worker", address, "--name", "first")
        wait_for_commits(run, out, 5)
        second = actpipe("worker", address, "--name", "second")
        wait_for_commits(run, out, 8)
        assert n_commits(out) < 80, "it is to leave in the middle"
        first.send_signal(signal.SIGTERM)
        said, _ = first.communicate(timeout=60)
        assert first.returncode == 0, said
        output, _ = run.communicate(timeout=200)
        second.send_signal(signal.SIGTERM)
        said, _ = second.communicate(timeout=60)

    assert run.returncode == 0, output
    assert second.returncode == 0, said
    assert all_bytes(out) == expected
    events = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [event for event in events if event["event"] == "retry"] == []


def test_no_scheduler_at_an_address_is_said_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(SINGLE, "DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT", "1s")
    worker = actpipe("worker", "tcp://127.0.0.1:1")
    output, _ = worker.communicate(timeout=60)

    assert worker.returncode == 75
    assert "there is no Dask scheduler at tcp://127.0.0.1:1" in output
    assert "Traceback" not in output


def test_an_address_that_is_none_is_refused_before_anything_runs(corpus, tmp_path):
    recipe = write_recipe(make_recipe(corpus, INDUCTION), tmp_path / "recipe.yaml")
    run = actpipe("run", recipe, "--out", tmp_path / "run", "--scheduler", "somewhere")
    output, _ = run.communicate(timeout=60)

    assert run.returncode == 1
    assert "engine.scheduler" in output
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_workers_find_the_size_of_batches_once_and_all_use_it(tmp_path, monkeypatch):
    from support import SPEECHES

    monkeypatch.setitem(SINGLE, "ACTPIPE_CACHE", str(tmp_path / "cache"))

    recipe = recipe_of(SPEECHES)
    recipe["stages"] = recipe["stages"][:2]
    recipe["stages"][0] |= {"max_tokens": 4096}
    recipe["stages"][1] |= {"batch_tokens": "auto"}
    by_workers = write_recipe({**recipe, "engine": {"kind": "dask", "workers": 2}}, tmp_path / "workers.yaml")
    run = actpipe("run", by_workers, "--out", tmp_path / "workers")
    output, _ = run.communicate(timeout=300)
    assert run.returncode == 0, output
    found = json.loads((tmp_path / "workers/commits/batch_tokens.json").read_text())["batch_tokens"]
    recipe["stages"][1] |= {"batch_tokens": found}
    run = actpipe("run", write_recipe(recipe, tmp_path / "one.yaml"), "--out", tmp_path / "one")
    output, _ = run.communicate(timeout=300)
    assert run.returncode == 0, output

    stores = [
        {path: data for path, data in all_bytes(tmp_path / name).items() if path.startswith("store.zarr/activations")}
        for name in ("workers", "one")
    ]
    assert stores[0] == stores[1]
    assert found % 64 == 0

"""On a cluster a run has the bytes of one process, whatever becomes of the workers."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from types import SimpleNamespace

import obstore
import pytest
from object_store import objects
from obstore.store import S3Store
from processes import (
    LOCAL,
    Faults,
    end_of,
    ended_at_last,
    finish,
    make_long_recipe,
    start,
    start_scheduler,
    start_worker,
    wait_for,
    wait_for_commits,
    workers_of,
    write_recipe,
)
from support import all_bytes, make_recipe, run

from actpipe.describing import verify_run
from actpipe.stores import claims
from actpipe.stores.layout import RunFolder
from actpipe.stores.verifying import find_problems

MORE_STAGES = [
    {
        "stage": "reduce_activations",
        "name": "sums",
        "hooks": ["blocks.*.hook_resid_post"],
        "statistics": ["mean", "variance"],
        "rows_per_part": 4096,
    },
    {
        "stage": "generate_text",
        "corpus": "told",
        "max_new_tokens": 2,
        "prompt_tokens_per_part": 8192,
        "batch_tokens": 4096,
    },
    {"stage": "extract_activations", "corpus": "told", "hooks": ["blocks.0.hook_resid_post"], "rows_per_part": 16384},
]


@pytest.fixture(scope="module")
def by_one_process(tmp_path_factory):
    """The files of a run by one process."""
    folder = tmp_path_factory.mktemp("by_one")
    finish(write_recipe(make_long_recipe(), folder / "recipe.yaml"), folder / "run")
    return all_bytes(folder / "run")


def events(out, kind):
    lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == kind]


@pytest.fixture
def faults(tmp_path):
    return Faults(tmp_path / "faults")


def begin(tmp_path, faults, **engine):
    """Start a run on a cluster; return it with its recipe and folder once its workers wait in the midst of it."""
    recipe, out = write_recipe(make_long_recipe(**(engine or LOCAL)), tmp_path / "recipe.yaml"), tmp_path / "run"
    faults.stop_at(5, out)
    process = start(recipe, out, **faults.environment)
    wait_for_commits(process, out, 5)
    return process, recipe, out


def test_two_workers_write_what_one_process_writes_in_every_stage(tmp_path):
    recipes = {name: make_long_recipe(16, **engine) for name, engine in {"one": {}, "two": LOCAL}.items()}
    for name, recipe in recipes.items():
        recipe["stages"] += MORE_STAGES
        finish(write_recipe(recipe, tmp_path / f"{name}.yaml"), tmp_path / name)
    one, two = all_bytes(tmp_path / "one"), all_bytes(tmp_path / "two")
    assert two == one
    assert {"results/sums.json", "corpora/told/commits/tokens.json"} <= two.keys()


@pytest.mark.slow
def test_a_killed_worker_costs_no_more_than_the_parts_that_it_was_at_work_on(tmp_path, by_one_process, faults):
    process, _, out = begin(tmp_path, faults)
    workers_of(process)[0].kill()
    faults.go_on()
    end_of(process)
    assert all_bytes(out) == by_one_process
    assert find_problems(RunFolder(out)) == []
    assert events(out, "retry")


@pytest.mark.slow
def test_when_all_workers_are_killed_those_that_take_their_place_go_on(tmp_path, by_one_process, faults):
    process, _, out = begin(tmp_path, faults)
    for worker in workers_of(process):
        worker.kill()
    faults.go_on()
    end_of(process)
    assert all_bytes(out) == by_one_process


@pytest.mark.slow
def test_what_fails_on_a_worker_is_done_again(tmp_path, by_one_process, faults):
    recipe = write_recipe(make_long_recipe(**LOCAL), tmp_path / "recipe.yaml")
    faults.fail(1)
    finish(recipe, tmp_path / "run", **faults.environment)
    assert all_bytes(tmp_path / "run") == by_one_process
    assert "the file server is away" in events(tmp_path / "run", "retry")[0]["message"]


@pytest.mark.slow
def test_what_fails_again_and_again_ends_the_run_with_its_part_and_its_error(tmp_path, by_one_process, faults):
    recipe = write_recipe(make_long_recipe(**LOCAL, retries=1), tmp_path / "recipe.yaml")
    faults.fail(200)
    output = finish(recipe, tmp_path / "run", 75, **faults.environment)
    assert re.search(
        r"error: tokens [\d,]+ to [\d,]+ \(part \d+\) failed 2 times, at last with OSError: .*the file server is "
        "away; what is committed stays valid, the same command continues",
        output,
    )
    assert "Traceback" not in output
    assert not list((tmp_path / "run/.partial").glob("*"))
    finish(write_recipe(make_long_recipe(), recipe), tmp_path / "run")
    assert all_bytes(tmp_path / "run") == by_one_process


@contextmanager
def begun_elsewhere(tmp_path, faults):
    """Start a scheduler, a worker, and a run by it; give them once the worker waits in the midst of it."""
    scheduler, address = start_scheduler()
    first = start_worker(address, tmp_path / "scratch", **faults.environment)
    with ended_at_last(scheduler, first):
        process, recipe, out = begin(tmp_path, faults, scheduler=address)
        with ended_at_last(process):
            yield SimpleNamespace(
                scheduler=scheduler, address=address, first=first, process=process, recipe=recipe, out=out
            )


@pytest.mark.slow
def test_workers_may_come_and_go_and_so_may_the_scheduler(tmp_path, by_one_process, faults):
    with begun_elsewhere(tmp_path, faults) as it:
        second = start_worker(it.address, tmp_path / "scratch", **faults.environment)
        with ended_at_last(second):
            wait_for(lambda: "Registered to" in second.stdout.readline(), it.process, second)
            it.first.kill()
            faults.stop_at(12, it.out)
            wait_for_commits(it.process, it.out, 12)
            it.scheduler.kill()
            output = end_of(it.process, 75)
    assert "the scheduler of the cluster is gone; what is committed stays valid" in output
    assert "Traceback" not in output

    finish(write_recipe(make_long_recipe(workers=1, threads=1), it.recipe), it.out)
    assert all_bytes(it.out) == by_one_process


@pytest.mark.slow
def test_a_run_without_any_worker_waits_for_the_next_one(tmp_path, by_one_process, faults):
    with begun_elsewhere(tmp_path, faults) as it:
        it.first.kill()
        wait_for(lambda: "no worker is left" in it.process.stdout.readline(), it.process)
        faults.go_on()
        with ended_at_last(start_worker(it.address, tmp_path / "scratch")):
            end_of(it.process)
    assert all_bytes(it.out) == by_one_process


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_asked_to_end_it_ends_in_order_and_continues(tmp_path, by_one_process, faults, number, code):
    process, recipe, out = begin(tmp_path, faults)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does it
    else:
        process.send_signal(number)
    faults.go_on()
    output = end_of(process, code)
    assert "the same command continues" in output
    assert "Traceback" not in output
    assert not list((out / ".partial").glob("*"))
    finish(write_recipe(make_long_recipe(), recipe), out)
    assert all_bytes(out) == by_one_process


COMMIT = """
import sys
import numpy as np
from actpipe.records import Part
from actpipe.stores.layout import RunFolder
from actpipe.stores.remote import fetch_all
from actpipe.stores.worker_fronts import front_of_worker
from actpipe.stores.writing import PartWriter, read_manifest
folder = RunFolder(front_of_worker(sys.argv[1]))
fetch_all(folder.root)
manifest = read_manifest(folder)
writer = PartWriter(folder, manifest, Part(0, 0, manifest.rows_per_part), fsync="commit")
for array in manifest.arrays:
    rows = np.full((manifest.rows_per_part, *array.row_shape), int(sys.argv[2])).astype(array.dtype)
    writer.write(array.path, 0, rows)
print("ready", flush=True)
sys.stdin.readline()
writer.commit()
"""


def commit_twice(run):
    """Let two processes, which share no folder where the run is in an object store, commit part 0 at the same time."""
    both = [
        subprocess.Popen(
            [sys.executable, "-c", COMMIT, str(run), str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in (1, 2)
    ]
    assert [process.stdout.readline() for process in both] == ["ready\n"] * 2
    for process in both:
        process.stdin.write("go\n")
        process.stdin.flush()
    assert [process.wait(timeout=60) for process in both] == [0, 0]
    for process in both:
        process.communicate()


HOLD = """
import sys
from pathlib import Path
from actpipe.stores.claims import alone_at
from actpipe.stores.layout import RunFolder
with alone_at(RunFolder(Path(sys.argv[1])), 3):
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_a_commit_that_hangs_is_waited_for_but_not_for_ever_and_those_of_other_parts_are_not(tmp_path, monkeypatch):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        waits = []
        monkeypatch.setattr(claims, "time", SimpleNamespace(monotonic=time.monotonic, sleep=waits.append))
        monkeypatch.setattr(claims, "PATIENCE_SECONDS", 0.2)
        for part in (2, 3):
            with claims.alone_at(RunFolder(tmp_path), part):
                assert bool(waits) == (part == 3)
        process.kill()


def test_of_two_commits_in_an_object_store_the_first_counts_and_its_files_are_whole(bucket, corpus):
    url = f"s3://{bucket}/run"
    run(make_recipe(corpus), url)
    for _ in range(2):
        obstore.delete(S3Store(bucket), "run/commits/part-00000000.json")
        commit_twice(url)
        assert verify_run(url)[0] == []
    assert not [name for name in objects(bucket) if "/." in name]


def test_of_two_commits_of_one_part_the_first_counts_and_its_files_are_whole(tmp_path):
    recipe = make_long_recipe(4)
    recipe["stages"][1]["hooks"] = [
        f"blocks.{layer}.{hook}" for layer in (0, 1) for hook in ("hook_resid_post", "hook_mlp_out")
    ]
    out = tmp_path / "run"
    finish(write_recipe(recipe, tmp_path / "recipe.yaml"), out)
    for _ in range(3):
        (out / "commits/part-00000000.json").unlink()
        commit_twice(out)
        assert find_problems(RunFolder(out)) == []
        assert not list((out / ".partial").glob("part-*"))

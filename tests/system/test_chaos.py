"""Whatever is killed, and whenever: what counts is whole, and the same command ends with the same bytes."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter

import psutil
import pytest
from processes import (
    LOCAL,
    end_of,
    finish,
    kill_group,
    make_long_recipe,
    n_commits,
    start,
    workers_of,
    write_recipe,
)
from support import all_bytes

from actpipe.stores.layout import RunFolder
from actpipe.stores.verifying import Remedy, find_problems

WORKER, CLIENT, GROUP = "a worker", "the run", "the run and all its workers"


def kill_something(what, process, draw):
    """Kill a worker, the process of the run, or both; return whether there was anything to kill."""
    if process.poll() is not None:
        return False
    if what == WORKER:
        workers = workers_of(process)
        if not workers:
            return False
        draw.choice(workers).kill()
    elif what == CLIENT:
        workers = workers_of(process)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        psutil.wait_procs(workers, timeout=60)
        assert not any(worker.is_running() for worker in workers), "workers end with the run that has started them"
    else:
        kill_group(process)
    return True


def torture(tmp_path, *, n_kills, seed, n_parts, longest_seconds):
    """Kill at random moments until `n_kills` have been; then let the run end, and return how often what was killed."""
    draw, killed = random.Random(seed), Counter()
    recipe = write_recipe(make_long_recipe(n_parts, **LOCAL, retries=20), tmp_path / "recipe.yaml")
    out = tmp_path / "run"
    process, before = start(recipe, out), 0
    try:
        while killed.total() < n_kills:
            time.sleep(draw.uniform(0, longest_seconds))
            what = draw.choices((WORKER, CLIENT, GROUP), (6, 2, 2))[0]
            if kill_something(what, process, draw):
                killed[what] += 1
                assert before <= (before := n_commits(out)), "what counts stays"
                if (out / "store.zarr").is_dir():
                    wrong = [problem for problem in find_problems(RunFolder(out)) if problem.remedy != Remedy.RESUME]
                    assert wrong == [], f"after kill {killed.total()}: {wrong}"
            if process.poll() is not None:
                finished = process.returncode == 0
                process.communicate()
                if finished:  # sooner than it was killed: begin anew, with nothing
                    check(tmp_path, out)
                    out, before = out.with_name(f"run-{killed.total()}"), 0
                process = start(recipe, out)
        end_of(process)
    finally:
        kill_group(process)
    check(tmp_path, out)
    return killed


def check(tmp_path, out):
    """Compare a finished run with that of one process."""
    assert find_problems(RunFolder(out)) == []
    assert all_bytes(out) == all_bytes(tmp_path / "one")
    assert not (out / ".partial").exists()


@pytest.mark.parametrize(
    ("n_kills", "seed", "n_parts", "longest_seconds"),
    [
        (5, 1, 48, 5.0),
        pytest.param(100, 2, 320, 8.0, marks=pytest.mark.slow),
    ],
)
def test_killed_at_random_moments_it_loses_and_doubles_nothing(tmp_path, n_kills, seed, n_parts, longest_seconds):
    finish(write_recipe(make_long_recipe(n_parts), tmp_path / "one.yaml"), tmp_path / "one")
    started = time.monotonic()
    killed = torture(tmp_path, n_kills=n_kills, seed=seed, n_parts=n_parts, longest_seconds=longest_seconds)
    print(f"seed {seed}: {dict(killed)} in {(time.monotonic() - started) / 60:.1f} minutes")
    assert killed.total() == n_kills

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


def wait_a_while(process, out, draw):
    """Wait for some more parts, or for a moment of the start, then for a moment more."""
    seen, more, patience = n_commits(out), draw.choice((0, 1, 1, 2, 3, 5)), draw.uniform(0, 3)
    started = time.monotonic()
    while process.poll() is None:
        if n_commits(out) >= seen + more and (more or time.monotonic() > started + patience):
            time.sleep(draw.uniform(0, 0.2))
            return
        time.sleep(0.005)


def torture(tmp_path, *, n_kills, seed, n_parts):
    """Kill at random moments until `n_kills` have been; then let the run end, and return how often what was killed."""
    draw, killed = random.Random(seed), Counter()
    recipe = write_recipe(make_long_recipe(n_parts, **LOCAL, retries=20), tmp_path / "recipe.yaml")
    out = tmp_path / "run"
    process, before = start(recipe, out), 0
    try:
        while killed.total() < n_kills:
            wait_a_while(process, out, draw)
            what = draw.choices((WORKER, CLIENT, GROUP), (8, 1, 1))[0]
            if kill_something(what, process, draw):
                killed[what] += 1
                before = check_meanwhile(out, before, killed)
            if process.poll() is not None:
                output = "" if process.stdout.closed else process.communicate()[0]
                if process.returncode == 0:  # sooner than it was killed: begin anew, with nothing
                    check(tmp_path, out)
                    out, before = out.with_name(f"run-{killed.total()}"), 0
                else:
                    assert process.returncode == -signal.SIGKILL, output
                process = start(recipe, out)
        end_of(process)
    finally:
        kill_group(process)
    check(tmp_path, out)
    return killed


def check_meanwhile(out, before, killed):
    """What counted still counts, and nothing is wrong but what is not done; return how many parts count."""
    now = n_commits(out)
    assert now >= before
    if (out / "store.zarr").is_dir():
        wrong = [str(problem) for problem in find_problems(RunFolder(out)) if problem.remedy != Remedy.RESUME]
        assert wrong == [], f"after kill {killed.total()}"
    print(f"kill {killed.total()}: {now} parts", flush=True)
    return now


def check(tmp_path, out):
    """Compare a finished run with that of one process."""
    assert find_problems(RunFolder(out)) == []
    assert all_bytes(out) == all_bytes(tmp_path / "one")
    assert not (out / ".partial").exists()


@pytest.mark.parametrize(
    ("n_kills", "seed", "n_parts"),
    [(2, 1, 16), pytest.param(100, 2, 320, marks=pytest.mark.slow)],
)
def test_killed_at_random_moments_it_loses_and_doubles_nothing(tmp_path, n_kills, seed, n_parts):
    finish(write_recipe(make_long_recipe(n_parts), tmp_path / "one.yaml"), tmp_path / "one")
    started = time.monotonic()
    killed = torture(tmp_path, n_kills=n_kills, seed=seed, n_parts=n_parts)
    print(f"seed {seed}: {dict(killed)} in {(time.monotonic() - started) / 60:.1f} minutes")
    assert killed.total() == n_kills

"""Setting a clock must neither let two runs into one folder nor keep all of them out."""

from __future__ import annotations

import json
import os
import threading
from dataclasses import asdict
from pathlib import Path

import pytest
from support import WorkerAtHand

from actpipe.errors import RunInUseError
from actpipe.interrupting import INTERRUPTION
from actpipe.jobs.engine import InProcess
from actpipe.records import Part
from actpipe.stores import locking
from actpipe.stores.layout import RunFolder
from actpipe.stores.locking import Owner, look_at_lock, only_run_in

ELSEWHERE = Owner("another-host", 1, "2026-01-01T00:00:00")
YEAR = 365 * 86_400.0


@pytest.fixture(autouse=True)
def _looks_often(monkeypatch):
    monkeypatch.setattr(locking, "_LOOK_SECONDS", 0.005)
    monkeypatch.setattr(locking, "WATCH_SECONDS", 0.05)


def lock_of(owner: Owner, folder: Path, age_seconds: float) -> Path:
    """Write a lock as another host does, before this file system's clock was set by `age_seconds`."""
    path = folder / ".lock"
    path.write_text(json.dumps(asdict(owner)))
    touched = path.stat().st_mtime - age_seconds
    os.utime(path, (touched, touched))
    return path


@pytest.mark.parametrize("age", [YEAR, -YEAR])
def test_a_living_owner_elsewhere_keeps_its_lock_whatever_the_clock_says(tmp_path, monkeypatch, age):
    monkeypatch.setattr(locking, "WATCH_SECONDS", 60.0)
    path, ended = lock_of(ELSEWHERE, tmp_path, age), threading.Event()

    def beat():
        number = 0
        while not ended.wait(0.02):
            number += 1
            os.utime(path, (path.stat().st_atime, path.stat().st_mtime + number))

    heart = threading.Thread(target=beat)
    heart.start()
    try:
        with pytest.raises(RunInUseError, match="process 1 on another-host"), only_run_in(RunFolder(tmp_path)):
            pytest.fail("two at once")
    finally:
        ended.set()
        heart.join()
    assert Owner.of(path) == ELSEWHERE


@pytest.mark.parametrize("age", [YEAR, -YEAR])
def test_a_dead_owner_elsewhere_keeps_no_one_out_whatever_the_clock_says(tmp_path, age):
    path = lock_of(ELSEWHERE, tmp_path, age)

    with only_run_in(RunFolder(tmp_path)):
        assert Owner.of(path).pid == os.getpid()


@pytest.mark.parametrize("age", [YEAR, -YEAR])
def test_a_living_owner_here_is_at_work_whatever_the_clock_says(tmp_path, age):
    with only_run_in(RunFolder(tmp_path)):
        path = tmp_path / ".lock"
        touched = path.stat().st_mtime - age
        os.utime(path, (touched, touched))
        found = look_at_lock(RunFolder(tmp_path))
        with pytest.raises(RunInUseError), only_run_in(RunFolder(tmp_path)):
            pytest.fail("two at once")
    assert found.is_alive
    assert found.age_seconds >= 0
    assert look_at_lock(RunFolder(tmp_path)) is None


def test_a_run_that_slept_until_another_took_its_place_ends_before_its_next_part(tmp_path, monkeypatch):
    monkeypatch.setattr(locking, "BEAT_SECONDS", 0.001)
    parts, done = [Part(number, number, number + 1) for number in range(10)], []

    def work(part):
        done.append(part)
        if len(done) == 3:
            lock_of(ELSEWHERE, tmp_path, 0)
            while INTERRUPTION.reason is None:
                pass

    with only_run_in(RunFolder(tmp_path)) as is_ours:
        with pytest.raises(RunInUseError, match="taken over by process 1 on another-host"):
            InProcess().run_parts(parts, WorkerAtHand(work), None, None)
        assert not is_ours()
    assert done == parts[:3]
    assert Owner.of(tmp_path / ".lock") == ELSEWHERE
    InProcess().run_parts(parts, WorkerAtHand(done.append), None, None)
    assert len(done) == 13


def test_looking_leaves_the_folder_as_it_is(tmp_path):
    path = lock_of(ELSEWHERE, tmp_path, locking.STALE_SECONDS + 1)
    before = path.stat()

    assert not look_at_lock(RunFolder(tmp_path)).is_alive
    assert [child.name for child in tmp_path.iterdir()] == [".lock"]
    assert (path.stat().st_mtime_ns, path.read_text()) == (before.st_mtime_ns, json.dumps(asdict(ELSEWHERE)))

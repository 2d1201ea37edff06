"""What docs/reliability.md says of each fault is so."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import threading

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
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
    write_recipe,
)
from support import TEXTS, all_bytes, make_recipe, run

from actpipe.errors import DatasetError
from actpipe.stores.layout import RunFolder
from actpipe.stores.verifying import Remedy, find_problems


@pytest.fixture(scope="module")
def by_one_process(tmp_path_factory):
    """The files of a run by one process."""
    folder = tmp_path_factory.mktemp("by_one")
    finish(write_recipe(make_long_recipe(), folder / "recipe.yaml"), folder / "run")
    return all_bytes(folder / "run")


@pytest.fixture
def faults(tmp_path):
    return Faults(tmp_path / "faults")


def events(out, kind):
    lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == kind]


@pytest.mark.slow
def test_a_disk_that_is_full_on_a_worker_ends_the_run_and_it_continues_once_there_is_room(tmp_path, by_one_process):
    disk = tmp_path / "disk"
    disk.mkdir()
    if shutil.which("mount") is None or os.geteuid():
        pytest.skip("mounting needs privileges")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "none", disk], capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")
    try:
        recipe = write_recipe(make_long_recipe(**LOCAL), tmp_path / "recipe.yaml")
        output = finish(recipe, disk / "run", 75)
        assert re.search(r"error: stopped at .*: no space left on device; free some space and give the same", output)
        assert "Traceback" not in output
        assert {problem.remedy for problem in find_problems(RunFolder(disk / "run"))} == {Remedy.RESUME}
        subprocess.run(["mount", "-o", "remount,size=256m", disk], check=True)
        finish(write_recipe(make_long_recipe(), recipe), disk / "run")
        assert all_bytes(disk / "run") == by_one_process
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


MEMORY = {"memory": "1500MB"}


@pytest.mark.slow
def test_a_worker_out_of_memory_is_ended_and_its_parts_are_done_again(tmp_path, by_one_process, faults):
    recipe = write_recipe(make_long_recipe(**LOCAL, **MEMORY), tmp_path / "recipe.yaml")
    faults.hog(1, 2 * 10**9)
    finish(recipe, tmp_path / "run", **faults.environment)
    assert all_bytes(tmp_path / "run") == by_one_process
    assert {event["error"] for event in events(tmp_path / "run", "retry")} == {"KilledWorker"}


@pytest.mark.slow
def test_a_part_for_which_no_worker_has_memory_is_named(tmp_path, faults):
    recipe = write_recipe(make_long_recipe(**LOCAL, **MEMORY, retries=0), tmp_path / "recipe.yaml")
    faults.hog(100, 2 * 10**9)
    output = finish(recipe, tmp_path / "run", 75, **faults.environment)
    assert re.search(r"\(part \d+\) failed once, at last with the worker at \S+ ended .*out of memory", output)
    assert "Traceback" not in output
    assert {problem.remedy for problem in find_problems(RunFolder(tmp_path / "run"))} == {Remedy.RESUME}


@pytest.mark.slow
def test_a_worker_that_hangs_is_not_waited_for_and_spoils_nothing_once_it_goes_on(tmp_path, by_one_process, faults):
    scheduler, address = start_scheduler()
    workers = [start_worker(address, tmp_path / "scratch", **faults.environment) for _ in range(2)]
    with ended_at_last(scheduler, *workers):
        for worker in workers:
            wait_for(lambda worker=worker: "Registered to" in worker.stdout.readline(), worker)
        patience = {"slow_factor": 1.5, "slow_seconds": 2.0}
        recipe = write_recipe(make_long_recipe(scheduler=address, **patience), tmp_path / "recipe.yaml")
        out = tmp_path / "run"
        faults.stop_at(6, out)
        process = start(recipe, out, **faults.environment)
        with ended_at_last(process):
            wait_for_commits(process, out, 6)
            workers[0].send_signal(signal.SIGSTOP)
            faults.go_on()
            end_of(process)
        assert events(out, "slow")
        assert all_bytes(out) == by_one_process
        workers[0].send_signal(signal.SIGCONT)
        workers[0].terminate()
        workers[0].communicate(timeout=60)
    left = {name for name in all_bytes(out) if name.startswith(".partial")}
    assert left <= {".partial/claims"}
    assert {name: data for name, data in all_bytes(out).items() if name not in left} == by_one_process
    assert find_problems(RunFolder(out)) == []


class Wire:
    """A port that leads to another one, until it is cut."""

    def __init__(self, to):
        self._to, self._ends = to, []
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        with contextlib.suppress(OSError):
            while True:
                ends = self._server.accept()[0], socket.create_connection(("127.0.0.1", self._to))
                self._ends += ends
                for one, other in (ends, ends[::-1]):
                    threading.Thread(target=self._copy, args=(one, other), daemon=True).start()

    def _copy(self, one, other):
        with contextlib.suppress(OSError):
            while data := one.recv(65536):
                other.sendall(data)

    def close(self):
        for end in (self._server, *self._ends):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


@pytest.mark.slow
def test_a_worker_that_is_cut_off_from_the_scheduler_loses_its_parts_to_others(tmp_path, by_one_process, faults):
    scheduler, address = start_scheduler()
    wire = Wire(int(address.rpartition(":")[2]))
    with contextlib.closing(wire):
        near = start_worker(address, tmp_path / "scratch", **faults.environment)
        far = start_worker(f"tcp://127.0.0.1:{wire.port}", tmp_path / "scratch", **faults.environment)
        with ended_at_last(scheduler, near, far):
            for worker in (near, far):
                wait_for(lambda worker=worker: "Registered to" in worker.stdout.readline(), worker)
            out = tmp_path / "run"
            faults.stop_at(6, out)
            process = start(
                write_recipe(make_long_recipe(scheduler=address), tmp_path / "recipe.yaml"), out, **faults.environment
            )
            with ended_at_last(process):
                wait_for_commits(process, out, 6)
                wire.close()
                faults.go_on()
                end_of(process)
    assert {name: data for name, data in all_bytes(out).items() if name != ".partial/claims"} == by_one_process
    assert find_problems(RunFolder(out)) == []


def test_a_record_that_a_killed_run_has_half_written_is_no_foreign_file_and_the_next_run_clears_it(corpus, tmp_path):
    recipe, out = make_recipe(corpus), tmp_path / "run"
    run(recipe, out)
    record = out / "commits/part-00000001.json"
    half = record.with_name(f".{record.name}.a9bc5141d80e")
    half.write_bytes(record.read_bytes()[:100])
    record.unlink()
    assert [problem.remedy for problem in find_problems(RunFolder(out))] == [Remedy.RESUME]
    run(recipe, out)
    assert not half.exists()
    assert find_problems(RunFolder(out)) == []


def break_shard(folder, kind):
    """Make three shards, the second of them broken; return the pattern of all, and what an error must say."""
    for number in range(3):
        if kind == "parquet":
            pq.write_table(pa.table({"text": TEXTS * 50}), folder / f"{number}.parquet")
        else:
            (folder / f"{number}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS * 50))
    broken = folder / f"1.{kind}"
    data = broken.read_bytes()
    if kind == "parquet":
        broken.write_bytes(data[: len(data) // 2])
        return folder / "*.parquet", rf"{re.escape(str(broken))} is no whole Parquet file"
    lines = data.splitlines(keepends=True)
    lines[123] = lines[123][:20] + b"\n"
    broken.write_bytes(b"".join(lines))
    return folder / "*.jsonl", rf"{re.escape(str(broken))}, line 124: not JSON"


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_a_broken_shard_is_named_and_half_of_the_tokens_are_never_taken_for_all(tmp_path, kind, streaming):
    (tmp_path / "shards").mkdir()
    pattern, said = break_shard(tmp_path / "shards", kind)
    recipe = make_recipe(pattern)
    recipe["stages"][0]["dataset"]["streaming"] = streaming
    with pytest.raises(DatasetError, match=said):
        run(recipe, tmp_path / "run")
    assert not list((tmp_path / "run").rglob("*.parquet"))
    assert not (tmp_path / "run/commits").exists()

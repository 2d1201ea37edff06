"""Workers that a batch system starts. SLURM is stood in for by an `sbatch` and a `scancel` that run jobs right here."""

from __future__ import annotations

import os
import signal
import stat
import time
from pathlib import Path

import dask
import pytest
from actpipe.schemas.engine import EngineConfig
from distributed import Client
from support import all_bytes, make_recipe
from test_resuming import write_recipe
from test_workers import SINGLE, actpipe

from actpipe.cluster import batch_systems
from actpipe.cluster.batch_systems import certificate_in, jobs_of_slurm, kubernetes_spec, slurm_cluster
from actpipe.cluster.job_worker import main as job_worker
from actpipe.errors import ClusterError, ClusterSetupError

SBATCH = """#!/bin/bash
# As SLURM: keep a copy of the script, run it in a session of its own, and say the job's number, which is its shell's.
cp "$1" "$0.$$.sh"
setsid bash "$0.$$.sh" > "$0.$$.log" 2>&1 < /dev/null &
echo "$!" >> "$0.jobs"
echo "Submitted batch job $!"
"""
SCANCEL = """#!/bin/bash
kill -TERM "$1"
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Give the folder of the stand-in, which is where the jobs' scripts, logs and numbers are."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("sbatch", SBATCH), ("scancel", SCANCEL)):
        (folder / name).write_text(text)
        (folder / name).chmod(stat.S_IRWXU)
    path = f"{folder}:{os.environ['PATH']}"
    monkeypatch.setenv("PATH", path)
    monkeypatch.setitem(SINGLE, "PATH", path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield folder
    for job in jobs_in(folder):
        if is_running(job):
            os.kill(job, signal.SIGKILL)


def jobs_in(folder: Path) -> list[int]:
    file = folder / "sbatch.jobs"
    return [int(line) for line in file.read_text().split()] if file.is_file() else []


def is_running(job: int) -> bool:
    try:
        state = Path(f"/proc/{job}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


def wait_until(condition, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def engine(folder: Path, **slurm) -> EngineConfig:
    settings = {"gpus": 0, "cpus": 1, "memory": "2GB", "shared_folder": str(folder), **slurm}
    return EngineConfig.model_validate({"kind": "dask", "workers": 2, "dashboard_port": None, "slurm": settings})


def test_a_job_asks_for_what_the_recipe_says_and_becomes_a_worker_that_is_told_to_leave(tmp_path):
    config = engine(tmp_path, queue="gpu", account="lab", walltime="02:00:00", cpus=6, memory="48GiB", gpus=2)
    with certificate_in(str(tmp_path)) as security, slurm_cluster(config, config.slurm, security) as cluster:
        *header, last = cluster.job_script().strip().splitlines()
        (private,) = tmp_path.iterdir()
        mode = stat.S_IMODE(private.stat().st_mode)
        certificates = list(private.iterdir())

    asked = {line.removeprefix("#SBATCH ") for line in header if line.startswith("#SBATCH")}
    assert asked >= {"-p gpu", "-A lab", "-t 02:00:00", "--cpus-per-task=6", "--mem=48G", "--gres=gpu:2"}
    assert asked >= {"--signal=B:TERM@120", "--no-requeue"}
    assert last.startswith("exec "), "the shell that SLURM signals must be the worker"
    assert " -m actpipe.cluster.job_worker tls://" in last
    assert mode == 0o700
    assert len(certificates) == 2
    assert all(str(path) in last for path in certificates)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_job_that_leaves_is_replaced_and_none_is_left_at_the_end(slurm, tmp_path, monkeypatch):
    monkeypatch.setattr(batch_systems, "_REPLACE_SECONDS", 0.2)
    config = engine(tmp_path)
    with dask.config.set({"distributed.deploy.lost-worker-timeout": "100ms"}):
        with jobs_of_slurm(config, config.slurm) as cluster, Client(cluster, set_as_default=False) as client:
            wait_until(lambda: len(client.nthreads()) == 2)
            first, second = jobs_in(slurm)
            os.kill(first, signal.SIGTERM)
            wait_until(lambda: len(jobs_in(slurm)) == 3)
            wait_until(lambda: len(client.nthreads()) == 2)
            assert not is_running(first)
            assert is_running(second)

    assert len(jobs_in(slurm)) == 3
    wait_until(lambda: not any(is_running(job) for job in jobs_in(slurm)))


@pytest.mark.slow
def test_a_run_by_jobs_has_the_bytes_of_one_process(slurm, corpus, tmp_path):
    recipe = make_recipe(corpus, hooks=["blocks.*.hook_resid_post"], metrics=["loss"])
    recipe["stages"][1] |= {"rows_per_part": 64}
    alone = actpipe("run", write_recipe(recipe, tmp_path / "recipe.yaml"), "--out", tmp_path / "alone")
    settings = engine(tmp_path).model_dump(mode="json", exclude_defaults=True)
    shared = write_recipe({**recipe, "engine": settings}, tmp_path / "jobs.yaml")
    by_jobs = actpipe("run", shared, "--out", tmp_path / "run")
    outputs = [process.communicate(timeout=300)[0] for process in (alone, by_jobs)]

    assert (alone.returncode, by_jobs.returncode) == (0, 0), outputs
    assert all_bytes(tmp_path / "run") == all_bytes(tmp_path / "alone")
    assert len(jobs_in(slurm)) == 2
    wait_until(lambda: not any(is_running(job) for job in jobs_in(slurm)))


def test_a_machine_without_slurm_is_told_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    config = engine(tmp_path)

    with pytest.raises(ClusterError, match="no job can be submitted with `sbatch`"):
        with jobs_of_slurm(config, config.slurm):
            pass


@pytest.mark.slow
def test_a_job_that_is_refused_later_is_submitted_again(slurm, tmp_path, monkeypatch):
    monkeypatch.setattr(batch_systems, "_REPLACE_SECONDS", 0.2)
    config = engine(tmp_path).model_copy(update={"workers": 1})
    with dask.config.set({"distributed.deploy.lost-worker-timeout": "100ms"}):
        with jobs_of_slurm(config, config.slurm) as cluster, Client(cluster, set_as_default=False) as client:
            wait_until(lambda: len(client.nthreads()) == 1)
            (slurm / "sbatch").write_text('#!/bin/bash\necho refused >> "$0.refused"\nexit 1\n')
            os.kill(jobs_in(slurm)[0], signal.SIGTERM)
            wait_until((slurm / "sbatch.refused").is_file)
            (slurm / "sbatch").write_text(SBATCH)
            wait_until(lambda: len(jobs_in(slurm)) == 2)
            wait_until(lambda: len(client.nthreads()) == 1)

    wait_until(lambda: not any(is_running(job) for job in jobs_in(slurm)))


def test_an_interface_that_is_not_there_is_named(tmp_path):
    config = engine(tmp_path, interface="ib7")

    with pytest.raises(ClusterError, match="ib7"), jobs_of_slurm(config, config.slurm):
        pass


def test_a_shared_folder_that_is_not_there_is_named(tmp_path):
    config = engine(tmp_path / "none")

    with pytest.raises(ClusterSetupError, match=r"engine\.slurm\.shared_folder: .*none"):
        with jobs_of_slurm(config, config.slurm):
            pass


def test_a_job_without_a_scheduler_ends_with_one_line(monkeypatch):
    with dask.config.set({"distributed.comm.timeouts.connect": "1s"}):
        with pytest.raises(SystemExit, match=r"no Dask scheduler at tcp://127\.0\.0\.1:1 "):
            job_worker(["tcp://127.0.0.1:1", "--name", "a", "--nthreads", "2", "--death-timeout", "60"])


def test_pods_have_devices_where_they_compute_and_time_to_finish():
    config = EngineConfig.model_validate(
        {"kind": "dask", "kubernetes": {"image": "registry/actpipe:1", "memory": "64 GB", "cpus": 4, "gpus": 2}}
    )
    assert config.kubernetes is not None
    spec = kubernetes_spec(config.kubernetes, 3)["spec"]
    (worker,), (scheduler,) = (spec[role]["spec"]["containers"] for role in ("worker", "scheduler"))

    assert spec["worker"]["replicas"] == 3
    assert worker["resources"]["limits"] == {"cpu": "4", "memory": "64G", "nvidia.com/gpu": "2"}
    assert worker["args"][:3] == ["actpipe", "worker", "$(DASK_SCHEDULER_ADDRESS)"]
    assert spec["worker"]["spec"]["terminationGracePeriodSeconds"] >= 60
    assert "resources" not in scheduler
    assert scheduler["args"][:2] == ["dask", "scheduler"]


@pytest.mark.parametrize(("given", "asked"), [("8GB", "8G"), ("8 GiB", "8Gi"), ("512kiB", "512Ki"), ("1.5TB", "1.5T")])
def test_memory_is_written_as_kubernetes_reads_it(given, asked):
    config = EngineConfig.model_validate({"kind": "dask", "kubernetes": {"image": "a", "memory": given, "gpus": 0}})
    assert config.kubernetes is not None

    (worker,) = kubernetes_spec(config.kubernetes, 1)["spec"]["worker"]["spec"]["containers"]

    assert worker["resources"]["limits"] == {"cpu": "8", "memory": asked}

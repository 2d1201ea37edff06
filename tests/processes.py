"""Runs as processes of their own, with workers that can be killed."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
from ruamel.yaml import YAML
from support import ROOT, SPEECHES, make_recipe

DASK = Path(sys.executable).with_name("dask")
PATIENCE = 240
"""Seconds after which a process that should have ended counts as hanging."""
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def make_long_recipe(n_parts: int = 48, **engine: Any) -> dict[str, Any]:
    """Return a recipe of so many parts; with settings of the engine, two workers with one thread each do them."""
    recipe = make_recipe(SPEECHES, hooks=["blocks.*.hook_resid_post", "blocks.0.attn.hook_pattern"], metrics=["loss"])
    recipe["stages"][0] |= {"max_tokens": 512 * n_parts, "context_length": 64}
    recipe["stages"][1] |= {"rows_per_part": 512, "batch_tokens": 512}
    if engine:
        recipe["engine"] = {"kind": "dask", **engine}
    return recipe


LOCAL = {"workers": 2, "threads": 1}


class Faults:
    """What goes wrong on workers that have `environment`, as tests/faulty/sitecustomize.py has it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        for kind in ("fail", "hog"):
            (folder / kind).mkdir(parents=True)
        self.environment = {"PYTHONPATH": str(ROOT / "tests" / "faulty"), "FAULTS": str(folder)}

    def fail(self, times: int) -> None:
        """Let so many parts fail."""
        for number in range(times):
            (self._folder / "fail" / f"{number:03d}").touch()

    def hog(self, times: int, n_bytes: int) -> None:
        """Let so many parts take so many bytes of memory."""
        for number in range(times):
            (self._folder / "hog" / f"{number:03d}").write_text(str(n_bytes))

    def stop_at(self, n_commits: int, out: Path) -> None:
        """Let no worker begin a part once so many are committed."""
        (self._folder / "gate.new").write_text(f"{n_commits} {out / 'commits'}")
        (self._folder / "gate.new").rename(self._folder / "gate")

    def go_on(self) -> None:
        """Let workers begin parts again."""
        (self._folder / "gate").unlink()


def write_recipe(recipe: dict[str, Any], path: Path) -> Path:
    """Write a recipe as YAML."""
    with path.open("w") as file:
        YAML().dump(recipe, file)
    return path


def start(recipe: Path, out: Path | str, **environment: str) -> subprocess.Popen[str]:
    """Start `actpipe run`, as the leader of a process group of its own."""
    command = [sys.executable, "-m", "actpipe", "run", str(recipe), "--out", str(out)]
    return start_process(command, **environment)


def start_process(command: list[str], **environment: str) -> subprocess.Popen[str]:
    """Start a command with one thread for arithmetic, as the leader of a process group of its own."""
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, **ONE_THREAD, **environment},
        text=True,
        start_new_session=True,
    )


def end_of(process: subprocess.Popen[str], code: int = 0) -> str:
    """Wait for the end of a process, and return what it said."""
    try:
        output, _ = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        kill_group(process)
        raise
    assert process.returncode == code, output
    return output


def finish(recipe: Path, out: Path | str, code: int = 0, **environment: str) -> str:
    """Run `actpipe run` to its end, and return what it said."""
    return end_of(start(recipe, out, **environment), code)


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Return the worker processes of a run that has started a cluster of its own."""
    try:
        children = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    return [child for child in children if _is_worker(child)]


def _is_worker(process: psutil.Process) -> bool:
    try:
        return "spawn_main" in " ".join(process.cmdline())
    except psutil.Error:
        return False


def n_commits(out: Path) -> int:
    """Return the number of parts that count."""
    return len(list((out / "commits").glob("part-*.json")))


def wait_for(condition: Callable[[], Any], *processes: subprocess.Popen[str]) -> Any:
    """Wait until something holds, and return it; none of the processes may end before."""
    until = time.monotonic() + PATIENCE
    while not (found := condition()):
        for process in processes:
            assert process.poll() is None, f"ended with {process.returncode}: {process.communicate()[0]}"
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)
    return found


def wait_for_commits(process: subprocess.Popen[str], out: Path, wanted: int) -> None:
    """Wait until a running process has so many parts committed."""
    wait_for(lambda: n_commits(out) >= wanted, process)


def kill_group(process: subprocess.Popen[str]) -> None:
    """Kill a process and all that it has started, and wait until they are gone."""
    children = []
    with contextlib.suppress(psutil.NoSuchProcess):
        children = psutil.Process(process.pid).children(recursive=True)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    psutil.wait_procs(children, timeout=30)
    process.communicate(timeout=30)


@contextlib.contextmanager
def ended_at_last(*processes: subprocess.Popen[str]) -> Iterator[None]:
    """Within, processes run; afterwards none is left."""
    try:
        yield
    finally:
        for process in processes:
            kill_group(process)


def free_port() -> int:
    """Return a port of loopback that no one listens on."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def start_scheduler(protocol: str = "tcp", **environment: str) -> tuple[subprocess.Popen[str], str]:
    """Start `dask scheduler` on a free port of loopback; return it with its address."""
    port = free_port()
    command = [
        str(DASK),
        "scheduler",
        "--host",
        f"{protocol}://127.0.0.1",
        "--port",
        str(port),
        "--no-dashboard",
        "--no-show",
    ]
    return start_process(command, **environment), f"{protocol}://127.0.0.1:{port}"


def start_worker(address: str, folder: Path, *more: str, **environment: str) -> subprocess.Popen[str]:
    """Start a `dask worker` in one process, without a nanny."""
    command = [str(DASK), "worker", address, "--nthreads", "2", "--no-nanny", "--no-dashboard"]
    return start_process([*command, "--local-directory", str(folder), "--memory-limit", "0", *more], **environment)

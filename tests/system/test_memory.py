"""Memory does not grow with the corpus."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support import SPEECHES, make_recipe

PEAK = """
import json, resource, sys
from rich.console import Console
from actpipe import run_recipe
from actpipe.telemetry import Telemetry
run_recipe(json.loads(sys.argv[1]), out=sys.argv[2], telemetry=Telemetry(Console(quiet=True)))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak_kib(n_tokens: int, out: Path) -> int:
    writing = {"rows_per_part": "auto", "batch_tokens": 4096, "queue_bytes": 1 << 24}
    recipe = make_recipe(SPEECHES, hooks=["blocks.*.hook_resid_post", "blocks.*.mlp.hook_post"], **writing)
    recipe["stages"][0] |= {"context_length": 256, "max_tokens": n_tokens}
    command = [sys.executable, "-c", PEAK, json.dumps(recipe), str(out)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


@pytest.mark.slow
def test_memory_does_not_follow_the_tokens(tmp_path):
    few, many = peak_kib(50_000, tmp_path / "few"), peak_kib(500_000, tmp_path / "many")

    written = {
        run: sum(path.stat().st_size for path in (tmp_path / run).rglob("*") if path.is_file()) // 1024
        for run in ("few", "many")
    }
    assert many - few <= 0.2 * (written["many"] - written["few"])

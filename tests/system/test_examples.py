"""The examples train on a run, and say what they found."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from support import ROOT, SPEECHES, make_recipe, run


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("examples") / "run"
    recipe = make_recipe(SPEECHES, hooks=["blocks.1.hook_resid_post"], metrics=["correct"], rows_per_part=4096)
    recipe["stages"][0] |= {"max_tokens": 8_192, "layout": "documents", "context_length": 64}
    run(recipe, out)
    return out


def output_of(script, *arguments):
    command = [sys.executable, str(ROOT / "examples" / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout


def number(pattern, output):
    return float(re.search(pattern, output).group(1))


def test_a_sparse_autoencoder_explains_more_than_the_mean(small_run):
    output = output_of("train_sae.py", small_run, "--features", 256, "--epochs", 3, "--batch-size", 512)

    assert number(r"variance explained on held-out documents: (-?[\d.]+)", output) > 0.3
    assert 0 < number(r"features in use \(L0\): ([\d.]+)", output) <= 16
    assert 0 <= number(r"waited for the feed: ([\d.]+)%", output) <= 100


def test_a_probe_is_better_than_its_control(small_run):
    output = output_of("train_probe.py", small_run)
    accuracy = [float(number) for number in re.findall(r"accuracy ([\d.]+) on held-out documents", output)]
    assert accuracy[0] > accuracy[1]  # of the labels, and of labels dealt out at random
    assert 0 <= number(r"waited for the feed: ([\d.]+)%", output) <= 100
    assert 0 < number(r"from a tensor in memory would take ([\d.]+)%", output) < 100

"""Stores of earlier releases are read, verified, repaired and continued."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from support import ROOT, run
from typer.testing import CliRunner

from actpipe import open_store
from actpipe.cli import app
from actpipe.stores.layout import RunFolder
from actpipe.stores.verifying import find_problems

GOLDEN = ROOT / "tests/golden/store-0.1.0"
"""Written by the commit before codecs, quantisation and policies of fsync; `fsync` is `true` in its record."""
HOOK = "blocks.0.hook_resid_post"


@pytest.fixture
def copy(tmp_path):
    return Path(shutil.copytree(GOLDEN / "run", tmp_path / "run"))


def test_it_is_read_and_verified(copy):
    store = open_store(copy)

    assert store[HOOK].shape == (96, 128)
    assert store[HOOK].dtype == np.float16
    assert store.document(1).text.startswith("Whether 'tis nobler")
    assert np.isfinite(store["metrics/loss"].compute()).sum() == 93
    assert find_problems(RunFolder(copy)) == []


def test_it_is_continued_by_its_own_recipe(copy):
    values = open_store(copy)[HOOK].compute()
    (copy / "commits/part-00000001.json").unlink()
    (copy / f"store.zarr/activations/{HOOK}/c/1/0").unlink()
    manifest = (copy / "store.zarr/zarr.json").read_bytes()

    run(GOLDEN / "recipe.yaml", copy)
    np.testing.assert_allclose(open_store(copy)[HOOK].compute(), values, rtol=2e-3, atol=2e-3)
    assert (copy / "store.zarr/zarr.json").read_bytes() == manifest


def test_it_is_repaired_and_compared_with_its_model(copy):
    path = copy / f"store.zarr/activations/{HOOK}/c/0/0"
    path.write_bytes(bytes(path.stat().st_size))

    for command in (["repair"], ["verify", "--deep", "--sequences", "2"]):
        result = CliRunner().invoke(app, [*command, str(copy), "--recipe", str(GOLDEN / "recipe.yaml")])
        assert result.exit_code == 0, result.output

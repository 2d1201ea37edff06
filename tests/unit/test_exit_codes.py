"""What a command exits with says whether the same command may succeed later."""

from __future__ import annotations

import errno
import os

import pytest
from actpipe.schemas.recipe import DatasetConfig
from typer.testing import CliRunner

from actpipe import errors
from actpipe.cli import app
from actpipe.errors import ActpipeError, DatasetError, ModelLoadError, StorageError, exit_code_of
from actpipe.models.loading import ModelSource, load_config
from actpipe.stores.layout import RunFolder, disk_trouble_explained
from actpipe.stores.locking import only_run_in
from actpipe.text.sources import open_source

CODES = {
    "RecipeError": 1,
    "UnknownHookError": 1,
    "ModelLoadError": 1,
    "UnsupportedModelError": 1,
    "IdentityError": 1,
    "DatasetError": 1,
    "StoreMismatchError": 1,
    "RunInUseError": 75,
    "IncompleteStoreError": 1,
    "InterchangeError": 1,
    "StorageError": 75,
    "StorageRefusedError": 1,
    "MetricsError": 1,
    "ClusterError": 75,
    "ClusterSetupError": 1,
    "DtypeOverflowError": 1,
    "DeviceMemoryError": 1,
}


def test_every_error_has_the_code_of_this_table():
    found = {
        name: exit_code_of(kind("why"))
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, ActpipeError) and kind is not ActpipeError
    }

    assert found == CODES


@pytest.mark.parametrize(
    ("error", "code"),
    [(KeyboardInterrupt(), 130), (SystemExit(143), 143), (ValueError("a bug"), 1), (MemoryError(), 1)],
)
def test_what_ends_a_process_otherwise_has_the_code_that_shells_know(error, code):
    assert exit_code_of(error) == code


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (errno.ENOSPC, 75),
        (errno.EDQUOT, 75),
        (errno.EIO, 75),
        (errno.ESTALE, 75),
        (errno.ETIMEDOUT, 75),
        (errno.EACCES, 1),
        (errno.EROFS, 1),
        (errno.EMFILE, 1),
    ],
)
def test_a_disk_that_is_full_or_away_is_tried_again_and_a_forbidden_one_is_not(tmp_path, number, code):
    with pytest.raises(StorageError) as caught, disk_trouble_explained(RunFolder(tmp_path)):
        raise OSError(number, os.strerror(number), str(tmp_path))
    assert exit_code_of(caught.value) == code


def test_a_folder_in_use_may_be_free_later(tmp_path):
    with only_run_in(RunFolder(tmp_path)), pytest.raises(ActpipeError, match="in use by") as caught:
        with only_run_in(RunFolder(tmp_path)):
            pytest.fail("two at once")
    assert exit_code_of(caught.value) == 75


@pytest.mark.slow
def test_a_model_of_a_hub_that_is_not_reached_may_be_there_later(monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelLoadError) as caught:
        load_config(ModelSource("someone/out-of-reach", None, False))
    assert exit_code_of(caught.value) == 75


def test_a_model_or_dataset_that_is_not_there_is_not_tried_again(tmp_path):
    with pytest.raises(ModelLoadError) as model:
        load_config(ModelSource(str(tmp_path / "nothing"), None, False))
    with pytest.raises(DatasetError) as dataset:
        open_source(DatasetConfig(path=str(tmp_path / "nothing.jsonl")), tmp_path)
    assert exit_code_of(model.value) == exit_code_of(dataset.value) == 1


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["run", "recipe.yaml", "--log-format", "yaml"], 2),
        (["run", "recipe.yaml", "--metrics-port", "70000"], 2),
        (["status"], 2),
    ],
)
def test_wrong_usage_is_2(arguments, code):
    assert CliRunner().invoke(app, arguments).exit_code == code

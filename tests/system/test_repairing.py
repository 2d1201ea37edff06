"""A run that is damaged, or that the disk fails, ends with the bytes of one that never was."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from support import INDUCTION, TEXTS, all_bytes, make_recipe, run
from typer.testing import CliRunner

from actpipe.cli import app
from actpipe.errors import StorageError, StoreMismatchError
from actpipe.repairing import recheck_run, repair_run
from actpipe.stores.layout import RunFolder
from actpipe.stores.verifying import Remedy, find_problems

LENS = "results/logit_lens.files/translators.safetensors"
ARRAY = "store.zarr/activations/blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A recipe of four parts with a result."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text("".join(json.dumps({"id": f"doc-{i}", "text": text}) + "\n" for i, text in enumerate(TEXTS)))
    made = make_recipe(path, hooks=["blocks.0.attn.hook_pattern", "blocks.*.hook_resid_post"], metrics=["loss"])
    made["stages"] += [{"stage": "summarize_metrics"}, {"stage": "logit_lens", "translators": "fit"}]
    return made


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    run(recipe, folder)
    return folder


@pytest.fixture
def copy(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


def flip_bit(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 4
    path.write_bytes(data)


DAMAGE = {
    "a flipped bit": lambda folder: flip_bit(folder / f"{ARRAY}/c/1/0", 77),
    "a truncated chunk": lambda folder: os.truncate(folder / f"{ARRAY}/c/0/0", 10),
    "a missing chunk": lambda folder: (folder / "store.zarr/metrics/loss/c/0").unlink(),
    "a missing record": lambda folder: (folder / "commits/part-00000001.json").unlink(),
    "a broken record": lambda folder: (folder / "commits/part-00000001.json").write_text("{"),
    "a missing zarr.json": lambda folder: (folder / f"{ARRAY}/zarr.json").unlink(),
    "a broken manifest": lambda folder: (folder / "store.zarr/zarr.json").write_text("{"),
    "a changed manifest": lambda folder: flip_bit(folder / "store.zarr/zarr.json", 2000),
    "a broken token table": lambda folder: flip_bit(folder / "sequences.parquet", 50),
    "a broken record of the token table": lambda folder: (folder / "commits/tokens.json").write_text("{"),
    "a missing file of a result": lambda folder: (folder / LENS).unlink(),
    "a truncated file of a result": lambda folder: os.truncate(folder / LENS, 100),
    "a changed file of a result": lambda folder: flip_bit(folder / LENS, 500),
    "a folder of files of a result": lambda folder: shutil.rmtree((folder / LENS).parent),
    "a changed table of a result": lambda folder: flip_bit(folder / "results/logit_lens.parquet", 50),
    "a changed array of a result": lambda folder: flip_bit(folder / "results/logit_lens.zarr/mean/c/0/0/0", 50),
    "a missing result": lambda folder: shutil.rmtree(folder / "results/summarize_metrics.zarr"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_repaired_run_has_the_bytes_of_one_never_damaged(finished, copy, damage):
    DAMAGE[damage](copy)
    assert find_problems(RunFolder(copy)) != []

    summary = repair_run(copy)
    assert summary.mended != ()
    assert summary.left == ()
    assert all_bytes(copy) == all_bytes(finished)


def test_only_the_broken_parts_are_done_again(copy):
    flip_bit(copy / f"{ARRAY}/c/1/0", 77)
    before = {path: path.stat().st_ino for path in (copy / "store.zarr").rglob("c/**/*") if path.is_file()}
    repair_run(copy)

    after = {path: path.stat().st_ino for path in before}
    changed = {path.relative_to(copy / "store.zarr") for path in before if before[path] != after[path]}
    assert changed
    assert all("c/1" in path.as_posix() for path in changed)


def test_files_of_others_are_named_and_left_alone(copy):
    mine = copy / f"{ARRAY}/c/mine.txt"
    mine.write_text("mine")
    flip_bit(copy / f"{ARRAY}/c/1/0", 77)

    summary = repair_run(copy)
    assert [problem.remedy for problem in summary.mended] == [Remedy.PART]
    assert [problem.remedy for problem in summary.left] == [Remedy.NONE]
    assert mine.read_text() == "mine"


def test_a_token_table_of_another_dataset_is_not_put_in_the_place_of_a_broken_one(recipe, finished, copy, tmp_path):
    flip_bit(copy / "sequences.parquet", 50)
    changed = json.loads(json.dumps(recipe))
    source = Path(recipe["stages"][0]["dataset"]["path"])
    original = source.read_text()
    try:
        source.write_text(original.replace("question", "answer"))
        with pytest.raises(StoreMismatchError, match="cannot repair the token table"):
            repair_run(copy, recipe=changed)
        with pytest.raises(StoreMismatchError, match="cannot repair the token table"):
            run(changed, copy)
    finally:
        source.write_text(original)
    run(recipe, copy)
    assert all_bytes(copy) == all_bytes(finished)


def test_nothing_is_withdrawn_where_the_run_cannot_be_continued(recipe, copy):
    flip_bit(copy / f"{ARRAY}/c/1/0", 77)
    before = all_bytes(copy)
    other = json.loads(json.dumps(recipe))
    other["stages"][1]["dtype"] = "float16"

    with pytest.raises(StoreMismatchError, match="made by another recipe"):
        repair_run(copy, recipe=other)
    assert all_bytes(copy) == before


def test_the_commands_say_what_is_wrong_and_what_they_did(copy):
    flip_bit(copy / f"{ARRAY}/c/1/0", 77)

    for command, code, said in (
        ("verify", 1, "hook_resid_post/c/1/0: checksum"),
        ("repair", 0, "mended activations"),
        ("verify", 0, "all is well"),
        ("clean", 0, ""),
    ):
        result = CliRunner().invoke(app, [command, str(copy)])
        assert result.exit_code == code, result.output
        assert said in result.output


class TestDeepVerification:
    @pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
    def test_what_the_model_gives_again_holds(self, recipe, tmp_path, dtype):
        changed = json.loads(json.dumps(recipe))
        changed["stages"][1]["dtype"] = dtype
        run(changed, tmp_path / "run")

        findings, holds = recheck_run(tmp_path / "run", n_sequences=4)
        assert holds
        assert [row[0] for row in findings[0].rows][-1] == "metrics/loss"

    def test_values_that_the_model_does_not_give_are_found_though_their_checksums_fit(self, recipe, copy):
        for part in range(2):
            chunk = copy / f"{ARRAY}/c/{part}/0"
            values = np.fromfile(chunk, np.float32)
            (values * np.float32(1.01)).tofile(chunk)

        findings, holds = recheck_run(copy)
        assert not holds
        assert [row[0] for row in findings[0].rows if row[-1] == "wrong"] == ["activations/blocks.1.hook_resid_post"]

    def test_the_same_seed_draws_the_same_sequences(self, copy):
        one, two, other = (recheck_run(copy, n_sequences=2, seed=seed)[0] for seed in (1, 1, 2))
        assert one == two
        assert one[0].rows[0][3] == other[0].rows[0][3]

    def test_another_model_is_refused(self, recipe, copy, tmp_path):
        model = Path(shutil.copytree(INDUCTION, tmp_path / "model"))
        flip_bit(model / "model.safetensors", -1)

        with pytest.raises(StoreMismatchError, match=r"model: .* -> "):
            recheck_run(copy, recipe={**recipe, "model": {**recipe["model"], "name": str(model)}})


STEPS = {
    "open": "actpipe.stores.writing.os.open",
    "size": "actpipe.stores.writing.os.posix_fallocate",
    "write": "actpipe.stores.writing.os.pwrite",
    "force": "actpipe.stores.layout.os.fsync",
    "folder": "pathlib.Path.mkdir",
    "rename": "pathlib.Path.replace",
}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS], ids=errno.errorcode.get)
@pytest.mark.parametrize("step", STEPS)
def test_a_disk_that_fails_at_any_step_costs_nothing_that_is_committed(
    recipe, finished, tmp_path, monkeypatch, step, code
):
    """The step fails at its first, third and later calls, in turn, until a run needs no more of them."""
    module, _, name = STEPS[step].rpartition(".")
    target = {"os": os, "Path": Path}[module.rpartition(".")[2]]
    real, out, allowed = getattr(target, name), tmp_path / "run", [0]

    def failing(*arguments, **options):
        if "run" not in str(arguments[0]) and not isinstance(arguments[0], int):
            return real(*arguments, **options)
        allowed[0] -= 1
        if allowed[0] < 0:
            raise OSError(code, os.strerror(code))
        return real(*arguments, **options)

    failures: list[str] = []
    for calls in (0, 5, 20):
        allowed[0] = calls
        with monkeypatch.context() as patch:
            patch.setattr(target, name, failing)
            try:
                run(recipe, out)
            except StorageError as error:
                failures.append(str(error))
        if out.is_dir():
            allowed_remedies = {Remedy.RESUME, Remedy.TOKENS}
            assert {problem.remedy for problem in find_problems(RunFolder(out))} <= allowed_remedies
    assert failures
    assert all(os.strerror(code).lower() in said and "same command again" in said for said in failures)
    run(recipe, out)
    assert all_bytes(out) == all_bytes(finished)


def test_a_full_disk_is_named_and_the_run_continues_once_there_is_room(recipe, finished, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if shutil.which("mount") is None or os.geteuid():
        pytest.skip("mounting needs privileges")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", disk], capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")
    try:
        with pytest.raises(StorageError, match="no space left on device; free some space"):
            run(recipe, disk / "run")
        subprocess.run(["mount", "-o", "remount,size=16m", disk], check=True)
        run(recipe, disk / "run")
        assert all_bytes(disk / "run") == all_bytes(finished)
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)

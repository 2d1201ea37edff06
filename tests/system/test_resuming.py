"""Killed at any moment, a run continues, and ends with the bytes of one that was never stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console
from ruamel.yaml import YAML
from support import INDUCTION, SPEECHES, all_bytes, make_recipe, run

from actpipe import open_store
from actpipe.describing import clean_run
from actpipe.errors import IncompleteStoreError, RunInUseError, StoreMismatchError
from actpipe.interrupting import INTERRUPTION
from actpipe.running import prepare, run_after
from actpipe.stores import locking
from actpipe.stores.layout import RunFolder
from actpipe.stores.locking import Owner, only_run_in
from actpipe.stores.verifying import Remedy, find_problems
from actpipe.telemetry import Telemetry

KILLS = 3


def long_recipe() -> dict:
    """160 parts: several seconds, so that there is always one to be killed in."""
    recipe = make_recipe(SPEECHES, hooks=["blocks.*.hook_resid_post", "blocks.0.attn.hook_pattern"], metrics=["loss"])
    recipe["stages"][0] |= {"max_tokens": 81_920, "context_length": 64}
    recipe["stages"][1] |= {"rows_per_part": 512, "batch_tokens": 512}
    recipe["stages"].append({"stage": "summarize_metrics"})
    return recipe


def write_recipe(recipe: dict, path: Path) -> Path:
    with path.open("w") as file:
        YAML().dump(recipe, file)
    return path


def start(recipe: Path, out: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "actpipe", "run", str(recipe), "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, text=True)


def n_commits(out: Path) -> int:
    return len(list((out / "commits").glob("part-*.json")))


def wait_for_commits(process: subprocess.Popen, out: Path, wanted: int) -> None:
    """Wait until a running process has committed so many parts."""
    while n_commits(out) < wanted and process.poll() is None:
        time.sleep(0.01)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The files of a run that was never stopped."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    recipe = write_recipe(long_recipe(), folder / "recipe.yaml")
    process = start(recipe, folder / "run")
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    return all_bytes(folder / "run")


def test_killed_again_and_again_it_ends_with_the_same_bytes(tmp_path, uninterrupted):
    recipe, out = write_recipe(long_recipe(), tmp_path / "recipe.yaml"), tmp_path / "run"
    seen = [0]
    for _ in range(KILLS):
        process = start(recipe, out)
        wait_for_commits(process, out, seen[-1] + 5)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        seen.append(n_commits(out))
        with pytest.raises(IncompleteStoreError, match=f"has {seen[-1]} of 160 parts"):
            open_store(out)

    process = start(recipe, out)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0
    assert "tokens are committed already" in output
    assert seen == sorted(set(seen))
    assert all_bytes(out) == uninterrupted
    assert find_problems(RunFolder(out)) == []


@pytest.mark.slow
def test_killed_while_tokenizing_it_starts_that_again(tmp_path, uninterrupted):
    recipe, out = write_recipe(long_recipe(), tmp_path / "recipe.yaml"), tmp_path / "run"
    process = start(recipe, out)
    while not (out / ".partial").exists() and process.poll() is None:
        time.sleep(0.001)
    process.kill()
    process.communicate()

    process = start(recipe, out)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    assert all_bytes(out) == uninterrupted


def test_killed_it_leaves_a_lock_that_keeps_no_one_out_and_nothing_that_clean_does_not_find(tmp_path):
    recipe, out = write_recipe(long_recipe(), tmp_path / "recipe.yaml"), tmp_path / "run"
    process = start(recipe, out)
    wait_for_commits(process, out, 3)
    process.kill()
    process.communicate()
    assert Owner.of(out / ".lock").pid == process.pid
    committed = {path: path.read_bytes() for path in (out / "commits").glob("part-*.json")}

    clean_run(out)
    assert not (out / ".partial").exists()
    assert {path: path.read_bytes() for path in (out / "commits").iterdir() if path.name != "tokens.json"} == committed
    assert {problem.remedy for problem in find_problems(RunFolder(out))} == {Remedy.RESUME}


@pytest.mark.parametrize(
    ("request_to_end", "code"),
    [pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow), (signal.SIGTERM, 143)],
)
def test_asked_to_end_it_exits_with_the_code_of_the_signal_and_a_word_on_how_to_continue(
    tmp_path, uninterrupted, request_to_end, code
):
    recipe, out = write_recipe(long_recipe(), tmp_path / "recipe.yaml"), tmp_path / "run"
    process = start(recipe, out)
    wait_for_commits(process, out, 3)
    process.send_signal(request_to_end)
    output, _ = process.communicate(timeout=60)

    assert process.returncode == code, output
    assert "the same command continues" in output
    assert "Traceback" not in output
    assert 3 <= n_commits(out) < 160
    assert not list((out / ".partial").glob("part-*"))
    process = start(recipe, out)
    process.communicate(timeout=200)
    assert process.returncode == 0
    assert all_bytes(out) == uninterrupted


def test_a_finished_run_is_left_as_it_is(corpus, tmp_path):
    recipe, out = make_recipe(corpus, metrics=["loss"]), tmp_path / "run"
    recipe["stages"].append({"stage": "summarize_metrics"})
    run(recipe, out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    run(recipe, out)

    after = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    changed = {path for path in {*before, *after} if before.get(path) != after.get(path)}
    assert changed <= {out / "log.jsonl", out / ".lock"}


def test_nothing_is_run_twice(corpus, tmp_path, monkeypatch):
    recipe, out = make_recipe(corpus), tmp_path / "run"
    run(recipe, out)
    monkeypatch.setattr(
        "actpipe.contexts.HookedModel.from_source", lambda *_, **__: pytest.fail("the model was loaded")
    )

    run(recipe, out)


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        (lambda r: r["stages"][1].update(dtype="float16"), "extract_activations.dtype: 'model' -> 'float16'"),
        (lambda r: r["stages"][1].update(hooks=["hook_embed"]), "extract_activations.hooks: "),
        (lambda r: r["stages"][0].update(max_tokens=64), "tokenize_text.max_tokens: None -> 64"),
        (lambda r: r["stages"][0]["dataset"].update(column="id"), "tokenize_text.dataset.column: 'text' -> 'id'"),
        (lambda r: r["model"].update(dtype="bfloat16"), "model.dtype: 'float32' -> 'bfloat16'"),
    ],
)
def test_a_changed_recipe_is_refused_with_the_difference(corpus, tmp_path, change, shown):
    out = tmp_path / "run"
    run(make_recipe(corpus), out)
    before = all_bytes(out)
    changed = make_recipe(corpus)
    change(changed)

    with pytest.raises(StoreMismatchError, match="made by another recipe") as caught:
        run(changed, out)
    assert shown in str(caught.value)
    assert all_bytes(out) == before


def test_another_model_under_the_same_name_is_refused(corpus, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(INDUCTION, model)
    run(make_recipe(corpus, model), tmp_path / "run")
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (model / "model.safetensors").write_bytes(weights)

    with pytest.raises(StoreMismatchError, match=r"model: model .* -> model "):
        run(make_recipe(corpus, model), tmp_path / "run")


def test_where_and_how_a_run_happens_may_change(corpus, tmp_path):
    recipe, out = make_recipe(corpus), tmp_path / "run"
    run(recipe, out)
    recipe["model"]["device"] = "auto"
    recipe["stages"][1] |= {"fsync": False, "queue_bytes": 1000}

    run(recipe, out)


def test_analyses_may_be_added_changed_and_left_out(corpus, tmp_path):
    recipe, out = make_recipe(corpus, hooks=["blocks.*.attn.hook_pattern"]), tmp_path / "run"
    run(recipe, out)
    scoring = {"stage": "score_heads"}
    run({**recipe, "stages": [*recipe["stages"], scoring]}, out)
    first = (out / "results" / "score_heads.json").read_bytes()
    run({**recipe, "stages": [*recipe["stages"], {**scoring, "exclude_bos": True}]}, out)
    second = (out / "results" / "score_heads.json").read_bytes()
    run({"model": recipe["model"], "stages": [{**scoring, "name": "again"}]}, out)

    assert json.loads(first)["settings"]["exclude_bos"] is False
    assert json.loads(second)["settings"]["exclude_bos"] is True
    assert (out / "results" / "again.json").exists()
    record = YAML(typ="safe").load((out / "run.yaml").read_text())
    assert [stage["stage"] for stage in record["recipe"]["stages"]] == [
        "tokenize_text",
        "extract_activations",
        "score_heads",
    ]


def test_a_second_run_in_the_same_folder_is_refused_while_the_first_is_at_work(corpus, tmp_path):
    with (
        only_run_in(RunFolder(tmp_path / "run")),
        pytest.raises(StoreMismatchError, match=f"in use by process {os.getpid()}"),
    ):
        run(make_recipe(corpus), tmp_path / "run")


def test_a_run_that_lost_its_lock_ends_and_clears_nothing_of_the_new_owners(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(locking, "BEAT_SECONDS", 0.001)
    out = tmp_path / "run"
    theirs = out / ".partial" / "part-00000001-0123456789ab" / "chunk"

    def lose_the_lock(_):
        (out / ".lock").write_text(json.dumps({"host": "elsewhere", "pid": 7, "started": "2026-01-01T00:00:00"}))
        theirs.parent.mkdir(parents=True)
        theirs.write_text("half a part")
        while INTERRUPTION.reason is None:
            pass

    stages, context = prepare(make_recipe(corpus), out, (), Telemetry(Console(quiet=True)))
    with pytest.raises(RunInUseError, match="taken over by process 7 on elsewhere"):
        run_after(lose_the_lock, stages, context)
    assert theirs.read_text() == "half a part"
    assert Owner.of(out / ".lock").host == "elsewhere"
    assert n_commits(out) == 0

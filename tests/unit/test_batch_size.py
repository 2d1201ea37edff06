"""The size of batches that a trial finds, and how long it holds."""

from __future__ import annotations

import json

import pytest
from actpipe.schemas.recipe import ExtractActivationsConfig
from hypothesis import given, settings
from hypothesis import strategies as st
from support import TEXTS, all_bytes, make_recipe, run

import actpipe
from actpipe.errors import StoreMismatchError
from actpipe.extraction.settling import settle_batch_tokens
from actpipe.extraction.trial import Measured, Trial, best_batch
from actpipe.running import plan_recipe
from actpipe.stores.layout import RunFolder


class Device:
    """Computes at a speed that saturates, in memory that grows with the batch."""

    def __init__(self, *, capacity, full_speed_at, seconds_each=1e-3):
        self.capacity = capacity
        self.full_speed_at = full_speed_at
        self.seconds_each = seconds_each
        self.tried = []

    def __call__(self, n_sequences):
        self.tried.append(n_sequences)
        if n_sequences > self.capacity:
            return None
        speed = min(n_sequences, self.full_speed_at) / self.seconds_each
        return Measured(n_sequences, speed, n_sequences / self.capacity, n_sequences / speed)


@pytest.mark.parametrize(
    ("device", "most", "found"),
    [
        (Device(capacity=1000, full_speed_at=8), 4096, 8),
        (Device(capacity=24, full_speed_at=512), 4096, 16),
        (Device(capacity=1, full_speed_at=512), 4096, 1),
        (Device(capacity=1000, full_speed_at=512), 16, 16),
        (Device(capacity=1000, full_speed_at=1), 4096, 1),
        (Device(capacity=1000, full_speed_at=512, seconds_each=25), 4096, 1),
    ],
)
def test_the_smallest_batch_of_full_speed_is_found(device, most, found):
    assert best_batch(device, first=1, most=most).batch_tokens == found


@pytest.mark.parametrize(("capacity", "tried"), [(1000, [16, 32, 64]), (9, [16, 8]), (24, [16]), (1, [16, 8, 4, 2, 1])])
def test_smaller_batches_than_the_first_are_tried_where_it_does_not_fit(capacity, tried):
    device = Device(capacity=capacity, full_speed_at=1)
    best_batch(device, first=16, most=512)

    assert device.tried == tried


def test_nothing_is_found_where_not_even_one_sequence_fits():
    assert best_batch(Device(capacity=0, full_speed_at=1), first=8, most=64) is None


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 300), st.integers(1, 300))
def test_no_batch_is_tried_that_is_known_not_to_fit(capacity, full_speed_at, first, most):
    device = Device(capacity=capacity, full_speed_at=full_speed_at)
    found = best_batch(device, first=first, most=most)

    assert max(device.tried) <= most
    assert all(n_sequences <= first for n_sequences in device.tried if n_sequences > capacity)
    assert found.share <= 1


EXTRACT = {"hooks": ["blocks.*.hook_resid_post"], "metrics": ["loss"], "batch_tokens": "auto"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ACTPIPE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "batch_tokens"


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "lines.txt").write_text("\n".join(TEXTS * 3))
    return tmp_path / "lines.txt"


@pytest.fixture
def trials(monkeypatch):
    """Count the trials, whose answers are given: speed is not the same twice."""
    answers, asked = iter([96, 64, 32, 160]), []

    def best(trial):
        asked.append(trial)
        assert trial.measure(1).tokens_per_second > 0
        return Measured(next(answers), 1e4, 0.25, 0.01)

    monkeypatch.setattr(Trial, "best", best)
    return asked


def settled(run_folder):
    return json.loads((run_folder / "commits" / "batch_tokens.json").read_text())["batch_tokens"]


def stored(run_folder):
    return {path: data for path, data in all_bytes(run_folder).items() if path.startswith("store.zarr/activations")}


def test_a_run_uses_what_was_found_and_gives_the_bytes_of_that_number(corpus, tmp_path, trials):
    run(make_recipe(corpus, **EXTRACT), tmp_path / "auto")
    run(make_recipe(corpus, **EXTRACT | {"batch_tokens": 96}), tmp_path / "given")

    assert len(trials) == 1
    assert settled(tmp_path / "auto") == 96
    assert stored(tmp_path / "auto") == stored(tmp_path / "given")
    assert not (tmp_path / "given/commits/batch_tokens.json").exists()
    (event,) = [
        line for line in map(json.loads, (tmp_path / "auto/log.jsonl").read_text().splitlines())
        if line["event"] == "batch size"
    ]  # fmt: skip
    assert (event["batch_tokens"], event["stage"]) == (96, "extract_activations")


def test_what_was_found_is_remembered_for_runs_like_it_and_no_others(corpus, tmp_path, trials, cache):
    run(make_recipe(corpus, **EXTRACT), tmp_path / "first")
    run(make_recipe(corpus, **EXTRACT), tmp_path / "second")
    assert [settled(tmp_path / name) for name in ("first", "second")] == [96, 96]
    (planned,) = [f for f in plan_recipe(make_recipe(corpus, **EXTRACT), out=tmp_path / "planned") if f.note]
    assert planned.note == "batches of 96 tokens: found by an earlier trial on CPU"
    assert len(trials) == 1
    run(make_recipe(corpus, **EXTRACT | {"hooks": ["blocks.0.attn.hook_pattern"]}), tmp_path / "third")
    assert settled(tmp_path / "third") == 64
    assert len(list(cache.glob("*.json"))) == 2
    (broken, _) = sorted(cache.glob("*.json"))
    broken.write_text("{")
    run(make_recipe(corpus, **EXTRACT), tmp_path / "fourth")
    run(make_recipe(corpus, **EXTRACT | {"hooks": ["blocks.0.attn.hook_pattern"]}), tmp_path / "fifth")
    assert len(trials) == 3


def test_a_run_that_is_continued_keeps_its_number(corpus, tmp_path, trials, monkeypatch):
    recipe = make_recipe(corpus, **EXTRACT)
    run(recipe, tmp_path / "run")
    whole = all_bytes(tmp_path / "run")
    (tmp_path / "run/commits/part-00000001.json").unlink()
    monkeypatch.setenv("ACTPIPE_CACHE", str(tmp_path / "another cache"))
    run(recipe, tmp_path / "run")

    assert len(trials) == 1
    assert all_bytes(tmp_path / "run") == whole
    with pytest.raises(StoreMismatchError, match="batch_tokens"):
        run(make_recipe(corpus, **EXTRACT | {"batch_tokens": 64}), tmp_path / "run")


def test_workers_of_one_run_agree_without_a_trial_of_their_own(tmp_path):
    config = ExtractActivationsConfig.from_json(json.dumps(EXTRACT))
    folder = RunFolder(tmp_path / "run")
    folder.commits.mkdir(parents=True)
    folder.batch_tokens.write_text('{"batch_tokens": 48}')

    found = settle_batch_tokens(config, folder, lambda: pytest.fail("the model was loaded"), context_length=32)
    assert found == 48


def test_statistics_are_taken_in_batches_of_that_size_too(corpus, tmp_path, trials):
    def recipe(batch_tokens):
        reduction = {"stage": "reduce_activations", "hooks": ["blocks.0.hook_resid_post"], "batch_tokens": batch_tokens}
        made = make_recipe(corpus)
        return made | {"stages": [made["stages"][0], reduction]}

    run(recipe("auto"), tmp_path / "auto")
    run(recipe(96), tmp_path / "given")
    found, wanted = (actpipe.open_results(tmp_path / name, "reduce_activations") for name in ("auto", "given"))

    assert len(trials) == 1
    assert found.dataset.load().drop_attrs().identical(wanted.dataset.load().drop_attrs())


@pytest.mark.parametrize("settings", [{}, {"hooks": ["blocks.*.attn.hook_pattern"]}, {"chunk_tokens": 8}], ids=str)
def test_a_real_trial_finds_a_number_of_whole_sequences(corpus, tmp_path, settings):
    run(make_recipe(corpus, **EXTRACT | settings), tmp_path / "run")

    assert settled(tmp_path / "run") % 32 == 0
    assert settled(tmp_path / "run") > 0

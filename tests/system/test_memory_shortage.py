"""A batch that does not fit into memory is run again as smaller ones: nothing is lost, and nothing counts twice."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
import xarray as xr
from support import MODELS, TEXTS, all_bytes, make_recipe, run

from actpipe import HookedModel, open_results, open_store
from actpipe.describing import verify_run
from actpipe.devices import ran_out_of_memory, shortage_in_words
from actpipe.errors import DeviceMemoryError
from actpipe.repairing import recheck_run
from actpipe.stores.writing import read_commit

EMBED, RESIDUAL = "blocks.0.hook_resid_pre", "blocks.1.hook_resid_post"
HOOKS = [EMBED, "blocks.*.attn.hook_pattern", "blocks.0.mlp.hook_post", RESIDUAL]


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("\n".join(TEXTS * 3))
    return path


@pytest.fixture
def id_corpus(write_jsonl):
    draw = np.random.default_rng(0)
    lengths = [1, 2, 24, 25, 40, 7, 24, 3, 12, 24, 30, 1, 9, 9, 9, 24, 17]
    return write_jsonl([{"ids": draw.integers(5, 199, length).tolist()} for length in lengths])


@pytest.fixture
def shortage(monkeypatch):
    """Let models that are loaded run out of memory in the middle of passes that a condition picks."""

    def begin(too_much):
        original = HookedModel.from_source.__func__

        def short(cls, *args, **kwargs):
            model = original(cls, *args, **kwargs)

            def look(_, given, kwargs):
                hidden = given[0] if given else kwargs["hidden_states"]
                if too_much(hidden.shape[0], hidden.shape[1]):
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

            model.anatomy.blocks[1].register_forward_pre_hook(look, with_kwargs=True)
            return model

        monkeypatch.setattr(HookedModel, "from_source", classmethod(short))

    yield begin
    monkeypatch.undo()


def documents(corpus, **extract):
    recipe = make_recipe(corpus, MODELS / "llama", **extract)
    recipe["stages"][0] |= {"layout": "documents", "context_length": 24, "prepend_bos": False}
    recipe["stages"][0]["dataset"]["column"] = "ids"
    return recipe


def events(run_folder, kind):
    lines = map(json.loads, (run_folder / "log.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == kind]


def stored_bytes(run_folder):
    return {
        path: data for path, data in all_bytes(run_folder).items() if path.startswith(("store.zarr", "commits/part"))
    }


@pytest.mark.parametrize("settings", [{}, {"dtype": "int8", "codec": "zstd"}, {"queue_bytes": 1}], ids=str)
def test_what_does_not_fit_is_stored_as_with_batches_of_half_the_size(corpus, tmp_path, shortage, settings):
    extract = {"hooks": HOOKS, "metrics": ["loss", "correct"], "rows_per_part": 160, **settings}
    run(make_recipe(corpus, **extract, batch_tokens=64), tmp_path / "small")
    shortage(lambda n_sequences, length: n_sequences * length > 64 and length > 16)
    run(make_recipe(corpus, **extract, batch_tokens=160), tmp_path / "short")

    assert stored_bytes(tmp_path / "short") == stored_bytes(tmp_path / "small")
    assert verify_run(tmp_path / "short")[0] == []
    (event,) = events(tmp_path / "short", "smaller batches")
    assert (event["batch_tokens"], event["device"]) == (80, "cpu")
    counted, wanted = (events(tmp_path / name, "work finished")[-1] for name in ("short", "small"))
    assert (counted["done"], counted["n_bytes"]) == (wanted["done"], wanted["n_bytes"])


@pytest.mark.parametrize("seed", range(4))
def test_memory_that_runs_out_at_any_time_costs_no_row(id_corpus, tmp_path, shortage, seed):
    extract = {"hooks": [*HOOKS, "blocks.1.attn.hook_z"], "rows_per_part": 50, "batch_tokens": 128}
    run(documents(id_corpus, **extract), tmp_path / "plain")
    draw = random.Random(seed)
    shortage(lambda n_sequences, length: n_sequences > 1 and length > 16 and draw.random() < 0.5)
    run(documents(id_corpus, **extract), tmp_path / "short")
    found, wanted = open_store(tmp_path / "short"), open_store(tmp_path / "plain")

    assert events(tmp_path / "short", "smaller batches")
    assert verify_run(tmp_path / "short")[0] == []
    assert events(tmp_path / "short", "work finished")[-1]["done"] == wanted.n_rows
    for name in wanted.array_names:
        exact = name.startswith("tokens/") or name == f"activations/{EMBED}"
        tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-4, "atol": 2e-5}
        np.testing.assert_allclose(found[name].compute(), wanted[name].compute(), err_msg=name, **tolerance)


@pytest.mark.parametrize("hooks", [[EMBED, RESIDUAL], ["blocks.*.attn.hook_pattern"]])
def test_no_row_counts_twice_in_statistics(corpus, tmp_path, shortage, hooks):
    statistics = ["pattern_scores"]
    if RESIDUAL in hooks:
        statistics = ["mean", "variance", "extremes", "covariance", "histogram", "top_rows", "mean_by_token"]

    def recipe(batch_tokens):
        reduction = {"stage": "reduce_activations", "hooks": hooks, "statistics": statistics, "k": 3}
        reduction |= {"rows_per_part": 160, "batch_tokens": batch_tokens}
        made = make_recipe(corpus)
        return made | {"stages": [made["stages"][0], reduction]}

    run(recipe(64), tmp_path / "small")
    shortage(lambda n_sequences, length: n_sequences * length > 64 and length > 16)
    run(recipe(160), tmp_path / "short")
    found, wanted = (open_results(tmp_path / name, "reduce_activations").dataset.load() for name in ("short", "small"))

    xr.testing.assert_identical(found.drop_attrs(), wanted.drop_attrs())
    counted, expected = (events(tmp_path / name, "work finished")[-1]["done"] for name in ("short", "small"))
    assert counted == expected
    assert len(events(tmp_path / "short", "smaller batches")) == 1


def test_clipped_values_are_counted_once(corpus, tmp_path, shortage, monkeypatch):
    extract = {"hooks": [EMBED, RESIDUAL], "dtype": "float16", "on_overflow": "clip", "rows_per_part": 160}
    plain = HookedModel.from_source.__func__

    def scaled(cls, *args, **kwargs):
        model = plain(cls, *args, **kwargs)
        model.anatomy.embed.register_forward_hook(lambda *given: given[-1] * 1e7)
        return model

    monkeypatch.setattr(HookedModel, "from_source", classmethod(scaled))
    monkeypatch.setattr("actpipe.stages.extract_activations.prove_hooks", lambda *_: None)
    run(make_recipe(corpus, **extract, batch_tokens=64), tmp_path / "small")
    shortage(lambda n_sequences, length: n_sequences > 2)
    run(make_recipe(corpus, **extract, batch_tokens=160), tmp_path / "short")
    found, wanted = (read_commit(tmp_path / name / "commits/part-00000000.json") for name in ("short", "small"))

    assert wanted.n_clipped
    assert found == wanted


def test_a_sequence_that_runs_in_pieces_runs_in_smaller_ones(corpus, tmp_path, shortage):
    extract = {"hooks": HOOKS, "metrics": ["loss"], "batch_tokens": 128}
    run(make_recipe(corpus, **extract, chunk_tokens=8), tmp_path / "small")
    shortage(lambda n_sequences, length: n_sequences > 2 or length == 32 or (n_sequences == 1 and length > 8))
    recipe = make_recipe(corpus, **extract, chunk_tokens=32)
    run(recipe, tmp_path / "short")
    found, wanted = open_store(tmp_path / "short"), open_store(tmp_path / "small")

    assert verify_run(tmp_path / "short")[0] == []
    assert events(tmp_path / "short", "smaller batches")[-1]["chunk_tokens"] == 8
    for name in wanted.array_names:
        np.testing.assert_allclose(found[name].compute(), wanted[name].compute(), atol=2e-5, err_msg=name)
    assert recheck_run(tmp_path / "short", recipe=recipe)[1]


def test_a_sequence_that_does_not_fit_alone_is_refused_and_done_later(corpus, tmp_path, shortage, monkeypatch):
    recipe = make_recipe(corpus, hooks=HOOKS)
    with monkeypatch.context():
        shortage(lambda n_sequences, length: length > 16)
        with pytest.raises(DeviceMemoryError, match=r"32 tokens cannot be run on cpu.*2\.00 GiB.*chunk_tokens"):
            run(recipe, tmp_path / "run")
    monkeypatch.undo()
    run(recipe, tmp_path / "run")
    run(recipe, tmp_path / "plain")

    assert stored_bytes(tmp_path / "run") == stored_bytes(tmp_path / "plain")


def test_the_comparison_of_verify_counts_no_value_twice(corpus, tmp_path, shortage):
    recipe = make_recipe(corpus, hooks=[EMBED, RESIDUAL], chunk_tokens=32)
    run(recipe, tmp_path / "run")
    plain, _ = recheck_run(tmp_path / "run", recipe=recipe, n_sequences=4)
    shortage(lambda n_sequences, length: length == 32)
    short, holds = recheck_run(tmp_path / "run", recipe=recipe, n_sequences=4)

    assert holds
    assert [row[3] for row in short[0].rows] == [row[3] for row in plain[0].rows]


@pytest.mark.parametrize(
    "allocate", [lambda: torch.empty(2**60), lambda: np.empty(2**57), lambda: bytearray(2**60)], ids="abc"
)
def test_what_allocators_say_is_understood(allocate):
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        allocate()

    assert ran_out_of_memory(caught.value)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: 16 bytes (12)\n",
            "DefaultCPUAllocator: can't allocate memory: 16 bytes (12)",
        ),
        (
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB.",
            "CUDA out of memory. Tried to allocate 2.00 GiB",
        ),
        ("", "RuntimeError"),
    ],
)
def test_what_people_are_told_is_short(said, words):
    assert shortage_in_words(RuntimeError(said)) == words


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes cannot be multiplied"), ValueError("out of memory"), KeyError()]
)
def test_other_errors_are_not_taken_for_it(error):
    assert not ran_out_of_memory(error)

"""The tokens listed for a unit are those where it is largest, in their context, whatever the blocks."""

from __future__ import annotations

import json
from functools import reduce

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file
from support import TEXTS, make_recipe, run

from actpipe import open_results, open_store
from actpipe.compute.accumulators import RowTokens
from actpipe.errors import RecipeError
from actpipe.jobs.units import Measures, choose_tokens

HOOKS = ["blocks.1.mlp.hook_post", "blocks.*.attn.hook_z", "blocks.0.hook_resid_post"]
WITH_MARKUP = ["<script>alert(1)</script> & <b>bold</b>", *TEXTS]


def test_each_unit_has_the_rows_of_its_largest_values_whatever_the_blocks(corpus, tmp_path):
    recipe = make_recipe(corpus, hooks=HOOKS)
    more = {"hooks": HOOKS[:2], "examples": 4, "lowest": True, "min_count": 2, "tokens": 3, "keep_means": True}
    more["units"] = ["0-3"]
    recipe["stages"] += [
        {"stage": "top_examples", **more},
        {"stage": "top_examples", **more, "name": "small", "block_bytes": 60_000},
    ]
    run(recipe, tmp_path / "run")
    store, result = open_store(tmp_path / "run"), open_results(tmp_path / "run", "top_examples")
    units = {
        "blocks.1.mlp.hook_post": store["blocks.1.mlp.hook_post"].compute(),
        **{
            f"blocks.{i}.attn.hook_z": np.linalg.norm(store[f"blocks.{i}.attn.hook_z"].compute(), axis=-1)
            for i in (0, 1)
        },
    }

    table, data = result.table, result.dataset.load()
    assert {str(name) for name in data["hook"].values} == set(units)
    for number in range(data.sizes["unit"]):
        one = data.isel(unit=number)
        hook, unit = str(one["hook"].values), int(one["number"])
        values = units[hook][:, unit].astype(np.float64)
        these = table[(table["hook"] == hook) & (table["unit"] == unit)]
        highest, lowest = (these[these["end"] == end] for end in ("highest", "lowest"))
        np.testing.assert_allclose(highest["value"], np.sort(values)[::-1][:4], rtol=1e-6)
        np.testing.assert_allclose(lowest["value"], np.sort(values)[:4], rtol=1e-6)
        np.testing.assert_allclose(values[highest["row"]], highest["value"], rtol=1e-6)
        assert float(one["density"]) == (values > 0).mean()
        assert float(one["mean"]) == pytest.approx(values.mean(), abs=1e-7)
        assert float(one["max"]) == pytest.approx(values.max())

    small = open_results(tmp_path / "run", "small")
    assert small.table.equals(table)
    for name in data.data_vars:
        if data[name].dtype.kind == "f":
            np.testing.assert_allclose(small.dataset[name], data[name], atol=1e-12)


def test_means_by_token_are_those_of_its_rows_and_rare_tokens_are_not_listed(corpus, tmp_path):
    recipe = make_recipe(corpus, hooks=HOOKS)
    recipe["stages"].append(
        {
            "stage": "top_examples",
            "hooks": HOOKS[:1],
            "tokens": 3,
            "min_count": 3,
            "keep_means": True,
            "units": [3, "7-8"],
        }
    )
    run(recipe, tmp_path / "run")
    store, data = open_store(tmp_path / "run"), open_results(tmp_path / "run", "top_examples").dataset.load()
    ids, values = store["tokens/input_ids"].compute(), store[HOOKS[0]].compute().astype(np.float64)

    assert data["number"].values.tolist() == [3, 7, 8]
    assert [str(label) for label in data["label"].values] == ["neuron 3", "neuron 7", "neuron 8"]
    for number, unit in enumerate([3, 7, 8]):
        means = {token: values[ids == token, unit].mean() for token in np.unique(ids)}
        np.testing.assert_allclose(data["mean_by_token"][number], list(means.values()), atol=1e-12)
        common = sorted((mean, token) for token, mean in means.items() if (ids == token).sum() >= 3)
        assert data["low_token"][number].values.tolist() == [token for _, token in common[:3]]
        assert data["high_token"][number].values.tolist() == [token for _, token in common[:-4:-1]]


def test_latents_of_which_only_the_largest_are_stored_are_those_that_are_stored_whole(corpus, tmp_path):
    random = np.random.default_rng(0)
    weights = {"W_enc": random.normal(size=(128, 24)).astype(np.float32), "b_enc": np.full(24, -3.0, np.float32)}
    save_file(weights, tmp_path / "sae.safetensors")
    entry = {"hooks": ["blocks.0.hook_resid_post"], "encoder": str(tmp_path / "sae.safetensors")}
    recipe = make_recipe(corpus, derive=[{"name": "whole", **entry}, {"name": "sparse", **entry, "top_k": 24}])
    recipe["stages"] += [
        {"stage": "top_examples", "name": name, "hooks": [f"derived/{name}/*"], "examples": 3, "units": ["0-20", 23]}
        for name in ("whole", "sparse")
    ]
    run(recipe, tmp_path / "run")
    whole, sparse = (open_results(tmp_path / "run", name) for name in ("whole", "sparse"))

    assert len(whole.table)
    assert whole.table["value"].min() > 0
    assert set(whole.table["label"]) <= {f"latent {number}" for number in range(24)}
    left_out = ["hook"]
    assert whole.table.drop(columns=left_out).equals(sparse.table.drop(columns=left_out))
    for name in ("density", "mean", "max", "high_token_mean"):
        np.testing.assert_allclose(whole.dataset[name], sparse.dataset[name])


@pytest.mark.parametrize(("hook", "d_in"), [("blocks.0.hook_resid_post", 128), ("blocks.0.attn.hook_z", 32)])
def test_a_given_direction_is_a_unit(corpus, tmp_path, hook, d_in):
    random = np.random.default_rng(1)
    tensors = {"W": random.normal(size=(d_in, 2)), "mean": random.normal(size=d_in), "b": random.normal(size=2)}
    save_file(tensors, tmp_path / "d.safetensors", metadata={"labels": json.dumps(["happy", "sad"])})
    recipe = make_recipe(corpus, hooks=[hook])
    recipe["stages"].append({"stage": "top_examples", "hooks": [hook], "directions": str(tmp_path / "d.safetensors")})
    run(recipe, tmp_path / "run")
    rows = open_store(tmp_path / "run")[hook].compute().astype(np.float64)
    values = ((rows - tensors["mean"]) @ tensors["W"] + tensors["b"]).reshape(len(rows), -1)
    data = open_results(tmp_path / "run", "top_examples").dataset.load()

    heads = [""] if d_in == 128 else [f"head {number}, " for number in range(4)]
    assert [str(label) for label in data["label"].values] == [
        head + name for head in heads for name in ("happy", "sad")
    ]
    np.testing.assert_allclose(data["max"], values.max(0), rtol=1e-5)
    np.testing.assert_allclose(data["mean"], values.mean(0), atol=1e-5)


@pytest.mark.parametrize(
    ("tokenize", "extract"),
    [
        ({}, {}),
        ({"layout": "documents"}, {}),
        ({"layout": "documents", "context_length": 16, "overflow": "windows", "stride": 8}, {}),
        ({}, {"keep": {"every": 3}}),
    ],
    ids=["packed", "documents", "windows", "kept"],
)
def test_context_is_what_the_model_saw_around_the_token(corpus, tmp_path, tokenize, extract):
    recipe = make_recipe(corpus, **extract)
    recipe["stages"][0] |= tokenize
    recipe["stages"].append(
        {"stage": "top_examples", "hooks": ["blocks.0.hook_resid_post"], "before": 6, "after": 2, "units": ["0-9"]}
    )
    run(recipe, tmp_path / "run")
    store, table = open_store(tmp_path / "run"), open_results(tmp_path / "run", "top_examples").table
    kept = np.arange(store.n_rows) if store.kept_rows is None else store.kept_rows.read(0, store.n_rows)[0]
    sequences = list(store.tokens.read_sequences())
    documents = store.documents.of_rows(table["row"].to_numpy())

    for row, document in zip(table.itertuples(), documents, strict=True):
        place = kept[row.row]
        (sequence,) = (one for one in sequences if one.first_row <= place < one.row_stop)
        at = place - sequence.first_row + sequence.n_context
        assert (row.position, row.token_id) == (store["tokens/position"][row.row].compute(), sequence.ids[at])
        assert row.before + row.token + row.after == store.decode(sequence.ids[max(0, at - 6) : at + 3])
        assert row.token == store.decode(sequence.ids[at : at + 1])
        assert row.document == document


def test_text_with_markup_is_escaped_in_the_report(write_jsonl, tmp_path):
    recipe = make_recipe(write_jsonl([{"id": f"d{i}", "text": text} for i, text in enumerate(WITH_MARKUP)]))
    recipe["stages"] += [
        {"stage": "top_examples", "hooks": ["blocks.0.hook_resid_post"], "shown": 128, "before": 40, "after": 40},
        {"stage": "write_report"},
    ]
    run(recipe, tmp_path / "run")
    page = (tmp_path / "run" / "report.html").read_text()
    table = open_results(tmp_path / "run", "top_examples").table

    assert (table["before"] + table["token"] + table["after"]).str.contains("<script>alert").any()
    body = page[page.index("<body>") :]
    assert "&lt;script&gt;" in body
    assert "<script>alert" not in page
    assert "<mark>" in body


@pytest.mark.parametrize("stage", ["describe_residual", "fit_directions"])
def test_latents_of_which_only_the_largest_are_stored_are_no_rows_of_a_space(corpus, tmp_path, stage):
    weights = {"W_enc": np.ones((128, 24), np.float32), "b_enc": np.zeros(24, np.float32)}
    save_file(weights, tmp_path / "sae.safetensors")
    entry = {"hooks": ["blocks.0.hook_resid_post"], "encoder": str(tmp_path / "sae.safetensors"), "top_k": 4}
    recipe = make_recipe(corpus, derive=[{"name": "sae", **entry}])
    label = {"label": "line"} if stage == "fit_directions" else {}
    recipe["stages"].append({"stage": stage, "hooks": ["derived/sae/*"], **label})

    with pytest.raises(RecipeError, match="holds the largest latents only"):
        run(recipe, tmp_path / "run")


MEASURES = Measures(3, lowest=True)
TIED = st.lists(st.sampled_from([-1.0, -0.5, 0.0, 0.5, 2.0]), min_size=2, max_size=20)


@given(TIED, st.lists(st.integers(1, 19), max_size=3), st.randoms())
def test_ties_go_to_the_earlier_row_however_rows_are_cut_and_ordered(values, cuts, random):
    column = np.array(values)
    order = list(range(len(values)))
    random.shuffle(order)
    pieces = [
        np.array(piece, int) for piece in np.split(np.array(order), sorted(cut for cut in cuts if cut < len(order)))
    ]

    for name, sign in (("highest", -1), ("lowest", 1)):
        top = MEASURES.accumulators[name]
        states = []
        for piece in pieces:
            if len(piece):
                rows, numbers = torch.from_numpy(column[piece, None]).float(), torch.from_numpy(piece)
                states.append(top.of(rows, RowTokens(row=numbers, position=numbers, token=numbers)))
        found = top.finish(reduce(top.merge, states))
        expected = np.argsort(sign * column, kind="stable")[:3]
        assert found["top_row"][:, 0].tolist() == expected.tolist()
        assert found["top_value"][:, 0].tolist() == column[expected].tolist()


def test_tokens_of_equal_means_come_by_their_ids_and_rare_ones_never():
    mean = np.array([[1.0], [3.0], [1.0], [9.0], [0.0]])
    high, low = choose_tokens(mean, np.array([5, 5, 5, 1, 5]), 3, 2)

    assert high[:, 0].tolist() == [1, 0, 2]
    assert low[:, 0].tolist() == [4, 0, 2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hooks": ["blocks.1.hook_resid_post"]}, "does not store it"),
        ({"units": [128]}, "has 128 units, numbered from 0"),
        ({"units": ["7-5"]}, "names none"),
        ({"units": []}, "units"),
        ({"directions": "none.safetensors"}, "cannot read .*none.safetensors"),
        ({"directions": "wrong.safetensors"}, "directions take 5 values"),
        ({"directions": "nameless.safetensors"}, "needs a matrix W"),
        ({"tokens": 0, "keep_means": True}, "set `tokens` above 0"),
        ({"examples": 100_000}, "would list 12,800,000 examples"),
    ],
)
def test_what_cannot_be_listed_is_refused_before_anything_runs(corpus, tmp_path, monkeypatch, settings, message):
    monkeypatch.chdir(tmp_path)
    save_file({"W": np.zeros((5, 2), np.float32)}, tmp_path / "wrong.safetensors")
    save_file({"V": np.zeros((5, 2), np.float32)}, tmp_path / "nameless.safetensors")
    recipe = make_recipe(corpus)
    recipe["stages"].append({"stage": "top_examples", "hooks": ["blocks.0.hook_resid_post"], **settings})

    with pytest.raises(RecipeError, match=message):
        run(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()

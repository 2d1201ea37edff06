"""The lens against the model itself, and its fit against least squares in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support import MODELS, make_recipe, run

from actpipe import HookedModel, open_results, open_store
from actpipe.compute.lens import LENS_METRICS, fit_affine, lens_metrics, sum_affine
from actpipe.errors import ActpipeError
from actpipe.jobs.lens import look_through_lens, read_translators, rows_of_split
from actpipe.lenses import lens_of

FAMILIES = ["gpt2", "llama", "gemma2"]
LAST = "blocks.1.hook_resid_post"


def recipe_of(folder, family, *stages, seed=1):
    generator = np.random.default_rng(seed)
    path = folder / "corpus.jsonl"
    path.write_text("".join(f'{{"ids": {generator.integers(5, 199, 20).tolist()}}}\n' for _ in range(9)))
    recipe = make_recipe(
        path,
        MODELS / family,
        hooks=["blocks.*.hook_resid_pre", "blocks.-1.hook_resid_post", "ln_final.hook_scale"],
        metrics=["loss", "correct"],
        rows_per_part=32,
    )
    recipe["stages"][0]["dataset"]["column"] = "ids"
    return {**recipe, "stages": [*recipe["stages"], *stages]}


@pytest.fixture(scope="module", params=FAMILIES)
def looked(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    stages = [
        {"stage": "logit_lens", "block_bytes": 40_000},
        {"stage": "logit_lens", "name": "as-in-transformerlens", "norm": "final_scale"},
        {"stage": "logit_lens", "name": "tuned", "translators": "fit", "validation_fraction": 0.4},
    ]
    run(recipe_of(folder, request.param, *stages), folder / "run")
    return folder / "run", HookedModel.from_pretrained(str(MODELS / request.param), device="cpu")


def test_the_last_stream_gives_the_models_own_loss_and_predictions(looked):
    folder, _ = looked
    store, table = open_store(folder), open_results(folder, "logit_lens").table.set_index("stream")

    assert list(table.index) == ["0_pre", "1_pre", "final_post"]
    last = table.loc["final_post"]
    assert last["loss"] == pytest.approx(np.nanmean(store["metrics/loss"].compute()), abs=1e-4)
    assert last["agreement"] == 1.0
    assert last["kl"] == pytest.approx(0.0, abs=1e-5)
    assert last["probability"] == pytest.approx(np.nanmean(np.exp(-store["metrics/loss"].compute())), abs=1e-5)


@pytest.mark.parametrize(("name", "final_scale"), [("logit_lens", False), ("as-in-transformerlens", True)])
def test_every_layer_is_the_stream_through_the_final_norm_and_the_unembedding(looked, name, final_scale):
    folder, model = looked
    store, table = open_store(folder), open_results(folder, name).table.set_index("stream")
    ids, sequence = store["tokens/input_ids"].compute(), store["tokens/sequence"].compute()
    follows = np.flatnonzero(sequence[1:] == sequence[:-1])
    x = store["blocks.1.hook_resid_pre"].compute().astype(np.float64)
    if model.shape.norm == "LN":
        x = x - x.mean(-1, keepdims=True)
    scale = np.sqrt((x**2).mean(-1, keepdims=True) + lens_of(model).norm.epsilon)
    if final_scale:
        scale = store["ln_final.hook_scale"].compute().astype(np.float64)
    weights = model.weights
    normed = x / scale * weights["ln_final.w"].double().numpy()
    if model.shape.norm == "LN":
        normed = normed + weights["ln_final.b"].double().numpy()
    logits = normed @ weights.W_U.double().numpy() + weights.b_U.double().numpy()
    if (cap := model.shape.logit_softcap) is not None:
        logits = cap * np.tanh(logits / cap)
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    target = log_probabilities[follows, ids[follows + 1]]

    row = table.loc["1_pre"]
    assert row["loss"] == pytest.approx(-target.mean(), abs=1e-4)
    assert row["rank"] == pytest.approx((log_probabilities[follows] > target[:, None]).sum(-1).mean(), abs=0.05)


def test_what_is_found_does_not_depend_on_the_size_of_blocks(looked):
    folder, model = looked
    store = open_store(folder)

    whole, _ = look_through_lens(store, lens_of(model), block_bytes=2**30)
    pieces, _ = look_through_lens(store, lens_of(model), block_bytes=3000)
    np.testing.assert_allclose(pieces.mean, whole.mean, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(pieces.count, whole.count)


def test_what_was_fitted_on_one_run_is_used_on_another(looked, tmp_path):
    folder, model = looked
    file = open_results(folder, "tuned").files / "translators.safetensors"
    assert sorted(load_file(file)) == ["0_pre.bias", "0_pre.weight", "1_pre.bias", "1_pre.weight"]

    recipe = recipe_of(
        tmp_path, Path(model.source.name).name, {"stage": "logit_lens", "translators": str(file)}, seed=2
    )
    run(recipe, tmp_path / "run")
    other, found = open_store(tmp_path / "run"), open_results(tmp_path / "run", "logit_lens").table
    x = other["blocks.1.hook_resid_pre"].compute().astype(np.float64)
    weight, bias = (load_file(file)[f"1_pre.{name}"].double().numpy() for name in ("weight", "bias"))
    lens = lens_of(model)
    with torch.inference_mode():
        logits = lens.unembed(lens.norm(torch.from_numpy((x @ weight + bias).astype(np.float32)))).double()
    ids, sequence = other["tokens/input_ids"].compute(), other["tokens/sequence"].compute()
    follows = np.flatnonzero(sequence[1:] == sequence[:-1])
    loss = -logits.log_softmax(-1).numpy()[follows, ids[follows + 1]].mean()
    assert found.set_index("stream").loc["1_pre", "loss"] == pytest.approx(loss, abs=1e-3)
    assert found.set_index("stream").loc["final_post", "kl"] == pytest.approx(0.0, abs=1e-5)


def test_the_same_documents_through_the_written_translators_give_the_fits_own_numbers(looked):
    folder, model = looked
    store = open_store(folder)
    held_out = rows_of_split(store, 0.4, 0, validation=True)
    written = read_translators(
        open_results(folder, "tuned").files / "translators.safetensors", ["0_pre", "1_pre"], store.shape.d_model
    )

    sums, _ = look_through_lens(store, lens_of(model), block_bytes=2**20, translators=written, choose=held_out)
    table = open_results(folder, "tuned").table
    np.testing.assert_allclose(
        table[list(LENS_METRICS)].to_numpy().reshape(-1), sums.over_all().mean[0], rtol=1e-5, atol=1e-5
    )


def test_another_file_of_translators_is_another_result(looked, tmp_path):
    folder, model = looked
    tensors = load_file(open_results(folder, "tuned").files / "translators.safetensors")
    file = tmp_path / "lens.safetensors"
    recipe = recipe_of(tmp_path, Path(model.source.name).name, {"stage": "logit_lens", "translators": str(file)})
    losses = []
    for factor in (1.0, -1.0):
        save_file({name: factor * tensor for name, tensor in tensors.items()}, file)
        run(recipe, tmp_path / "run")
        losses.append(open_results(tmp_path / "run", "logit_lens").table.set_index("stream").loc["1_pre", "loss"])

    assert losses[0] != pytest.approx(losses[1], rel=1e-6)


def test_held_out_rows_are_those_of_the_documents_that_the_fit_did_not_see(looked):
    folder, _ = looked
    everything = open_results(folder, "logit_lens").record.summary["n_rows"]
    held_out = open_results(folder, "tuned").record.summary["n_rows"]

    assert 0 < held_out < everything


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32 - 1), st.integers(1, 39))
def test_a_fit_over_blocks_is_least_squares_over_all_rows(seed, cut):
    generator = np.random.default_rng(seed)
    sources = generator.standard_normal((2, 40, 5)).astype(np.float32)
    target = generator.standard_normal((40, 5)).astype(np.float32)
    sums = sum_affine(sources[:, :cut], target[:cut]) + sum_affine(sources[:, cut:], target[cut:])
    maps, biases = fit_affine(sums, 0.0)

    for rows, weight, bias in zip(sources, maps, biases, strict=True):
        expected = np.linalg.lstsq(np.c_[rows, np.ones(40)].astype(np.float64), target.astype(np.float64), rcond=None)[
            0
        ]
        np.testing.assert_allclose(np.vstack([weight, bias]), expected, atol=1e-5)


def test_metrics_are_those_of_worked_distributions():
    probabilities = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]])
    final = torch.tensor([[0.2, 0.3, 0.5], [0.1, 0.2, 0.7]]).log()
    values = lens_metrics(probabilities.log(), final, torch.tensor([1, -1]))

    kl = 0.2 * np.log(0.2 / 0.5) + 0.5 * np.log(0.5 / 0.2)
    np.testing.assert_allclose(values[0], [-np.log(0.3), 0.3, 1, 0, kl], rtol=1e-5)
    assert values[1, :3].isnan().all()
    np.testing.assert_allclose(values[1, 3:], [1, 0], atol=1e-6)


@pytest.mark.parametrize(
    ("extract", "settings", "message"),
    [
        ({"hooks": ["blocks.0.hook_resid_post"]}, {}, "logit_lens needs blocks.1.hook_resid_post"),
        ({"hooks": [LAST]}, {"norm": "final_scale"}, "ln_final.hook_scale"),
        ({"hooks": [LAST]}, {"translators": "nowhere.safetensors"}, "cannot read .*nowhere.safetensors"),
        ({"hooks": [LAST]}, {"translators": "fit", "norm": "final_scale"}, "leave out `norm`"),
    ],
)
def test_what_cannot_be_looked_at_is_refused_before_anything_runs(tmp_path, extract, settings, message):
    recipe = recipe_of(tmp_path, "gpt2", {"stage": "logit_lens", **settings})
    recipe["stages"][1] |= extract
    with pytest.raises(ActpipeError, match=message):
        run(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_fit_needs_documents_to_hold_out_and_that_is_said_before_anything_runs(corpus, tmp_path):
    recipe = make_recipe(corpus, hooks=["blocks.*.hook_resid_post"])
    recipe["stages"][0]["compat"] = "tl2"
    recipe["stages"].append({"stage": "logit_lens", "translators": "fit"})

    with pytest.raises(ActpipeError, match="keeps no track of documents; leave out `translators: fit`"):
        run(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_is_not_a_number_is_no_divergence_of_zero():
    final = torch.tensor([[0.5, 0.5, 0.0]]).log()
    logits = torch.tensor([[0.0, torch.nan, 0.0]])

    assert lens_metrics(logits, final, torch.tensor([0]))[0, -1].isnan()
    assert lens_metrics(final, final, torch.tensor([0]))[0, -1] == 0.0

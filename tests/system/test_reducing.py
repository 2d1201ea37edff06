"""Statistics taken while the model runs are those of what would have been stored."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import xarray as xr
from safetensors.torch import save_file
from support import MODELS, TEXTS, make_recipe, run

import actpipe
from actpipe.errors import ActpipeError
from actpipe.extraction.reducing import PartialSums, ReducingWorker
from actpipe.stores.layout import RunFolder

RESIDUAL, Z, PATTERNS = "blocks.0.hook_resid_post", "blocks.1.attn.hook_z", "blocks.*.attn.hook_pattern"
EVERYTHING = [
    "mean",
    "variance",
    "extremes",
    "covariance",
    "histogram",
    "top_rows",
    "mean_by_token",
    "mean_by_position",
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "lines.txt"
    path.write_text("\n".join(TEXTS * 3))
    return path


def recipe_of(corpus, *stages, layout="packed", **model):
    recipe = make_recipe(corpus)
    recipe["stages"][0]["layout"] = layout
    recipe["model"] |= model
    return {**recipe, "stages": [recipe["stages"][0], *stages]}


def reduction(**settings):
    return {"stage": "reduce_activations", "hooks": [RESIDUAL, Z], "rows_per_part": 64, "k": 3, **settings}


@pytest.fixture(scope="module")
def stored(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("stored")
    extract = {"stage": "extract_activations", "hooks": [RESIDUAL, Z, PATTERNS]}
    run(recipe_of(corpus, extract, {"stage": "score_heads"}), out)
    return actpipe.open_store(out), actpipe.open_results(out, "score_heads").dataset


def results(out, name="reduce_activations"):
    return actpipe.open_results(out, name).dataset


def test_every_statistic_is_that_of_the_stored_rows(corpus, stored, tmp_path):
    run(recipe_of(corpus, reduction(statistics=EVERYTHING, batch_tokens=128)), tmp_path)
    found, store = results(tmp_path), stored[0]
    ids, positions = store["tokens/input_ids"].compute(), store["tokens/position"].compute()
    for hook in (RESIDUAL, Z):
        rows = store[hook].compute().astype(np.float64)
        flat = rows.reshape(len(rows), -1)
        assert found[f"{hook}.count"] == len(rows)
        np.testing.assert_allclose(found[f"{hook}.mean"], rows.mean(0), atol=1e-5)
        np.testing.assert_allclose(found[f"{hook}.variance"], rows.var(0), rtol=1e-4)
        np.testing.assert_allclose(found[f"{hook}.min"], rows.min(0), atol=1e-5)
        np.testing.assert_allclose(found[f"{hook}.covariance"], np.cov(flat.T, bias=True), atol=1e-4)
        np.testing.assert_allclose(found[f"{hook}.top_value"], -np.sort(-rows, axis=0)[:3], atol=1e-5)
        top = found[f"{hook}.top_row"].values.reshape(3, -1)
        np.testing.assert_allclose(flat[top, np.arange(flat.shape[1])], -np.sort(-flat, axis=0)[:3], atol=1e-5)
        np.testing.assert_array_equal(found[f"{hook}.top_token"].values.reshape(3, -1), ids[top])
        np.testing.assert_array_equal(found[f"{hook}.top_position"].values.reshape(3, -1), positions[top])
        for key, of_rows in (("token", ids), ("position", positions)):
            for number, one in enumerate(found[f"{hook}.{key}"].values):
                mean = found[f"{hook}.mean_by_{key}"].values[number]
                np.testing.assert_allclose(mean, rows[of_rows == one].mean(0), atol=1e-5)
        assert found[f"{hook}.bin_count"].sum() == rows.size
    assert found[f"{Z}.mean"].dims == ("head", "d_head")
    assert not (tmp_path / "store.zarr").exists()
    assert not (tmp_path / "reductions").exists()


def test_pattern_scores_are_those_of_score_heads(corpus, stored, tmp_path):
    run(recipe_of(corpus, reduction(hooks=[PATTERNS], statistics=["pattern_scores"])), tmp_path)
    found, scores = results(tmp_path), stored[1]["score"]
    for layer in range(2):
        for pattern in scores["pattern"].values:
            mine = found[f"blocks.{layer}.attn.hook_pattern.score_{pattern}"].values
            wanted = scores.sel(layer=layer, pattern=pattern).transpose("head", "measure").values
            np.testing.assert_allclose(mine, wanted, atol=2e-3, equal_nan=True)


@pytest.mark.parametrize("keep", [None, {"every": 2}])
def test_killed_and_continued_in_another_order_it_gives_the_same_bits(corpus, tmp_path, monkeypatch, keep):
    recipe = recipe_of(corpus, reduction(statistics=EVERYTHING, keep=keep))
    run(recipe, tmp_path / "at once")
    do, done = ReducingWorker.__call__, []

    def last_ones_then_stop(worker, part):
        if part.index != 0 or done:
            do(worker, part)
            done.append(part.index)

    def stop_at_the_end(sums, part):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ReducingWorker, "__call__", last_ones_then_stop)
        patch.setattr(PartialSums, "read", stop_at_the_end)
        with pytest.raises(KeyboardInterrupt):
            run(recipe, tmp_path / "killed")
    assert len(done) > 1
    assert 0 not in done
    run(recipe, tmp_path / "killed")

    xr.testing.assert_identical(*(results(tmp_path / name).load() for name in ("at once", "killed")))


def test_a_broken_partial_is_made_again(corpus, tmp_path, monkeypatch):
    recipe = recipe_of(corpus, reduction())
    run(recipe, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(PartialSums, "read", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(recipe, tmp_path / "broken")
    (first, *_) = sorted(RunFolder(tmp_path / "broken").reductions.rglob("*.safetensors"))
    first.write_bytes(first.read_bytes()[:-10])
    run(recipe, tmp_path / "broken")

    xr.testing.assert_identical(*(results(tmp_path / name).load() for name in ("whole", "broken")))


def test_only_kept_tokens_and_real_ones_count(corpus, stored, tmp_path):
    run(recipe_of(corpus, reduction(keep={"exclude": ["bos"]})), tmp_path / "kept")
    store = stored[0]
    rows = store[RESIDUAL].compute().astype(np.float64)
    own = store["tokens/position"].compute() != 0
    if store.tokens.manifest.bos_id is None:
        own[:] = True
    np.testing.assert_allclose(results(tmp_path / "kept")[f"{RESIDUAL}.mean"], rows[own].mean(0), atol=1e-5)


def test_padding_of_an_encoder_does_not_count(corpus, tmp_path):
    hook = "blocks.0.hook_mlp_out"
    ids = tmp_path / "ids.jsonl"
    ids.write_text("\n".join(f'{{"ids": {list(range(1, length))}}}' for length in (3, 9, 20)))
    recipe = recipe_of(ids, {"stage": "extract_activations", "hooks": [hook]}, reduction(hooks=[hook]))
    recipe["stages"][0] |= {"layout": "documents", "prepend_bos": False, "context_length": 20}
    recipe["stages"][0]["dataset"] |= {"column": "ids", "column_type": "token_ids"}
    recipe["model"]["name"] = str(MODELS / "bert")
    run(recipe, tmp_path / "run")

    rows = actpipe.open_store(tmp_path / "run")[hook].compute()
    assert len(rows) == 2 + 8 + 19
    np.testing.assert_allclose(results(tmp_path / "run")[f"{hook}.mean"], rows.mean(0), atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hooks": ["blocks.0.attn.hook_attn_scores"]}, "no mean or variance"),
        ({"hooks": [PATTERNS]}, "pattern_scores"),
        ({"statistics": ["pattern_scores"]}, "pattern_scores"),
        ({"hooks": [PATTERNS], "statistics": ["pattern_scores"], "keep": {"every": 2}}, "whole sequences"),
        ({"statistics": ["covariance"], "max_bytes": 10_000}, "max_bytes is 10,000"),
        ({"hooks": ["blocks.0.hook_resid_pots"]}, "did you mean"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(corpus, tmp_path, settings, message):
    with pytest.raises(ActpipeError, match=message):
        run(recipe_of(corpus, reduction(**settings)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_statistics_of_latents_and_head_norms_are_those_of_the_stored_ones(corpus, tmp_path):
    draw = torch.Generator().manual_seed(0)
    encoder = {"W_enc": torch.randn(128, 60, generator=draw), "b_enc": torch.randn(60, generator=draw)}
    save_file(encoder, tmp_path / "sae.safetensors")
    entries = [
        {"name": "sae", "hooks": [RESIDUAL], "encoder": str(tmp_path / "sae.safetensors")},
        {"name": "length", "hooks": [Z], "norms": True},
    ]
    extract = {"stage": "extract_activations", "hooks": [], "derive": entries}
    reduce = reduction(hooks=[], derive=entries, statistics=["mean", "top_rows"])
    run(recipe_of(corpus, extract, reduce), tmp_path / "run")
    found, store = results(tmp_path / "run"), actpipe.open_store(tmp_path / "run")

    for name, axes in ((f"{RESIDUAL}.sae", ("latent",)), (f"{Z}.length", ("head",))):
        hook, entry = name.rsplit(".", 1)
        rows = store[f"derived/{entry}/{hook}"].compute()
        assert found[f"{name}.mean"].dims == axes
        np.testing.assert_allclose(found[f"{name}.mean"], rows.mean(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found[f"{name}.top_value"], -np.sort(-rows, axis=0)[:3], rtol=1e-4, atol=1e-5)
    lengths = store[f"derived/length/{Z}"].compute()
    top = found[f"{Z}.length.top_row"].values
    np.testing.assert_array_equal(found[f"{Z}.length.top_token"], store["tokens/input_ids"].compute()[top])
    np.testing.assert_allclose(np.take_along_axis(lengths, top, 0), -np.sort(-lengths, axis=0)[:3], rtol=1e-4)


def test_other_weights_are_another_result(corpus, tmp_path):
    def mean_under(seed):
        draw = torch.Generator().manual_seed(seed)
        save_file({"W": torch.randn(128, 4, generator=draw)}, tmp_path / "basis.safetensors")
        entry = {"name": "basis", "hooks": [RESIDUAL], "matrix": str(tmp_path / "basis.safetensors")}
        run(recipe_of(corpus, reduction(hooks=[], derive=[entry])), tmp_path / "run")
        return results(tmp_path / "run")[f"{RESIDUAL}.basis.mean"].values

    assert not np.allclose(mean_under(0), mean_under(1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hooks": []}, "name activations in `hooks`"),
        ({"derive": [{"name": "sae", "hooks": [RESIDUAL], "encoder": "sae", "top_k": 2}]}, "leave out `top_k`"),
    ],
)
def test_a_reduction_of_nothing_or_of_cut_latents_is_refused(corpus, tmp_path, settings, message):
    with pytest.raises(ActpipeError, match=message):
        run(recipe_of(corpus, reduction(**settings)), tmp_path)

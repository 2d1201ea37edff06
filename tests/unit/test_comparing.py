"""Paired comparisons of stores: values, intervals, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import MODELS, make_recipe, run

from actpipe import open_results, open_store
from actpipe.compute.comparing import compare_rows
from actpipe.compute.intervals import cluster_intervals, t_quantile
from actpipe.errors import RecipeError, StoreMismatchError

T_TABLE = {(0.95, 1): 12.7062, (0.95, 4): 2.7764, (0.99, 10): 3.1693, (0.9, 30): 1.6973, (0.95, 10**6): 1.95997}


@pytest.mark.parametrize(("confidence", "degrees"), T_TABLE)
def test_quantiles_of_t_are_those_of_the_tables(confidence, degrees):
    assert t_quantile(confidence, degrees) == pytest.approx(T_TABLE[confidence, degrees], abs=1e-4)


def test_clusters_of_one_row_have_the_textbook_standard_error_and_interval():
    rows = np.random.default_rng(0).normal(3, 2, 50)
    found = cluster_intervals(rows[:, None], np.ones((50, 1)), confidence=0.95, n_resamples=2000, seed=0)

    error = rows.std(ddof=1) / np.sqrt(50)
    assert found.mean[0] == pytest.approx(rows.mean())
    assert found.standard_error[0] == pytest.approx(error)
    assert found.t_high[0] == pytest.approx(rows.mean() + 2.00958 * error, abs=1e-4)
    assert found.low[0] == pytest.approx(found.t_low[0], abs=0.1 * error * 4)


def test_the_same_seed_gives_the_same_interval_and_another_seed_another():
    rows, count = np.random.default_rng(0).normal(size=(20, 2)), np.ones((20, 2))
    one, again, other = (
        cluster_intervals(rows, count, confidence=0.9, n_resamples=50, seed=seed) for seed in (1, 1, 2)
    )

    np.testing.assert_array_equal(one.low, again.low)
    assert (one.low != other.low).any()


def test_rows_of_one_cluster_give_no_more_certainty_than_one():
    rows = np.random.default_rng(0).normal(size=10)
    single = cluster_intervals(rows[:, None], np.ones((10, 1)), confidence=0.95, n_resamples=9, seed=0)
    copied = cluster_intervals(100 * rows[:, None], np.full((10, 1), 100.0), confidence=0.95, n_resamples=9, seed=0)

    np.testing.assert_allclose(copied.standard_error, single.standard_error)
    np.testing.assert_allclose(copied.low, single.low)


@pytest.mark.parametrize("n_clusters", [0, 1])
def test_too_few_clusters_have_no_interval(n_clusters):
    found = cluster_intervals(
        np.ones((n_clusters, 1)), np.ones((n_clusters, 1)), confidence=0.95, n_resamples=9, seed=0
    )

    assert np.isnan([found.standard_error[0], found.low[0], found.t_high[0]]).all()


@settings(deadline=None)
@given(st.integers(1, 8), st.integers(1, 5), st.integers(0, 99))
def test_rows_compared_are_those_of_the_formula(n_rows, n_channels, seed):
    generator = np.random.default_rng(seed)
    ours, theirs = generator.normal(size=(2, n_rows, n_channels)).astype(np.float32)
    relative, cosine, error, length = compare_rows(ours, theirs).T

    a, b = ours.astype(np.float64), theirs.astype(np.float64)
    norms = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
    np.testing.assert_allclose(relative, np.linalg.norm(a - b, axis=1) / norms[1], rtol=1e-5)
    np.testing.assert_allclose(cosine, (a * b).sum(1) / norms[0] / norms[1], atol=1e-6)
    np.testing.assert_allclose(np.sqrt(error / length), relative)


def test_rows_without_length_have_no_cosine_and_infinite_values_are_left_out():
    found = compare_rows(np.array([[0.0, 0], [-np.inf, 1]]), np.array([[1.0, 0], [-np.inf, 2]]))

    assert found[0, 0] == 1
    assert np.isnan(found[0, 1])
    np.testing.assert_allclose(found[1], [0.5, 1, 1, 4])


HOOKS = ["blocks.*.hook_resid_post", "blocks.0.attn.hook_attn_scores"]


@pytest.fixture
def two_runs(tmp_path):
    """One model in float32, and in bfloat16, on the same ids."""
    generator = np.random.default_rng(1)
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(f'{{"ids": {generator.integers(5, 199, 20).tolist()}}}\n' for _ in range(6)))
    recipe = make_recipe(path, MODELS / "gpt2", hooks=HOOKS, metrics=["loss", "correct"], dtype="float32")
    recipe["stages"][0]["dataset"]["column"] = "ids"
    recipe["model"]["dtype"] = "bfloat16"
    run(recipe, tmp_path / "half")
    recipe["model"]["dtype"] = "float32"
    return recipe, tmp_path


@pytest.mark.parametrize("cluster", ["document", "sequence"])
def test_paired_differences_are_those_of_the_rows(two_runs, cluster):
    recipe, folder = two_runs
    stage = {"stage": "compare_runs", "against_run": str(folder / "half"), "cluster": cluster, "block_bytes": 9000}
    recipe["stages"] += [stage, {"stage": "write_report"}]
    run(recipe, folder / "whole")
    ours, theirs = open_store(folder / "whole"), open_store(folder / "half")
    result = open_results(folder / "whole", "compare_runs")
    table = result.table.set_index(["name", "statistic"])

    gap = ours["metrics/loss"].compute().astype(np.float64) - theirs["metrics/loss"].compute()
    row = table.loc["loss", "difference"]
    assert row["estimate"] == pytest.approx(np.nanmean(gap))
    assert row["ours"] - row["theirs"] == pytest.approx(row["estimate"])
    assert row["n_rows"] == np.isfinite(gap).sum()
    assert row["t_low"] < row["estimate"] < row["t_high"]
    assert row["low"] <= row["estimate"] <= row["high"]

    hook = "blocks.1.hook_resid_post"
    a, b = (store[hook].compute().astype(np.float64) for store in (ours, theirs))
    errors = np.linalg.norm(a - b, axis=1) / np.linalg.norm(b, axis=1)
    assert table.loc[(hook, "relative_error"), "estimate"] == pytest.approx(errors.mean(), rel=1e-5)
    assert 0.999 < table.loc[(hook, "cosine"), "estimate"] < 1
    assert 0 < table.loc[("blocks.0.attn.hook_attn_scores", "relative_error"), "estimate"] < 0.1
    assert result.dataset["relative_error"].dims == (cluster, "hook")
    assert "Relative error by hook" in (folder / "whole" / "report.html").read_text()


def test_a_store_compared_with_its_twin_differs_by_nothing(two_runs):
    recipe, folder = two_runs
    run(recipe, folder / "one")
    recipe["stages"].append({"stage": "compare_runs", "against_run": str(folder / "one"), "hooks": ["*resid_post"]})
    run(recipe, folder / "other")
    table = open_results(folder / "other", "compare_runs").table

    assert set(table["name"]) == {"loss", "correct", "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"}
    expected = np.where(table["statistic"] == "cosine", 1.0, 0.0)
    np.testing.assert_allclose(table["estimate"], expected, atol=1e-12)
    np.testing.assert_allclose(table["high"], expected, atol=1e-12)


def test_different_tokens_are_refused_with_the_first_that_differs(two_runs):
    recipe, folder = two_runs
    lines = (folder / "corpus.jsonl").read_text().splitlines()
    lines[0] = lines[0].replace("]", ", 7]")
    (folder / "longer.jsonl").write_text("\n".join(lines) + "\n")
    recipe["stages"][0]["dataset"]["path"] = str(folder / "longer.jsonl")
    recipe["stages"].append({"stage": "compare_runs", "against_run": str(folder / "half")})

    with pytest.raises(StoreMismatchError, match=r"different tokens: in row \d+, .* token 7 at position \d+ of seq"):
        run(recipe, folder / "other")


def test_a_run_that_is_not_there_is_refused_before_anything_runs(two_runs):
    recipe, folder = two_runs
    recipe["stages"].append({"stage": "compare_runs", "against_run": str(folder / "nowhere")})

    with pytest.raises(RecipeError, match="holds no finished store to compare with"):
        run(recipe, folder / "other")
    assert not (folder / "other").exists()


def test_a_corpus_is_not_compared_with_itself(corpus, tmp_path):
    recipe = make_recipe(corpus, metrics=["loss"])
    recipe["stages"].append({"stage": "compare_runs"})

    with pytest.raises(RecipeError, match="compares the corpus 'main' with itself"):
        run(recipe, tmp_path / "run")


def test_documents_that_no_one_keeps_track_of_are_no_clusters_and_that_is_said_before_anything_runs(corpus, tmp_path):
    recipe = make_recipe(corpus, metrics=["loss"])
    recipe["stages"][0]["compat"] = "tl3"
    run(recipe, tmp_path / "one")
    stage = {"stage": "compare_runs", "against_run": str(tmp_path / "one")}
    tokenize, extract = recipe["stages"]

    with pytest.raises(RecipeError, match=r"keeps no track of documents; leave out `cluster: document` by setting"):
        run({**recipe, "stages": [tokenize, extract, stage]}, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    run(recipe, tmp_path / "other")
    with pytest.raises(RecipeError, match="keeps no track of documents"):
        run({**recipe, "stages": [stage]}, tmp_path / "other")  # the table is there, and the recipe does not make it
    run({**recipe, "stages": [stage | {"cluster": "sequence"}]}, tmp_path / "other")
    table = open_results(tmp_path / "other", "compare_runs").table.set_index("statistic")
    assert table.loc["difference", "estimate"] == 0.0

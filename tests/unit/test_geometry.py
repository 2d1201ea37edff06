"""The geometry of activations is that of all rows at once, whatever the blocks and their order."""

from __future__ import annotations

from functools import reduce
from operator import add

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import make_recipe, run

from actpipe import open_results, open_store
from actpipe.compute.geometry import (
    cross_moments,
    effective_rank,
    linear_cka,
    participation_ratio,
    row_norms,
    spectrum,
    unit_sums,
)
from actpipe.errors import RecipeError

HOOKS = ["blocks.*.hook_resid_post", "blocks.0.attn.hook_z"]


def values(n_rows: int, width: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(3.0, 2.0, (n_rows, width)).astype(np.float32)


def witness_cka(one: np.ndarray, other: np.ndarray) -> float:
    one, other = (rows.astype(np.float64) - rows.astype(np.float64).mean(0) for rows in (one, other))
    grams = one @ one.T, other @ other.T
    return float((grams[0] * grams[1]).sum() / np.linalg.norm(grams[0]) / np.linalg.norm(grams[1]))


def witness_cosine(rows: np.ndarray) -> float:
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return float(np.mean([unit[i] @ unit[j] for i in range(len(rows)) for j in range(len(rows)) if i != j]))


@given(st.integers(3, 25), st.lists(st.integers(0, 25), max_size=3), st.permutations(range(25)))
def test_sums_are_those_of_all_rows_however_they_are_cut_and_ordered(n_rows, cuts, order):
    one, other = values(n_rows, 4, 0), values(n_rows, 3, 1)
    order = [row for row in order if row < n_rows]
    pieces = [np.array(piece, int) for piece in np.split(np.array(order), sorted(cut for cut in cuts if cut < n_rows))]

    moments = reduce(add, (cross_moments(one[piece], other[piece]) for piece in pieces))
    units = reduce(add, (unit_sums(one[piece], row_norms(one[piece])) for piece in pieces))

    wide = np.concatenate([one, other], 1).astype(np.float64)
    np.testing.assert_allclose(moments.covariance, np.cov(wide.T, bias=True)[:4, 4:], atol=1e-10)
    assert units.anisotropy == pytest.approx(witness_cosine(one.astype(np.float64)))


def test_cka_is_that_of_the_kernels():
    one, other = values(30, 6, 2), values(30, 4, 3)
    own, others = (float(np.linalg.norm(cross_moments(rows).covariance)) for rows in (one, other))

    assert linear_cka(cross_moments(one, other).covariance, own, others) == pytest.approx(witness_cka(one, other))


def test_an_activation_turned_and_scaled_is_the_same_to_cka():
    one = values(30, 6, 2)
    turn = np.linalg.qr(np.random.default_rng(4).normal(size=(6, 6)))[0]
    other = (5 * one.astype(np.float64) @ turn).astype(np.float64)
    own, others = (float(np.linalg.norm(cross_moments(rows).covariance)) for rows in (one, other))

    assert linear_cka(cross_moments(one, other).covariance, own, others) == pytest.approx(1.0)


@pytest.mark.parametrize("n_equal", [1, 2, 5])
def test_equal_variances_have_as_many_dimensions_as_there_are(n_equal):
    variances = spectrum(np.diag([7.0] * n_equal + [0.0] * 3))

    assert participation_ratio(variances) == pytest.approx(n_equal)
    assert effective_rank(variances) == pytest.approx(n_equal)


def test_what_does_not_vary_has_no_dimension_and_zeros_have_no_direction():
    rows = np.zeros((4, 3))

    assert np.isnan(participation_ratio(spectrum(cross_moments(rows).covariance)))
    assert np.isnan(effective_rank(np.zeros(3)))
    assert np.isnan(linear_cka(np.zeros((3, 3)), 0.0, 1.0))
    assert np.isnan(unit_sums(rows, row_norms(rows)).anisotropy)
    assert unit_sums(np.eye(3)[:2], np.ones(2)).anisotropy == 0.0


def test_a_store_is_described_as_its_rows_are_whatever_the_blocks(corpus, tmp_path):
    recipe = make_recipe(corpus, hooks=HOOKS)
    recipe["stages"] += [
        {"stage": "describe_residual", "hooks": HOOKS},
        {"stage": "describe_residual", "hooks": HOOKS, "name": "small", "block_bytes": 5000},
    ]
    run(recipe, tmp_path / "run")
    store = open_store(tmp_path / "run")
    position = store["tokens/position"].compute()

    for name in ("describe_residual", "small"):
        result = open_results(tmp_path / "run", name)
        rows = {hook: store[hook].compute().reshape(store.n_rows, -1).astype(np.float64) for hook in store.hook_names}
        assert result.table["hook"].tolist() == list(rows)
        for row in result.table.itertuples():
            these = rows[row.hook]
            covariance = np.cov(these.T, bias=True)
            assert row.mean_norm == pytest.approx(np.linalg.norm(these, axis=1).mean())
            assert row.anisotropy == pytest.approx(witness_cosine(these))
            assert row.participation_ratio == pytest.approx(np.trace(covariance) ** 2 / (covariance**2).sum())
            shares = np.linalg.eigvalsh(covariance) / np.trace(covariance)
            entropy = -sum(share * np.log(share) for share in shares if share > 1e-15)
            assert row.effective_rank == pytest.approx(np.exp(entropy))
            by_position = result.dataset["norm"].sel(hook=row.hook, position=3)
            assert float(by_position) == pytest.approx(np.linalg.norm(these[position == 3], axis=1).mean())
            for other, others in rows.items():
                found = float(result.dataset["cka"].sel(hook=row.hook, other_hook=other))
                assert found == pytest.approx(witness_cka(these, others))


@pytest.mark.parametrize(
    ("hooks", "message"),
    [
        (["blocks.1.hook_resid_post"], "needs blocks.1.hook_resid_post of the corpus 'main', which does not store it"),
        (["derived/pca/*"], "needs derived/pca/"),
        (["blocks.0.attn.hook_pattern"], "no space of directions"),
    ],
)
def test_what_is_not_stored_or_has_no_geometry_is_refused_before_anything_runs(corpus, tmp_path, hooks, message):
    recipe = make_recipe(corpus, hooks=["blocks.0.hook_resid_post", "blocks.0.attn.hook_pattern"])
    recipe["stages"].append({"stage": "describe_residual", "hooks": hooks})

    with pytest.raises(RecipeError, match=message):
        run(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()

"""Scores of heads from weights against dense formulas in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import INDUCTION, MODELS, make_recipe, run

from actpipe import FactoredMatrix, HookedModel, open_results
from actpipe.compute.circuits import all_composition_scores, composition_scores
from actpipe.errors import RecipeError
from actpipe.models.circuits import open_circuits, score_circuits


def dense(circuit: FactoredMatrix) -> torch.Tensor:
    return circuit.A.double() @ circuit.B.double()


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def circuits(request):
    model = HookedModel.from_pretrained(str(MODELS / request.param), dtype="float32", device="cpu")
    return open_circuits(model.weights, model.shape, processed=True)


def test_composition_scores_are_norms_of_dense_products_of_earlier_and_later_heads(circuits):
    OV, QK = dense(circuits.OV), dense(circuits.QK)

    for mode, right in (("Q", QK), ("K", QK.mT), ("V", OV)):
        found = all_composition_scores(circuits.QK, circuits.OV, mode)
        for head in range(4):
            for later in range(4):
                expected = (OV[0, head] @ right[1, later]).norm() / OV[0, head].norm() / right[1, later].norm()
                assert float(found[0, head, 1, later]) == pytest.approx(float(expected), abs=1e-4)
        assert float(found[1].abs().max()) == float(found[0, :, 0].abs().max()) == 0


def test_copying_and_matching_scores_are_those_of_dense_circuits(circuits):
    found = score_circuits(circuits, n_tokens=10**9)
    W_E, W_U = circuits.W_E.double(), circuits.W_U.double()

    for layer in range(2):
        for head in range(4):
            full = W_E @ dense(circuits.OV)[layer, head] @ W_U
            values = torch.linalg.eigvals(full)
            share = float(values.real.sum() / values.abs().sum())
            assert float(found["ov_copying"][layer, head]) == pytest.approx(share, abs=1e-4)
            rank = (full > full.diagonal()[:, None]).double().sum(-1)
            assert float(found["ov_copying_rank"][layer, head]) == pytest.approx(
                float(1 - rank.mean() / (len(full) - 1)), abs=1e-3
            )
            values = torch.linalg.eigvals(W_E @ dense(circuits.QK)[layer, head] @ W_E.mT)
            share = float(values.real.sum() / values.abs().sum())
            assert float(found["qk_matching"][layer, head]) == pytest.approx(share, abs=1e-4)


def test_only_circuits_that_fit_compose_and_only_in_three_ways(circuits):
    with pytest.raises(ValueError, match="mode must be one of"):
        all_composition_scores(circuits.QK, circuits.OV, "O")
    with pytest.raises(ValueError, match="no product"):
        composition_scores(circuits.OV, FactoredMatrix(torch.ones(3, 2), torch.ones(2, 3)))


def test_the_trained_model_composes_its_induction_head_and_copies_with_it(corpus, tmp_path):
    recipe = make_recipe(corpus, INDUCTION)
    recipe["stages"] = [recipe["stages"][0], {"stage": "score_weights"}, {"stage": "write_report"}]
    run(recipe, tmp_path / "run")
    result = open_results(tmp_path / "run", "score_weights")

    best = result.table.iloc[0]
    assert (best["layer"], best["head"]) == (1, 0)
    assert best["ov_copying"] > 0.9
    into_keys = result.dataset["composition"].sel(mode="K", later_layer=1, later_head=0, layer=0).values
    assert int(np.argmax(into_keys)) == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Composition through keys" in page
    assert "Copying by eigenvalues" in page


def test_a_model_without_such_heads_is_refused_before_anything_runs(corpus, tmp_path):
    recipe = make_recipe(corpus, MODELS / "bert")
    recipe["stages"][0]["layout"] = "documents"
    recipe["stages"] = [recipe["stages"][0] | {"layout": "documents"}, {"stage": "score_weights"}]

    with pytest.raises(RecipeError, match="reads W_Q, W_K, W_V and W_O of every head of a decoder"):
        run(recipe, tmp_path / "run")


def test_a_composition_plot_of_a_thousand_heads_shows_layers():
    from actpipe.report.head_figures import _composition

    small, large = (
        _composition(np.random.default_rng(0).random((n, h, n, h)), "keys").figure.data[0].z
        for n, h in ((3, 2), (32, 32))
    )
    assert small.shape == (4, 4)
    assert large.shape == (31, 31)
    assert np.isnan(large[0, 1:]).all()
    assert np.isfinite(np.tril(large)).all()

"""Tasks made on the spot: what is drawn, what is measured, what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import INDUCTION, make_recipe, run

from actpipe import HookedModel, open_results
from actpipe.compute.evaluating import repeated_ids, second_copy
from actpipe.errors import RecipeError
from actpipe.text.indirect_objects import NOUNS, TEMPLATES, draw_prompts

IOI = {"n_samples": 40, "symmetric": True, "names": ["Tom", "Kate", "Ann"]}


def test_the_second_copy_repeats_the_first_but_for_bos():
    ids = repeated_ids(n_sequences=3, length=5, first_id=100, stop_id=200, bos_id=7, seed=0)

    assert ids.shape == (3, 10)
    assert (ids[:, 0] == 7).all()
    np.testing.assert_array_equal(ids[:, 1:5], ids[:, 6:])
    assert ids[:, 5:].min() >= 100


def test_the_loss_of_the_second_copy_is_that_of_its_tokens_from_the_third_on():
    predicts = np.arange(1, 10.0)[None]

    assert second_copy(predicts, 5).tolist() == [[7, 8, 9]]
    with pytest.raises(ValueError, match="9 predictions, not 8"):
        second_copy(predicts[:, 1:], 5)


def test_samples_differ_and_the_seed_decides_them():
    one, again, other = (draw_prompts(n_samples=50, symmetric=False, seed=seed) for seed in (0, 0, 1))

    assert one == again != other
    assert len({prompt.right for prompt in one}) > 40
    assert {prompt.template for prompt in one} == set(range(len(TEMPLATES)))
    assert all(prompt.right != prompt.wrong and "[" not in prompt.right for prompt in one)


def test_symmetric_samples_come_in_pairs_with_the_names_exchanged():
    prompts = draw_prompts(n_samples=20, symmetric=True, seed=0, names=("Ann", "Bob"), nouns=NOUNS)

    assert len(prompts) == 20
    for one, other in zip(prompts[::2], prompts[1::2], strict=True):
        swapped = one.right.replace("Ann", "?").replace("Bob", "Ann").replace("?", "Bob")
        assert other.right == swapped


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluated")
    recipe = {
        "model": {"name": str(INDUCTION), "dtype": "float32", "device": "cpu"},
        "stages": [
            {"stage": "evaluate_model", "induction": {"length": 64, "bos": "none"}, "ioi": IOI},
            {"stage": "evaluate_model", "name": "small", "induction": {"length": 64, "bos": "none"}, "ioi": IOI}
            | {"batch_tokens": 20},
            {"stage": "write_report"},
        ],
    }
    run(recipe, folder / "run")
    return folder / "run"


def test_the_induction_loss_is_the_models_own_on_the_second_copy(evaluated):
    model, result = HookedModel.from_pretrained(str(INDUCTION), device="cpu"), open_results(evaluated, "evaluate_model")
    ids = repeated_ids(n_sequences=4, length=64, first_id=100, stop_id=512, bos_id=None, seed=0)
    losses = model.forward(torch.from_numpy(ids), return_type="loss", loss_per_token=True)

    assert result.record.summary["induction_loss"] == pytest.approx(losses[:, 65:].double().mean().item(), rel=1e-5)
    np.testing.assert_allclose(result.dataset["induction_loss"].values, losses, atol=1e-4)
    assert result.record.summary["induction_accuracy"] > 0.5


def test_logit_differences_are_those_at_the_first_token_in_which_the_names_differ(evaluated):
    model, result = HookedModel.from_pretrained(str(INDUCTION), device="cpu"), open_results(evaluated, "evaluate_model")
    found = result.dataset["ioi_logit_difference"].values
    prompts = draw_prompts(**(IOI | {"seed": 0}))

    for number in (0, 1, 17):
        right, wrong = (model.to_tokens(text)[0].tolist() for text in (prompts[number].right, prompts[number].wrong))
        place = next(i for i, (a, b) in enumerate(zip(right, wrong, strict=False)) if a != b)
        logits = model.forward(torch.tensor([right]))[0, place - 1]
        assert found[number] == pytest.approx(float(logits[right[place]] - logits[wrong[place]]), abs=1e-4)
    table = result.table[(result.table["task"] == "ioi") & (result.table["group"] != "all")]
    assert table["n"].sum() == 2 * 40
    assert result.record.summary["ioi_accuracy"] == pytest.approx((found > 0).mean())


def test_the_size_of_a_batch_changes_nothing(evaluated):
    one, other = (open_results(evaluated, name).dataset for name in ("evaluate_model", "small"))

    for name in ("induction_loss", "ioi_logit_difference"):
        np.testing.assert_allclose(one[name].values, other[name].values, atol=1e-4)


def test_the_report_shows_templates(evaluated):
    page = (evaluated / "report.html").read_text()

    assert "Loss on random tokens repeated" in page
    assert TEMPLATES[0] in page


REFUSED = {
    "too long for the model": ({"induction": {"length": 300}}, "two copies of induction.length"),
    "ids beyond the vocabulary": ({"induction": {"length": 8, "stop_id": 600}}, "up to 600 among the 512"),
    "a template that ends otherwise": ({"ioi": {"templates": ["[A] saw [B]"]}}, r"must have \[B\] and end in \[A\]"),
    "one name": ({"ioi": {"names": ["Ann", "Ann"]}}, "needs two that differ"),
    "an odd number of pairs": ({"ioi": {"n_samples": 3, "symmetric": True}}, "must be even"),
    "no task": ({"induction": None, "ioi": None}, "no task is left"),
}


@pytest.mark.parametrize("wrong", REFUSED)
def test_tasks_that_do_not_fit_are_refused_before_anything_runs(wrong, corpus, tmp_path):
    settings, message = REFUSED[wrong]
    recipe = make_recipe(corpus)
    recipe["stages"] = [{"stage": "evaluate_model", **settings}]

    with pytest.raises(RecipeError, match=message):
        run(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()

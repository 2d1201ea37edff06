"""Stores of processed activations, and of architectures that nobody wrote an entry for."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from support import MODELS, make_recipe, run
from transformers import AutoConfig

from actpipe import HookedModel, open_store
from actpipe.errors import RecipeError, UnsupportedModelError
from actpipe.models.twins import build_twin


@pytest.fixture
def corpus(write_jsonl):
    generator = np.random.default_rng(0)
    return write_jsonl([{"ids": generator.integers(5, 199, n).tolist()} for n in (7, 20, 3, 12, 1)])


def recipe_of(corpus, model, **extract):
    recipe = make_recipe(corpus, model, **{"hooks": ["*"], "metrics": ["loss", "correct_logit"], **extract})
    recipe["stages"][0] |= {"layout": "documents", "context_length": 24, "prepend_bos": False}
    recipe["stages"][0]["dataset"]["column"] = "ids"
    return recipe


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_processed_store_holds_what_from_pretrained_gives_by_default(family, corpus, tmp_path):
    recipe = recipe_of(corpus, MODELS / family)
    recipe["model"]["convention"] = "processed"
    run(recipe, tmp_path / "run")
    store = open_store(tmp_path / "run")
    assert store.manifest.convention == "processed"
    model = HookedModel.from_pretrained(str(MODELS / family), dtype="float32", device="cpu", convention="processed")
    document = store.document(1)
    logits, cache = model.run_with_cache(document.input_ids)
    for name in store.hook_names:
        found, expected = document[name], cache[name][0].numpy()
        if model.hook_points[name].looks_at_keys:
            found, expected = found[..., : len(document.input_ids)], expected.swapaxes(0, 1)
        np.testing.assert_allclose(found, expected, atol=1e-4, err_msg=name)
    correct = logits[0, np.arange(19), document.input_ids[1:]].numpy()
    np.testing.assert_allclose(document["metrics/correct_logit"][:-1], correct, atol=1e-4)
    assert np.abs(document["blocks.0.hook_resid_post"].mean(-1)).max() < 1e-5 or family == "llama"


def test_what_the_processed_convention_cannot_do_is_refused_before_anything_runs(corpus, tmp_path):
    recipe = recipe_of(corpus, MODELS / "gpt2")
    recipe["model"]["convention"] = "processed"
    recipe["stages"].append({"stage": "attribute_logits"})
    with pytest.raises(RecipeError, match=r"reads native activations; set `model\.convention: native`"):
        run(recipe, tmp_path / "run")
    recipe = recipe_of(corpus, MODELS / "bloom")
    recipe["model"]["convention"] = "processed"
    with pytest.raises(UnsupportedModelError, match="processed convention is not offered for bloom"):
        run(recipe, tmp_path / "run")


@pytest.mark.parametrize("model_type", ["helium", "exaone4", "falcon_mamba", "bamba", "falcon_h1"])
def test_an_architecture_without_an_entry_is_stored_by_its_structure(model_type, corpus, tmp_path):
    more = {"attn_layer_indices": [3]} if model_type == "bamba" else {}
    config = AutoConfig.for_model(model_type, num_hidden_layers=4, **more)
    build_twin(config).save_pretrained(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODELS / "gpt2" / name, tmp_path / "model" / name)
    recipe = recipe_of(corpus, tmp_path / "model", metrics=[])
    run(recipe, tmp_path / "run")
    store = open_store(tmp_path / "run")
    model = HookedModel.from_pretrained(str(tmp_path / "model"), dtype="float32", device="cpu")
    document = store.document(1)
    _, cache = model.run_with_cache(document.input_ids)
    assert "blocks.3.hook_resid_post" in store.hook_names
    for name in store.hook_names:
        found, expected = document[name], cache[name][0].numpy()
        if model.hook_points[name].looks_at_keys:
            found, expected = found[..., : len(document.input_ids)], expected.swapaxes(0, 1)
        np.testing.assert_allclose(found, expected, atol=1e-4, err_msg=name)
    recipe["stages"].append({"stage": "decompose_residual"})
    if model.shape.sums_to_logits:
        run(recipe, tmp_path / "run")
    else:
        with pytest.raises(RecipeError, match="is no such sum"):
            run(recipe, tmp_path / "run")

"""What a model says by its names in memory is what its store holds, for architectures unlike GPT-2."""

from __future__ import annotations

import numpy as np
import pytest
from support import MODELS, make_recipe, run

from actpipe import HookedModel, open_results, open_store

# Capped logits, experts, ALiBi, norms after each branch only, attention of the model's own.
FAMILIES = ["gemma2", "mixtral", "bloom", "olmo2", "gptj", "falcon"]


@pytest.fixture(params=FAMILIES)
def finished(request, write_jsonl, tmp_path):
    generator = np.random.default_rng(0)
    corpus = write_jsonl([{"ids": generator.integers(5, 199, n).tolist()} for n in (7, 20, 3, 12, 1)])
    recipe = make_recipe(corpus, MODELS / request.param, hooks=["*"], metrics=["loss", "correct_logit"])
    recipe["stages"][0] |= {"layout": "documents", "context_length": 24, "prepend_bos": False}
    recipe["stages"][0]["dataset"]["column"] = "ids"
    recipe["stages"] += [{"stage": "decompose_residual"}, {"stage": "attribute_logits"}]
    run(recipe, tmp_path / "run")
    return request.param, tmp_path / "run"


def test_a_store_holds_every_name_and_the_analyses_add_up(finished):
    family, folder = finished
    store = open_store(folder)
    model = HookedModel.from_pretrained(str(MODELS / family), dtype="float32", device="cpu")
    stored = [name for name, point in model.hook_points.items() if not point.on_request]
    assert list(store.hook_names) == stored

    document = store.document(3)
    logits, cache = model.run_with_cache(document.input_ids, names=stored)
    n_tokens = len(document.input_ids)
    for name in stored:
        found, expected = document[name], cache[name][0].numpy()
        if model.hook_points[name].looks_at_keys:
            found, expected = found[..., :n_tokens], expected.swapaxes(0, 1)
        np.testing.assert_allclose(found, expected, atol=1e-4, err_msg=name)

    ids = document.input_ids
    correct = logits[0, np.arange(n_tokens - 1), ids[1:]].numpy()
    np.testing.assert_allclose(document["metrics/correct_logit"][:-1], correct, atol=1e-4)
    assert open_results(folder, "decompose_residual").record.summary["worst_sum_error"] < 1e-5
    assert open_results(folder, "attribute_logits").record.summary["worst_sum_error"] < 1e-3

"""A store as an xarray dataset, and a document of it as TransformerLens' cache."""

from __future__ import annotations

import pytest
import torch
from support import INDUCTION, make_recipe, run

from actpipe import HookedModel, open_store

HOOKS = ["hook_embed", "blocks.*.hook_resid_post", "blocks.*.attn.hook_z", "blocks.*.attn.hook_pattern"]


def stored(corpus, out, **tokenize):
    recipe = make_recipe(corpus, hooks=HOOKS, metrics=["loss"], rows_per_part="auto")
    recipe["stages"][0] |= tokenize
    run(recipe, out)
    return open_store(out)


def test_a_document_as_a_cache_is_that_of_a_pass_over_it(corpus, tmp_path):
    store = stored(corpus, tmp_path / "run", layout="documents")
    document = store.document(2)
    model = HookedModel.from_pretrained(str(INDUCTION), dtype="float32", device="cpu")
    _, expected = model.run_with_cache(document.text, names=HOOKS, prepend_bos=True)
    cache = document.to_cache_dict()
    assert set(cache) == set(expected)
    for name, values in cache.items():
        torch.testing.assert_close(values, expected[name], atol=1e-4, rtol=1e-4, msg=name)
    assert set(document.to_cache_dict(["hook_embed"])) == {"hook_embed"}


def test_bfloat16_stays_what_it_is(corpus, tmp_path):
    recipe = make_recipe(corpus, dtype="bfloat16")
    run(recipe, tmp_path / "run")
    (values,) = open_store(tmp_path / "run").document(0).to_cache_dict().values()
    assert values.dtype == torch.bfloat16


def test_patterns_of_a_piece_of_a_sequence_are_refused(corpus, tmp_path):
    document = stored(corpus, tmp_path / "run").document(1)
    assert document.to_cache_dict(["hook_embed"])["hook_embed"].shape[1] == len(document.rows)
    with pytest.raises(ValueError, match="looks at keys that are not the document's"):
        document.to_cache_dict()


def test_xarray_knows_rows_and_axes_by_name(corpus, tmp_path):
    store = stored(corpus, tmp_path / "run", layout="documents")
    dataset = store.to_xarray()
    pattern = dataset["blocks.1.attn.hook_pattern"]
    assert pattern.dims == ("row", "head", "key_position")
    assert dataset.attrs["convention"] == "native"
    first = dataset["blocks.0.hook_resid_post"].sel(row=dataset.position.compute() == 0)
    assert first.sizes["row"] == 6
    assert set(dataset.coords) == {"input_ids", "position", "sequence"}
    assert "metrics/loss" in dataset

"""Stores of models that see a text whole: padding out of sight, special tokens around, no next token."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from support import MODELS, make_recipe, run

from actpipe import HookedModel, decompose_resid, open_store
from actpipe.errors import RecipeError, UnsupportedModelError
from actpipe.stores.token_table import TokenTable

STORED = {"bert": ["*"], "t5": ["hook_embed", "encoder.*", "encoder_final_ln.*"]}
CLS, SEP = 1, 2


def recipe_for(corpus, model, *, column=None, **extract):
    recipe = make_recipe(corpus, model, **extract)
    recipe["stages"][0] |= {"layout": "documents", "context_length": 24}
    if column:
        recipe["stages"][0]["dataset"]["column"] = column
    return recipe


@pytest.fixture
def ids_corpus(write_jsonl):
    generator = np.random.default_rng(0)
    return write_jsonl([{"ids": generator.integers(5, 199, n).tolist()} for n in (7, 20, 3, 12, 1)])


@pytest.fixture
def framing_bert(tmp_path):
    """A BERT whose tokenizer puts [CLS] and [SEP] around every text."""
    from tokenizers import processors
    from transformers import AutoTokenizer

    folder = tmp_path / "bert"
    shutil.copytree(MODELS / "bert", folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="t1 $A t2", special_tokens=[("t1", CLS), ("t2", SEP)]
    )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", STORED)
def test_a_store_holds_of_each_document_what_it_has_alone(family, ids_corpus, tmp_path):
    run(recipe_for(ids_corpus, MODELS / family, column="ids", hooks=STORED[family]), tmp_path / "run")
    store = open_store(tmp_path / "run")
    model = HookedModel.from_pretrained(str(MODELS / family), dtype="float32", device="cpu")
    assert store.hook_names == model.select(STORED[family])

    for number, length in enumerate((7, 20, 3, 12, 1)):
        document = store.document(number)
        _, cache = model.run_with_cache(document.input_ids, names=store.hook_names)
        for name in store.hook_names:
            found, expected = document[name], cache[name][0].numpy()
            if model.hook_points[name].looks_at_keys:
                found, expected = found[..., :length], expected.swapaxes(0, 1)
            np.testing.assert_allclose(found, expected, atol=1e-4, err_msg=name)


def test_every_sequence_of_an_encoder_stands_between_its_special_tokens(framing_bert, write_jsonl, tmp_path):
    texts = [" ".join(f"t{40 + i}" for i in range(n)) for n in (3, 40, 22)]
    corpus = write_jsonl([{"text": text} for text in texts])
    run(recipe_for(corpus, framing_bert, hooks=["blocks.1.hook_normalized_resid_post"]), tmp_path / "run")
    store = open_store(tmp_path / "run")

    sequences = [sequence.ids.tolist() for sequence in TokenTable(store.folder).read_sequences()]
    assert sequences == [[CLS, *range(40, 40 + n), SEP] for n in (3, 22, 22)]
    assert [len(store.document(i).input_ids) for i in range(3)] == [3, 22, 22]
    assert store.tokens.manifest.n_truncated == 18
    model = HookedModel.from_pretrained(str(framing_bert), dtype="float32", device="cpu")
    _, cache = model.run_with_cache(sequences[0])
    found = store.document(0)["blocks.1.hook_normalized_resid_post"]
    np.testing.assert_allclose(found, cache["blocks.1.hook_normalized_resid_post"][0, 1:-1], atol=1e-4)


@pytest.mark.parametrize(
    ("family", "extract", "tokenize", "analysis", "message"),
    [
        ("bert", {"metrics": ["loss"]}, {}, None, "metrics are of the next token, which a bert model does not predict"),
        ("t5", {"metrics": ["loss"], "hooks": ["encoder.*"]}, {}, None, "which a t5 model does not predict"),
        ("t5", {"hooks": ["*"]}, {}, None, "decoder.0.hook_resid_pre cannot be stored: .* name hooks of `encoder"),
        ("t5", {"hooks": ["decoder.1.cross_attn.hook_k"]}, {}, None, "a corpus gives the encoder's input"),
        ("bert", {"hooks": ["blocks.0.hook_mlp_in"]}, {}, None, "blocks.0.hook_resid_mid holds it"),
        ("bert", {}, {"layout": "packed"}, None, "every token sees both its sides; use layout: documents"),
        ("bert", {}, {"prepend_bos": True}, None, "puts nothing around a text"),
        ("bert", {}, {}, "decompose_residual", "decompose_residual is for models that predict the next token"),
        ("t5", {"hooks": ["encoder.*"]}, {}, "attribute_logits", "attribute_logits is for models that predict"),
        ("bert", {"hooks": ["*"]}, {}, "score_heads", "this bert model sees a text whole; leave the stage out"),
        ("bert", {}, {"context_length": 65}, None, "above the 64 positions"),
    ],
)
def test_what_such_models_do_not_have_is_refused_before_anything_runs(
    family, extract, tokenize, analysis, message, ids_corpus, tmp_path
):
    hooks = extract.pop("hooks", ["blocks.0.hook_resid_post"])
    recipe = recipe_for(ids_corpus, MODELS / family, column="ids", hooks=hooks, **extract)
    recipe["stages"][0] |= tokenize
    if analysis:
        recipe["stages"].append({"stage": analysis})

    with pytest.raises(RecipeError, match=message):
        run(recipe, tmp_path / "run")
    assert not (tmp_path / "run" / "store.zarr").exists()


def test_windows_would_close_sequences_inside_documents(framing_bert, corpus, tmp_path):
    recipe = recipe_for(corpus, framing_bert, hooks=["blocks.0.hook_resid_post"])
    recipe["stages"][0] |= {"overflow": "windows", "stride": 8}

    with pytest.raises(RecipeError, match="closing token of a bert model into the middle of documents"):
        run(recipe, tmp_path / "run")


def test_the_residual_stream_of_an_encoder_is_not_taken_apart(ids_corpus, tmp_path):
    run(recipe_for(ids_corpus, MODELS / "bert", column="ids", hooks=["*"]), tmp_path / "run")

    with pytest.raises(UnsupportedModelError, match="is of bert, whose residual stream is no sum"):
        decompose_resid(open_store(tmp_path / "run"))

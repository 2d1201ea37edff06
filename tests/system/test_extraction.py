"""What is stored is what the model computes on each sequence alone, whatever the batches and parts."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from support import INDUCTION, MODELS, make_recipe, run

from actpipe import HookedModel, open_store
from actpipe.errors import DatasetError, DtypeOverflowError, IdentityError
from actpipe.stores.writing import read_commit

LLAMA = MODELS / "llama"
ALL_KINDS = [
    "hook_embed",
    "blocks.*.hook_resid_pre",
    "blocks.*.ln1.*",
    "blocks.*.attn.*",
    "blocks.*.mlp.*",
    "blocks.*.hook_resid_post",
    "ln_final.*",
]


def documents_recipe(corpus, model=LLAMA, **extract):
    recipe = make_recipe(corpus, model, **extract)
    recipe["stages"][0] |= {"layout": "documents", "context_length": 24, "prepend_bos": False}
    recipe["stages"][0]["dataset"]["column"] = "ids"
    return recipe


@pytest.fixture
def id_corpus(write_jsonl):
    """Documents of 1 to 40 token ids of the tiny models' vocabulary."""
    generator = np.random.default_rng(0)
    lengths = [1, 2, 24, 25, 40, 7, 24, 3, 12, 24, 30, 1]
    return write_jsonl([{"ids": generator.integers(5, 199, length).tolist()} for length in lengths])


@pytest.mark.parametrize("rows_per_part", [16, 33, 1000])
@pytest.mark.parametrize("overflow", ["truncate", "windows"])
def test_every_row_is_what_its_sequence_gives_alone(id_corpus, tmp_path, rows_per_part, overflow):
    recipe = documents_recipe(id_corpus, hooks=ALL_KINDS, rows_per_part=rows_per_part)
    recipe["stages"][0] |= {"overflow": overflow} | ({"stride": 10} if overflow == "windows" else {})
    run(recipe, tmp_path / "run")
    store = open_store(tmp_path / "run")
    model = HookedModel.from_pretrained(str(LLAMA), device="cpu")

    assert len(store.hook_names) > 30
    for sequence in store.tokens.read_sequences():
        rows = np.arange(sequence.first_row, sequence.row_stop)
        np.testing.assert_array_equal(store.rows("tokens/input_ids", rows), sequence.ids[sequence.n_context :])
        np.testing.assert_array_equal(
            store.rows("tokens/position", rows), np.arange(sequence.n_context, len(sequence.ids))
        )
        assert set(store.rows("tokens/sequence", rows)) == {sequence.sequence}
        _, cache = model.run_with_cache(sequence.ids)
        for name in store.hook_names:
            expected = cache[name][0]
            if name.endswith(("attn_scores", "pattern")):
                expected = expected.transpose(0, 1)
            stored = store.rows(name, rows)
            length = expected.shape[-1] if name.endswith(("attn_scores", "pattern")) else stored.shape[-1]
            np.testing.assert_allclose(
                stored[..., :length], expected[sequence.n_context :].numpy(), atol=2e-5, err_msg=name
            )
            beyond = stored[..., length:]
            assert (beyond == (-np.inf if name.endswith("scores") else 0)).all()


def test_metrics_are_those_of_the_models_own_logits(id_corpus, tmp_path):
    recipe = documents_recipe(id_corpus, hooks=[], metrics=["loss", "entropy", "correct", "correct_logit"])
    run(recipe, tmp_path / "run")
    store = open_store(tmp_path / "run")
    model = HookedModel.from_pretrained(str(LLAMA), device="cpu")

    for sequence in store.tokens.read_sequences():
        log_probabilities = model.forward(sequence.ids)[0].double().log_softmax(-1)
        targets = torch.from_numpy(sequence.ids[1:].astype(np.int64))
        rows = np.arange(sequence.first_row, sequence.row_stop)
        stored = {name: store.rows(f"metrics/{name}", rows) for name in recipe["stages"][1]["metrics"]}

        loss = -log_probabilities[:-1].gather(-1, targets[:, None])[:, 0]
        np.testing.assert_allclose(stored["loss"][:-1], loss, atol=1e-5)
        entropy = -(log_probabilities.exp() * log_probabilities).sum(-1)
        np.testing.assert_allclose(stored["entropy"], entropy, atol=1e-5)
        np.testing.assert_array_equal(stored["correct"][:-1], (log_probabilities[:-1].argmax(-1) == targets).float())
        logits = model.forward(sequence.ids)[0, :-1].gather(-1, targets[:, None])[:, 0]
        np.testing.assert_allclose(stored["correct_logit"][:-1], logits, atol=1e-5)
        for name in ("loss", "correct", "correct_logit"):
            assert np.isnan(stored[name][-1])


def test_the_store_does_not_depend_on_parts_or_batches_beyond_rounding(id_corpus, tmp_path):
    stores = []
    for number, (rows_per_part, batch_tokens) in enumerate([(1000, 8192), (16, 8192), (50, 24), (7, 100)]):
        recipe = documents_recipe(id_corpus, hooks=["blocks.1.*"])
        recipe["stages"][1] |= {"rows_per_part": rows_per_part, "batch_tokens": batch_tokens}
        run(recipe, tmp_path / str(number))
        stores.append(open_store(tmp_path / str(number)))

    for name in stores[0].hook_names:
        first = stores[0][name].compute()
        for other in stores[1:]:
            np.testing.assert_allclose(other[name].compute(), first, atol=2e-5, err_msg=name)


def test_only_the_layers_below_the_last_hook_are_run(id_corpus, tmp_path, monkeypatch):
    entered = []
    original = HookedModel.from_source.__func__

    def watched(cls, *args, **kwargs):
        model = original(cls, *args, **kwargs)
        for layer, block in enumerate(model.anatomy.blocks):
            block.register_forward_pre_hook(lambda _, __, layer=layer: entered.append(layer))
        model.anatomy.unembed.register_forward_pre_hook(lambda *_: entered.append("unembed"))
        return model

    monkeypatch.setattr(HookedModel, "from_source", classmethod(watched))
    monkeypatch.setattr("actpipe.stages.extract_activations.prove_hooks", lambda *_: None)
    run(documents_recipe(id_corpus, hooks=["blocks.0.hook_resid_post"]), tmp_path / "run")

    assert set(entered) == {0}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_every_element_type_is_stored_as_rounding_the_models_values_gives_it(id_corpus, tmp_path, dtype):
    name = "blocks.1.hook_resid_post"
    run(documents_recipe(id_corpus, hooks=[name], dtype=dtype), tmp_path / dtype)
    run(documents_recipe(id_corpus, hooks=[name]), tmp_path / "model")

    stored = open_store(tmp_path / dtype)[name].compute()
    exact = torch.from_numpy(open_store(tmp_path / "model")[name].compute().copy())
    expected = exact.to(getattr(torch, dtype)).float().numpy()
    assert stored.dtype.name == dtype
    np.testing.assert_array_equal(stored.astype(np.float32), expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_models_run_and_are_stored_in_their_own_type(id_corpus, tmp_path, dtype):
    recipe = documents_recipe(id_corpus, hooks=["blocks.1.hook_resid_post", "blocks.0.attn.hook_pattern"])
    recipe["model"]["dtype"] = dtype
    run(recipe, tmp_path / "run")

    store = open_store(tmp_path / "run")
    assert store["blocks.1.hook_resid_post"].dtype.name == dtype
    assert np.isfinite(store["blocks.1.hook_resid_post"].compute().astype(np.float32)).all()


class TestValuesTooLargeForFloat16:
    """A model whose second MLP writes values above 65,504."""

    @pytest.fixture
    def large_model(self, tmp_path):
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(MODELS / "gpt2")
        with torch.no_grad():
            model.transformer.h[1].mlp.c_proj.bias[3] = 1e6
        model.save_pretrained(tmp_path / "large")
        return tmp_path / "large"

    def recipe(self, id_corpus, large_model, **extract):
        recipe = documents_recipe(id_corpus, large_model, hooks=["blocks.*.hook_mlp_out"], dtype="float16", **extract)
        recipe["stages"][0]["layout"] = "documents"
        recipe["stages"][0]["dataset"]["column_type"] = "token_ids"
        return recipe

    def test_they_are_an_error_that_names_hook_layer_and_count(self, id_corpus, tmp_path, large_model):
        with pytest.raises(DtypeOverflowError, match=r"\d+ values of blocks.1.hook_mlp_out \(layer 1\).*float16"):
            run(self.recipe(id_corpus, large_model), tmp_path / "run")
        assert not list((tmp_path / "run" / "commits").glob("part-*"))
        assert not list((tmp_path / "run" / ".partial").glob("part-*"))

    def test_they_are_clipped_and_counted_where_the_recipe_says_so(self, id_corpus, tmp_path, large_model):
        run(self.recipe(id_corpus, large_model, on_overflow="clip"), tmp_path / "run")
        store = open_store(tmp_path / "run")

        values = store["blocks.1.hook_mlp_out"].compute()
        assert (values[:, 3] == np.finfo(np.float16).max).all()
        assert np.isfinite(values).all()
        commits = [read_commit(path) for path in sorted((tmp_path / "run" / "commits").glob("part-*"))]
        assert sum(c.n_clipped["activations/blocks.1.hook_mlp_out"] for c in commits) == store.n_rows

    def test_bfloat16_holds_them(self, id_corpus, tmp_path, large_model):
        recipe = self.recipe(id_corpus, large_model)
        recipe["stages"][1]["dtype"] = "bfloat16"
        run(recipe, tmp_path / "run")

        assert (open_store(tmp_path / "run")["blocks.1.hook_mlp_out"][:, 3].compute().astype(float) > 9e5).all()


def test_masked_scores_stay_infinite_in_float16_and_count_as_no_overflow(id_corpus, tmp_path):
    run(documents_recipe(id_corpus, hooks=["blocks.0.attn.hook_attn_scores"], dtype="float16"), tmp_path / "run")

    scores = open_store(tmp_path / "run")["blocks.0.attn.hook_attn_scores"].compute()
    assert np.isneginf(scores[0, :, 1:]).all()
    assert np.isfinite(scores[0, :, 0]).all()


def test_a_hook_that_contradicts_the_model_is_refused_and_nothing_is_stored(id_corpus, tmp_path, monkeypatch):
    from actpipe.models import taps

    monkeypatch.setattr(taps, "_read_z", lambda tensor, n_heads: tensor.reshape(*tensor.shape[:-1], n_heads, -1) * 2)

    with pytest.raises(IdentityError, match=r"blocks\.0\.attn\.hook_z of this llama model is not stored.*in layer"):
        run(documents_recipe(id_corpus, hooks=["blocks.*.attn.hook_z"]), tmp_path / "run")
    assert not list((tmp_path / "run" / "commits").glob("part-*"))


def test_a_hook_beside_the_wrong_one_is_still_stored(id_corpus, tmp_path, monkeypatch):
    from actpipe.models import taps

    monkeypatch.setattr(taps, "_read_z", lambda tensor, n_heads: tensor.reshape(*tensor.shape[:-1], n_heads, -1) * 2)
    run(documents_recipe(id_corpus, hooks=["blocks.*.mlp.hook_pre"]), tmp_path / "run")

    assert open_store(tmp_path / "run").hook_names == ("blocks.0.mlp.hook_pre", "blocks.1.mlp.hook_pre")


def test_a_tokenizer_that_does_not_belong_to_the_model_is_refused(write_jsonl, tmp_path):
    model = tmp_path / "mixed"
    shutil.copytree(LLAMA, model)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(INDUCTION / name, model / name)

    with pytest.raises(DatasetError, match="tokenizer and model do not belong together"):
        run(make_recipe(write_jsonl([{"text": "To be, or not to be, that is the question"}]), model), tmp_path / "run")

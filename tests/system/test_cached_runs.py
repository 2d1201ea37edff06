"""Prefixes, long documents in pieces, and continued prompts: stored activations equal those of one whole pass."""

from __future__ import annotations

import numpy as np
import pytest
from families import build
from support import INDUCTION, MODELS, SPEECHES, TEXTS, all_bytes, make_recipe, run

from actpipe import HookedModel, open_store
from actpipe.compute.sampling import Sampling
from actpipe.errors import RecipeError, StoreMismatchError
from actpipe.models.generation import Continuation
from actpipe.running import plan_recipe
from actpipe.stores.continuations import Continuations

NAMES = ("hook_resid_post", "attn.hook_z", "attn.hook_k", "attn.hook_pattern")
HOOKS = ["hook_embed", *(f"blocks.*.{name}" for name in NAMES)]
PREFIX = "First Citizen:\nBefore we proceed any further, hear me speak."
FAMILIES = [
    "gpt2",
    "opt",
    "llama",
    "mistral",
    "gemma2",
    "gpt_neox",
    "gptj",
    "bloom",
    "falcon, alibi",
    "mpt",
    "mixtral",
    "phi3",
]
"""Learned, rotary and ALiBi positions; windows of six tokens; experts; attention code of the models' own."""


def whole(model, store, name):
    """Return the rows of one name as one pass over each whole sequence gives them."""
    rows = []
    for sequence in store.tokens.read_sequences():
        _, cache = model.run_with_cache(sequence.ids, names=[name])
        values = cache[name].transpose(1, 2) if name.endswith("pattern") else cache[name]
        values = values[0, sequence.n_context :].numpy()
        if name.endswith("pattern"):
            missing = store.manifest.context_length - values.shape[-1]
            values = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, missing)])
        rows.append(values)
    return np.concatenate(rows)


def assert_whole(out, model):
    store = open_store(out)
    for name in store.hook_names:
        np.testing.assert_allclose(store[name].compute(), whole(model, store, name), atol=1e-4, rtol=1e-4, err_msg=name)
    return store


def recipe_of(corpus, model=INDUCTION, tokenize=None, **extract):
    recipe = make_recipe(corpus, model, **{"hooks": HOOKS, **extract})
    recipe["stages"][0] |= {"layout": "documents", "context_length": 60, **(tokenize or {})}
    return recipe


def load(path=INDUCTION):
    return HookedModel.from_pretrained(str(path), dtype="float32", device="cpu")


@pytest.mark.parametrize("family", FAMILIES)
def test_sequences_in_pieces_after_a_prefix_are_those_of_one_pass(family, write_jsonl, tmp_path):
    build(family).native.save_pretrained(tmp_path / "model")
    generator = np.random.default_rng(0)
    corpus = write_jsonl([{"ids": generator.integers(5, 199, n).tolist()} for n in (7, 20, 3, 26, 1)])
    recipe = recipe_of(
        corpus, tmp_path / "model", {"context_length": 32, "prefix": {"ids": [7, 8, 9, 5]}}, chunk_tokens=7
    )
    recipe["stages"][0]["dataset"] |= {"column": "ids", "column_type": "token_ids"}
    run(recipe, tmp_path / "run")
    assert_whole(tmp_path / "run", load(tmp_path / "model"))


@pytest.mark.parametrize("layout", ["documents", "windows", "packed"])
@pytest.mark.parametrize("chunk_tokens", [None, 11])
def test_a_prefix_is_run_once_and_stands_before_every_sequence(layout, chunk_tokens, corpus, tmp_path):
    tokenize = {"prefix": {"text": PREFIX}, "layout": "documents" if layout == "windows" else layout}
    tokenize |= {"overflow": "windows", "stride": 13} if layout == "windows" else {}
    recipe = recipe_of(corpus, tokenize=tokenize, metrics=["loss"], chunk_tokens=chunk_tokens, rows_per_part="auto")
    run(recipe, tmp_path / "run")
    model = load()
    store = assert_whole(tmp_path / "run", model)

    prefix = [0, *model.tokenizer(PREFIX)["input_ids"]]
    assert list(store.tokens.manifest.prefix_ids) == prefix
    sequences = list(store.tokens.read_sequences())
    assert all(sequence.ids[: len(prefix)].tolist() == prefix for sequence in sequences)
    assert all(sequence.n_context >= len(prefix) for sequence in sequences)
    assert int(store["tokens/position"].min().compute()) == len(prefix)
    losses = store["metrics/loss"].compute()
    expected = [
        model.forward(s.ids, return_type="loss", loss_per_token=True)[0].numpy()[s.n_context :] for s in sequences
    ]
    kept = np.concatenate([np.append(loss, np.nan) for loss in expected])
    np.testing.assert_allclose(losses, kept, atol=1e-4)


def test_the_prefix_has_rows_once_where_that_is_wanted(corpus, tmp_path):
    run(recipe_of(corpus, tokenize={"prefix": {"text": PREFIX, "store": "once"}}), tmp_path / "once")
    run(recipe_of(corpus, tokenize={"prefix": {"text": PREFIX}}), tmp_path / "none")
    once, none = assert_whole(tmp_path / "once", load()), open_store(tmp_path / "none")
    document = once.document(len(TEXTS))
    assert document.id == "(prefix)"
    assert document.text.endswith(PREFIX)
    assert once.n_rows == none.n_rows + len(once.tokens.manifest.prefix_ids)
    name = "blocks.1.hook_resid_post"
    np.testing.assert_array_equal(once[name].compute()[: none.n_rows], none[name].compute())


def test_what_cannot_have_a_prefix_says_so(corpus, tmp_path):
    for prefix, message in (
        ({"text": "a", "ids": [1]}, "exactly one of `text` and `ids`"),
        ({"ids": [99_999]}, "outside the vocabulary"),
        ({"text": PREFIX * 3}, "leaves no room beside special tokens and a prefix of"),
    ):
        with pytest.raises(RecipeError, match=message):
            run(recipe_of(corpus, tokenize={"prefix": prefix}), tmp_path / "run")
    bert = recipe_of(corpus, MODELS / "bert", {"context_length": 16}, hooks=["blocks.0.hook_resid_post"])
    bert["stages"][0]["prefix"] = {"text": "a"}
    with pytest.raises(RecipeError, match="the tokens of a bert model see what follows"):
        run(bert, tmp_path / "run")
    del bert["stages"][0]["prefix"]
    bert["stages"][1]["chunk_tokens"] = 4
    with pytest.raises(RecipeError, match="chunk_tokens: a bert model's tokens see what follows"):
        run(bert, tmp_path / "run")


def generating(corpus, **settings):
    recipe = recipe_of(corpus, tokenize={"context_length": 20})
    recipe["stages"][1:1] = [{"stage": "generate_text", "max_new_tokens": 6, "seed": 3, **settings}]
    recipe["stages"][2] |= {"corpus": "generated", "metrics": ["loss"]}
    return recipe


def test_continuations_are_stored_beside_their_prompts_and_flagged(corpus, tmp_path):
    run(generating(corpus, temperature=0.8, top_k=40, top_p=0.95), tmp_path / "run")
    model = load()
    store = assert_whole(tmp_path / "run" / "corpora" / "generated", model)
    prompts = list(open_tokens(tmp_path / "run").read_sequences())
    how = Continuation(6, Sampling(0.8, 40, 0.95), model.eos_ids, seed=3)
    for number, (prompt, both) in enumerate(zip(prompts, store.tokens.read_sequences(), strict=True)):
        (added,) = model.continue_prompts([prompt.ids], how, numbers=[prompt.sequence])
        assert both.ids.tolist() == [*prompt.ids.tolist(), *added.tolist()]
        assert both.n_prompt == len(prompt.ids)
        document = store.document(number)
        assert document.columns["line"] == number
        assert document.columns["n_prompt_tokens"] == len(prompt.ids)
        flags = store["tokens/generated"].compute()[both.first_row : both.row_stop]
        assert flags.tolist() == [False] * len(prompt.ids) + [True] * len(added)


def open_tokens(out):
    from actpipe.stores.layout import RunFolder
    from actpipe.stores.token_table import TokenTable

    return TokenTable(RunFolder(out))


def test_generating_goes_on_where_it_stopped_and_ends_with_the_same_bytes(tmp_path, monkeypatch):
    recipe = generating(SPEECHES, prompt_tokens_per_part=64)
    recipe["stages"][0] |= {"max_documents": 40}
    run(recipe, tmp_path / "whole")

    written = Continuations.write
    calls = []

    def stop_at_the_fourth(self, part, new):
        calls.append(part.index)
        if len(calls) == 4:
            raise KeyboardInterrupt
        written(self, part, new)

    monkeypatch.setattr(Continuations, "write", stop_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "stopped")
    run(recipe, tmp_path / "stopped")
    assert len(set(calls)) == len(calls) - 1
    assert all_bytes(tmp_path / "stopped") == all_bytes(tmp_path / "whole")


def test_a_plan_counts_what_will_be_generated(corpus, tmp_path):
    findings = plan_recipe(generating(corpus), out=tmp_path / "run")
    assert any("generated" in finding.title and finding.rows[0][0] == "prompts" for finding in findings)
    assert not (tmp_path / "run").exists()


def test_a_changed_temperature_does_not_continue_a_run(corpus, tmp_path):
    run(generating(corpus), tmp_path / "run")
    with pytest.raises(StoreMismatchError, match=r"generate_text@generated\.temperature: 1\.0 -> 0\.5"):
        run(generating(corpus, temperature=0.5), tmp_path / "run")


def test_prompts_that_leave_no_room_and_models_that_do_not_continue_are_refused(corpus, tmp_path):
    with pytest.raises(RecipeError, match=r"context_length of the prompts with max_new_tokens \(100020\) is above the"):
        run(generating(corpus, max_new_tokens=100_000), tmp_path / "run")
    recipe = generating(corpus)
    recipe["model"]["name"] = str(MODELS / "bert")
    with pytest.raises(RecipeError, match="a bert model does not continue a text"):
        run(recipe, tmp_path / "run")
    with pytest.raises(RecipeError, match="continuations need a corpus of their own"):
        run(generating(corpus, prompts="generated"), tmp_path / "run")

"""Copying by heads is what their outputs, put through the whole unembedding in float64, do to the logits."""

from __future__ import annotations

import dask
import numpy as np
import pytest
from support import INDUCTION, MODELS, TEXTS, make_recipe, run

from actpipe import HookedModel, open_results, open_store, stack_head_results
from actpipe.errors import ActpipeError
from actpipe.jobs.copying import score_store_copying
from actpipe.unembedding import copying_weights

HOOKS = ["blocks.*.attn.hook_pattern", "blocks.*.attn.hook_z", "ln_final.hook_scale"]


def recipe_of(corpus, model=INDUCTION, *more_hooks, **settings):
    recipe = make_recipe(corpus, model, hooks=[*HOOKS, *more_hooks])
    recipe["stages"][0] |= {"layout": "documents", "context_length": 24}
    recipe["stages"].append({"stage": "score_copying", **settings})
    return recipe


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text("\n".join([*TEXTS, "x"]))
    return path


def witness(store, model, *, exclude_bos, exclude_current_token):
    """Raise and standardized raise of every head, from all logits that each adds at each token."""
    weights = model.weights
    writes, labels = stack_head_results(store, weights)
    writes = writes.compute().astype(np.float64)
    unembedding = weights.W_U.double().numpy() * weights["ln_final.w"].double().numpy()[:, None]
    if model.shape.norm == "LN":
        writes = writes - writes.mean(-1, keepdims=True)
    logits = writes @ unembedding / store["ln_final.hook_scale"].compute().astype(np.float64)
    sums = np.zeros((3, len(labels)))
    for sequence in store.tokens.read_sequences():
        rows = range(sequence.first_row, sequence.row_stop) if len(sequence.ids) > 1 else ()
        for query, row in enumerate(rows, sequence.n_context):
            for number, label in enumerate(labels):
                layer, head = map(int, str(label)[1:].split("H"))
                attention = store.rows(f"blocks.{layer}.attn.hook_pattern", [row])[0, head].astype(np.float64)
                own = logits[number, row]
                for key, token in enumerate(sequence.ids[: query + 1].tolist()):
                    if not (exclude_bos and key == 0) and not (exclude_current_token and key == query):
                        raised = own[token] - own.mean()
                        sums[:, number] += attention[key] * np.array([1, raised, raised / own.std()])
    return sums[1:] / sums[0]


@pytest.mark.parametrize(
    ("name", "more"), [("gpt2", ()), ("llama", ()), ("gemma2", ("blocks.*.ln1_post.hook_scale",)), ("gptj", ())]
)
def test_logits_are_raised_as_the_whole_unembedding_says(corpus, tmp_path, name, more):
    run(recipe_of(corpus, MODELS / name, *more), tmp_path)
    store, model = open_store(tmp_path), HookedModel.from_pretrained(str(MODELS / name), device="cpu")
    expected = witness(store, model, exclude_bos=False, exclude_current_token=False)

    result = open_results(tmp_path, "score_copying")
    table = result.table.sort_values(["layer", "head"])
    np.testing.assert_allclose(table[["raised", "standardized"]].to_numpy().T, expected, rtol=2e-3, atol=1e-6)
    np.testing.assert_array_equal(
        result.dataset["score"].values.reshape(2, -1), table[["raised", "standardized"]].to_numpy().T
    )
    assert result.table["standardized"].is_monotonic_decreasing


@pytest.mark.parametrize("exclude_bos", [False, True])
@pytest.mark.parametrize("exclude_current_token", [False, True])
def test_what_is_left_out_has_no_weight(corpus, tmp_path, exclude_bos, exclude_current_token):
    options = {"exclude_bos": exclude_bos, "exclude_current_token": exclude_current_token}
    run(recipe_of(corpus, MODELS / "gpt2", **options), tmp_path)
    model = HookedModel.from_pretrained(str(MODELS / "gpt2"), device="cpu")

    table = open_results(tmp_path, "score_copying").table.sort_values(["layer", "head"])
    expected = witness(open_store(tmp_path), model, **options)
    np.testing.assert_allclose(table[["raised", "standardized"]].to_numpy().T, expected, rtol=2e-3, atol=1e-6)


def test_of_windows_only_the_stored_queries_count_with_all_their_keys(corpus, tmp_path):
    recipe = recipe_of(corpus, MODELS / "gpt2")
    recipe["stages"][0] |= {"context_length": 8, "overflow": "windows", "stride": 5}
    run(recipe, tmp_path)
    store, model = open_store(tmp_path), HookedModel.from_pretrained(str(MODELS / "gpt2"), device="cpu")

    assert any(sequence.n_context for sequence in store.tokens.read_sequences())
    table = open_results(tmp_path, "score_copying").table.sort_values(["layer", "head"])
    expected = witness(store, model, exclude_bos=False, exclude_current_token=False)
    np.testing.assert_allclose(table[["raised", "standardized"]].to_numpy().T, expected, rtol=2e-3, atol=1e-6)


def test_copying_depends_on_no_block_and_no_number_of_workers(corpus, tmp_path):
    run(recipe_of(corpus), tmp_path)
    store, weights = open_store(tmp_path), copying_weights(HookedModel.from_pretrained(str(INDUCTION), device="cpu"))
    found = []
    for scheduler, block_bytes in (("synchronous", 10**9), ("synchronous", 40_000), ("threads", 40_000)):
        with dask.config.set(scheduler=scheduler):
            options = {"exclude_bos": False, "exclude_current_token": False, "block_bytes": block_bytes}
            sums = score_store_copying(store, weights, **options)
        found.append(np.stack([sums[layer].means for layer in range(2)]))

    np.testing.assert_allclose(found[1], found[0], rtol=1e-12)
    np.testing.assert_array_equal(found[2], found[1])


def test_a_corpus_of_single_tokens_has_no_copying(tmp_path):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("x\ny")
    recipe = recipe_of(corpus)
    recipe["stages"][0]["prepend_bos"] = False
    run(recipe, tmp_path / "run")

    table = open_results(tmp_path / "run", "score_copying").table
    assert len(table) == 8
    assert table[["raised", "standardized"]].isna().all(axis=None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "bert", "hooks": HOOKS[:2]}, "this bert model sees a text whole"),
        ({"hooks": HOOKS[:2]}, r"score_copying needs ln_final\.hook_scale"),
        ({"hooks": HOOKS[::2]}, r"score_copying needs blocks\.0\.attn\.hook_z"),
        ({"keep": {"every": 2}}, "keeps only some of their tokens"),
        ({"convention": "processed"}, "set `model.convention: native`"),
    ],
    ids=str,
)
def test_what_copying_cannot_be_read_from_is_refused(corpus, tmp_path, change, message):
    recipe = recipe_of(corpus, MODELS / change.pop("model", "gpt2"))
    recipe["model"] |= {"convention": change.pop("convention", "native")}
    recipe["stages"][1] |= change

    with pytest.raises(ActpipeError, match=message):
        run(recipe, tmp_path / "run")

"""Attribution to neurons, of several tokens and of tokens in columns, and its means by group, against float64."""

from __future__ import annotations

import json

import dask
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import INDUCTION, MODELS, make_recipe, run

from actpipe import HookedModel, open_results, open_store
from actpipe.compute.attribution import FoldedUnembedding, most_probable
from actpipe.errors import DatasetError, IdentityError, RecipeError
from actpipe.jobs.attribution import AttributionWeights, attribute_store
from actpipe.jobs.attribution_targets import Target, TokensOfRows, by_tokens, count_tokens, most_frequent
from actpipe.jobs.neuron_attribution import largest_neurons, sum_neurons
from actpipe.lenses import attribution_weights

FAMILIES = ["gpt2", "gemma2"]
HOOKS = [
    "hook_embed",
    "blocks.*.hook_attn_out",
    "blocks.*.hook_mlp_out",
    "blocks.*.attn.hook_z",
    "blocks.*.mlp.hook_post",
    "blocks.-1.hook_resid_post",
    "ln_final.hook_scale",
]
MORE = {
    "gpt2": ["hook_pos_embed"],
    "gemma2": ["blocks.*.ln1_post.hook_scale", "blocks.*.ln2_post.hook_scale"],
}
STAGES = [
    {"stage": "attribute_logits", "neurons": 5, "keep_rows": True, "block_bytes": 60_000},
    {
        "stage": "attribute_logits",
        "name": "ranks",
        "target": {"top": 3},
        "by": "target",
        "tokens": 4,
        "neurons": 2,
        "keep_rows": True,
        "block_bytes": 60_000,
    },
    {
        "stage": "attribute_logits",
        "name": "answers",
        "target": {"column": "right"},
        "minus": {"column": "wrong"},
        "rows": "last",
        "by": "kind",
        "keep_rows": True,
    },
    {"stage": "attribute_logits", "name": "tokens", "by": "token", "tokens": 7, "keep_rows": True},
    {"stage": "attribute_logits", "name": "documents", "by": "document", "keep_rows": True, "block_bytes": 60_000},
]


def documents() -> list[dict]:
    generator = np.random.default_rng(1)
    lengths = [9, 2, 14, 5, 1, 11]
    return [
        {
            "id": f"d{i}",
            "ids": generator.integers(5, 25, n).tolist(),
            "right": 30 + i,
            "wrong": None if i == 3 else 60 - i,
            "kind": "even" if i % 2 == 0 else "odd",
            "token": "a" if i < 2 else "b",
        }
        for i, n in enumerate(lengths)
    ]


def recipe_of(folder, family, rows, *stages):
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = make_recipe(path, MODELS / family, hooks=[*HOOKS, *MORE.get(family, [])], rows_per_part=16)
    recipe["stages"][0] |= {"layout": "documents", "context_length": 24, "prepend_bos": False}
    recipe["stages"][0]["dataset"]["column"] = "ids"
    return {**recipe, "stages": [*recipe["stages"], *stages]}


@pytest.fixture(scope="module", params=FAMILIES)
def attributed(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    run(recipe_of(folder, request.param, documents(), *STAGES, {"stage": "write_report"}), folder / "run")
    return folder / "run", HookedModel.from_pretrained(str(MODELS / request.param), device="cpu")


def logits_of(folder, model) -> np.ndarray:
    """Return the model's own logits of every row, before any soft cap, in the order of rows."""
    store = open_store(folder)
    rows = [model.forward(torch.tensor(s.ids[None].astype(np.int64)))[0] for s in store.tokens.read_sequences()]
    logits = torch.cat(rows).detach().double().numpy()
    cap = model.shape.logit_softcap
    return logits if cap is None else cap * np.arctanh(logits / cap)


def following(store) -> np.ndarray:
    ids, sequence = store["tokens/input_ids"].compute(), store["tokens/sequence"].compute()
    found = np.append(ids[1:], -1)
    found[np.append(sequence[1:] != sequence[:-1], True)] = -1
    return found


def kinds(folder, name):
    """Return kept attributions, and of each column its kind."""
    result = open_results(folder, name)
    table = result.table if "rank" not in result.table else result.table[result.table["rank"] == 0]
    return result.dataset["attribution"].values.astype(np.float64), table


def witness(store, model, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Return what every neuron writes, through a norm behind it, times the direction of a logit, in float64."""
    weights, shape = model.weights, model.shape
    W_U, gain = weights.W_U.double().numpy(), weights["ln_final.w"].double().numpy()
    direction = W_U.T[np.maximum(tokens, 0)] * gain
    scale = store["ln_final.hook_scale"].compute().astype(np.float64)

    def attributed(written: np.ndarray) -> np.ndarray:
        if shape.norm == "LN":
            written = written - written.mean(-1, keepdims=True)
        return np.einsum("...rd,rd->r...", written / scale, direction)

    found = {}
    for layer in range(shape.n_layers):
        post = store[f"blocks.{layer}.mlp.hook_post"].compute().astype(np.float64)
        W_out, b_out = (weights[f"blocks.{layer}.mlp.{name}"].double().numpy() for name in ("W_out", "b_out"))
        written = np.einsum("rn,nd->nrd", post, W_out)
        if shape.blocks[layer].ln2_post:
            behind = store[f"blocks.{layer}.ln2_post.hook_scale"].compute().astype(np.float64)
            written = written / behind * weights[f"blocks.{layer}.ln2_post.w"].double().numpy()
            assert not b_out.any()
        found[f"neurons {layer}"] = attributed(written)
        found[f"bias {layer}"] = attributed(np.broadcast_to(b_out, written.shape[1:]))
    return found


def test_neurons_are_those_of_the_formula_in_float64_and_the_others_are_the_rest(attributed):
    folder, model = attributed
    store, result = open_store(folder), open_results(folder, "attribute_logits")
    targets = following(store)
    there = targets >= 0
    expected = witness(store, model, targets)
    every = np.stack([expected[f"neurons {layer}"][there] for layer in range(2)], 1)
    rows, table = kinds(folder, "attribute_logits")
    neurons = table[table["kind"] == "neuron"]

    modulus = np.abs(every).mean(0)
    chosen = {(int(layer), int(neuron)) for layer, neuron in zip(neurons["layer"], neurons["neuron"], strict=True)}
    largest = np.argsort(-modulus.ravel())[:5]
    assert chosen == {divmod(int(place), modulus.shape[1]) for place in largest}
    for place, line in neurons.iterrows():
        one = every[:, int(line["layer"]), int(line["neuron"])]
        np.testing.assert_allclose(rows[there, place], one, atol=2e-5)
        assert line["mean"] == pytest.approx(one.mean(), abs=1e-6)
        assert line["std"] == pytest.approx(one.std(), abs=1e-5)
        assert line["mean_modulus"] == pytest.approx(np.abs(one).mean(), abs=1e-6)
    for kind, of_layer in (("other_neurons", lambda layer: every[:, layer].sum(-1)), ("mlp_bias", None)):
        for place, line in table[table["kind"] == kind].iterrows():
            layer = int(line["layer"])
            if of_layer is None:
                expected_rows = expected[f"bias {layer}"][there]
            else:
                own = [neuron for of, neuron in chosen if of == layer]
                expected_rows = of_layer(layer) - every[:, layer, own].sum(-1)
            np.testing.assert_allclose(rows[there, place], expected_rows, atol=5e-5)
    data = result.dataset
    np.testing.assert_allclose(data["neuron_mean"], every.mean(0), atol=1e-6)
    np.testing.assert_allclose(data["neuron_std"], every.std(0), atol=1e-5)
    np.testing.assert_allclose(data["neuron_mean_modulus"], modulus, atol=1e-6)
    assert result.record.summary["worst_neuron_error"] < 1e-4


@pytest.mark.parametrize("parts", [("mlp_out",), ("neuron", "other_neurons", "mlp_bias")])
@pytest.mark.parametrize("attention", [("attn_out",), ("head", "attn_bias")])
def test_whatever_parts_are_taken_the_sum_is_the_logit(attributed, parts, attention):
    folder, model = attributed
    store = open_store(folder)
    rows, table = kinds(folder, "attribute_logits")
    targets = following(store)
    there = np.flatnonzero(targets >= 0)
    wanted = table["kind"].isin([*parts, *attention, "embed", "pos_embed", "bias"]).to_numpy()

    np.testing.assert_allclose(
        rows[there][:, wanted].sum(-1), logits_of(folder, model)[there, targets[there]], atol=2e-4
    )
    assert np.isnan(rows[targets < 0]).all()


def test_the_top_tokens_are_the_models_and_each_ranks_sum_is_its_logit(attributed):
    folder, model = attributed
    result, logits = open_results(folder, "ranks"), logits_of(folder, model)
    order = np.argsort(-logits, -1, kind="stable")[:, :3]
    rows, table = kinds(folder, "ranks")

    np.testing.assert_array_equal(result.dataset["token_id"], order)
    for parts in (("attn_out", "mlp_out"), ("head", "attn_bias", "neuron", "other_neurons", "mlp_bias")):
        wanted = table["kind"].isin([*parts, "embed", "pos_embed", "bias"]).to_numpy()
        np.testing.assert_allclose(rows[..., wanted].sum(-1), np.take_along_axis(logits, order, -1), atol=2e-4)
    for rank in range(3):
        lines = result.table[result.table["rank"] == rank]
        np.testing.assert_allclose(lines["mean"], rows[:, rank].mean(0), atol=1e-6)
        np.testing.assert_allclose(lines["std"], rows[:, rank].std(0), atol=1e-5)
    assert result.dataset["mean_by_position"].dims == ("position", "rank", "component")
    assert result.record.summary["worst_sum_error"] < 2e-4


def test_means_by_target_are_those_of_its_rows_at_each_rank_and_none_is_lost(attributed):
    folder, _ = attributed
    data = open_results(folder, "ranks").dataset
    ids, rows = data["token_id"].values, data["attribution"].values.astype(np.float64)
    numbers, counts = np.unique(ids, return_counts=True)
    frequent = numbers[np.lexsort((numbers, -counts))][:4]

    assert data["target"].values.tolist() == [*frequent, -1]
    assert data["count_by_target"].values.sum() == ids.size
    for place, token in enumerate(data["target"].values):
        for rank in range(3):
            mine = ids[:, rank] == token if token >= 0 else ~np.isin(ids[:, rank], frequent)
            assert int(data["count_by_target"][place, rank]) == mine.sum()
            if mine.any():
                expected = rows[mine, rank].mean(0)
                np.testing.assert_allclose(data["mean_by_target"][place, rank], expected, atol=1e-5)


def test_tokens_in_columns_give_differences_at_the_last_row_of_each_document(attributed):
    folder, model = attributed
    store, result, logits = open_store(folder), open_results(folder, "answers"), logits_of(folder, model)
    rows, table = kinds(folder, "answers")
    last = np.cumsum([len(one["ids"]) for one in documents()]) - 1
    answered = [i for i in range(6) if i != 3]  # the fourth names no wrong token
    wanted = table["kind"].isin(["attn_out", "mlp_out", "embed", "pos_embed", "bias"]).to_numpy()

    expected = [logits[last[i], 30 + i] - logits[last[i], 60 - i] for i in answered]
    np.testing.assert_allclose(rows[last[answered]][:, wanted].sum(-1), expected, atol=2e-4)
    assert np.isnan(np.delete(rows, last[answered], 0)).all()
    assert result.record.summary["n_rows"] == 5
    assert result.record.summary["n_rows_left_out"] == store.n_rows - 5
    assert result.record.summary["logit"] == "the token in column 'right' minus that in 'wrong'"
    assert result.dataset["count_by_value"].values.tolist() == [3, 2]
    for number, kind in enumerate(result.dataset["value"].values):
        mine = [last[i] for i in answered if documents()[i]["kind"] == kind]
        np.testing.assert_allclose(result.dataset["mean_by_value"][number], rows[mine].mean(0), atol=1e-5)


def test_means_by_token_are_those_of_its_rows_and_the_rest_is_one_group(attributed):
    folder, _ = attributed
    store, data = open_store(folder), open_results(folder, "tokens").dataset
    there = following(store) >= 0
    ids, rows = store["tokens/input_ids"].compute()[there], data["attribution"].values.astype(np.float64)[there]
    numbers, counts = np.unique(ids, return_counts=True)
    frequent = numbers[np.lexsort((numbers, -counts))][:7]

    assert data["token"].values.tolist() == [*frequent, -1]
    assert data["count_by_token"].values.sum() == there.sum()
    for place, token in enumerate([*frequent, None]):
        mine = ~np.isin(ids, frequent) if token is None else ids == token
        np.testing.assert_allclose(data["mean_by_token"][place], rows[mine].mean(0), atol=1e-5)
        np.testing.assert_allclose(data["std_by_token"][place], rows[mine].std(0), atol=1e-5)


def test_means_by_document_are_those_of_its_rows(attributed):
    folder, _ = attributed
    store, data = open_store(folder), open_results(folder, "documents").dataset
    of_row = store.documents.of_rows(np.arange(store.n_rows))
    rows = data["attribution"].values.astype(np.float64)

    assert data["document_id"].values.tolist() == [f"d{i}" for i in range(6)]
    assert data["count_by_document"].values.tolist() == [len(one["ids"]) - 1 for one in documents()]
    for number in range(6):
        mine = rows[of_row == number][:-1]
        if len(mine):
            np.testing.assert_allclose(data["mean_by_document"][number], mine.mean(0), atol=1e-5)
        else:
            assert np.isnan(data["mean_by_document"][number]).all()


def found_in(store, weights, target, block_bytes):
    """Return everything that attribution sums, as arrays."""
    neurons = sum_neurons(store, weights, target, block_bytes=block_bytes)
    tokens = TokensOfRows(store, target, weights.unembedding)
    counts = count_tokens(tokens, "target", block_bytes=block_bytes, done=lambda _: None)
    chosen = most_frequent(counts, 5)
    sums = attribute_store(
        store,
        weights,
        block_bytes=block_bytes,
        target=target,
        groups=by_tokens("target", chosen, store.shape.d_vocab),
        neurons=largest_neurons(neurons.modulus.sum(0), 3, weights.mlps),
    )
    by_group = sums.by_group.over(0, 6 * target.n_ranks)
    return [neurons.total, neurons.modulus, counts, sums.by_position.total, by_group.total, by_group.count]


TARGETS = [Target(), Target("top", n_ranks=3), Target(np.arange(40, 46), np.arange(6), last_only=True)]


@pytest.mark.parametrize("target", TARGETS, ids=["next", "top", "columns"])
@settings(max_examples=5, deadline=None)
@given(block_bytes=st.integers(1, 400_000))
def test_sums_do_not_depend_on_the_blocks(attributed, target, block_bytes):
    folder, model = attributed
    store, weights = open_store(folder), attribution_weights(model, neurons=True)

    pieces, whole = (found_in(store, weights, target, n) for n in (block_bytes, 2**30))
    for piece, all_of_it in zip(pieces, whole, strict=True):
        np.testing.assert_allclose(piece, all_of_it, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("target", TARGETS, ids=["next", "top", "columns"])
def test_the_number_of_workers_changes_no_bit(attributed, target):
    folder, model = attributed
    store, weights = open_store(folder), attribution_weights(model, neurons=True)
    found = []
    for scheduler in ("synchronous", "threads"):
        with dask.config.set(scheduler=scheduler):
            found.append(found_in(store, weights, target, 60_000))

    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_order_of_documents_changes_only_the_order_of_results(attributed, tmp_path):
    folder, model = attributed
    again = recipe_of(tmp_path, model.source.folder.name, documents()[::-1], *STAGES)
    run(again, tmp_path / "run")

    for stage in STAGES:
        name = stage.get("name", stage["stage"])
        one, other = (open_results(where, name) for where in (folder, tmp_path / "run"))
        assert one.table["component"].tolist() == other.table["component"].tolist()
        for column in ("mean", "std", "mean_modulus"):
            np.testing.assert_allclose(other.table[column], one.table[column], atol=2e-5)
        for axis in {"target", "value", "token", "document"} & set(one.dataset.dims):
            here, there = one.dataset[f"mean_by_{axis}"].values, other.dataset[f"mean_by_{axis}"].values
            np.testing.assert_allclose(there[::-1] if axis == "document" else there, here, atol=2e-5)
            if axis != "document":
                assert one.dataset[axis].values.tolist() == other.dataset[axis].values.tolist()


def test_the_report_shows_neurons_ranks_and_groups(attributed):
    page = (attributed[0] / "report.html").read_text()

    for title in (
        "Logit of the correct next token, by neuron",
        "Logits of the model&#39;s top 3 tokens, by component and rank",
        "by target",
        "by token",
        "by document",
    ):
        assert title in page


def test_neurons_that_contradict_the_model_are_refused(attributed, monkeypatch):
    folder, model = attributed
    weights = attribution_weights(model, neurons=True)
    branch = weights.mlps[1]
    wrong = (weights.mlps[0], type(branch)(branch.W * 1.5, branch.b, branch.norm))
    monkeypatch.setattr(
        "actpipe.stages.attribute_logits.attribution_weights",
        lambda *_, **__: AttributionWeights(weights.unembedding, weights.attention, wrong),
    )
    recipe = {
        "model": {"name": str(model.source.folder), "dtype": "float32", "device": "cpu"},
        "stages": [{"stage": "attribute_logits", "name": "wrong", "neurons": 3}],
    }

    with pytest.raises(IdentityError, match="neurons of a layer do not add up"):
        run(recipe, folder)


logits = st.lists(st.sampled_from([-2.0, 0.0, 0.5, 0.5000001, 3.0]), min_size=3, max_size=20)


@given(st.lists(logits, min_size=1, max_size=4).filter(lambda rows: len({len(row) for row in rows}) == 1), st.data())
def test_of_tokens_with_equal_logits_the_smaller_id_comes_first(rows, data):
    d_vocab = len(rows[0])
    n_tokens = data.draw(st.integers(1, d_vocab))
    unembedding = FoldedUnembedding(np.eye(d_vocab, dtype=np.float32), np.zeros(d_vocab, np.float32))
    stream = np.array(rows, np.float32)

    found = most_probable(stream, np.ones((len(rows), 1), np.float32), unembedding, n_tokens)
    assert found.tolist() == [sorted(range(d_vocab), key=lambda i: (-row[i], i))[:n_tokens] for row in stream.tolist()]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A run of texts with tokens in columns, right and wrong ones."""
    folder = tmp_path_factory.mktemp("texts")
    rows = [
        {"id": f"d{i}", "text": "To be, or not to be", "one": " the", "two": "be or not", "far": 10**6, "none": None}
        for i in range(3)
    ]
    rows[1]["later"] = "the end"
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    hooks = [*HOOKS, "hook_pos_embed"]
    recipe = make_recipe(path, INDUCTION, hooks=hooks)
    run(recipe, folder / "run")
    return folder / "run", recipe


@pytest.mark.parametrize(
    ("stage", "error", "message"),
    [
        ({"target": {"column": "two"}}, DatasetError, r"'be or not' is \d tokens .* column 'two' .* document 'd0'"),
        ({"minus": {"column": "later"}}, DatasetError, r"'the end' is \d tokens .* document 'd1'"),
        ({"target": {"column": "far"}}, DatasetError, "token 1000000 is outside the vocabulary"),
        ({"target": {"column": "none"}}, DatasetError, "holds null|names no token"),
        ({"target": {"column": "on"}}, RecipeError, "no column 'on'.*did you mean 'one'"),
        ({"target": {"top": 10**6}}, RecipeError, "more tokens than the vocabulary"),
        ({"rows": "last"}, RecipeError, "name another `target`"),
        ({"by": "speaker"}, RecipeError, "no column 'speaker'"),
        ({"by": {"column": "token"}}, RecipeError, "no column 'token'"),
    ],
)
def test_tokens_and_groups_that_are_not_there_are_refused_before_anything_is_computed(texts, stage, error, message):
    folder, recipe = texts
    again = {**recipe, "stages": [*recipe["stages"], {"stage": "attribute_logits", "name": "refused", **stage}]}

    with pytest.raises((error, RecipeError), match=message):
        run(again, folder)
    assert not list(folder.glob("**/*refused*"))


def test_one_token_by_its_text_in_a_column_is_that_token_everywhere(texts):
    folder, recipe = texts
    stages = [
        {"stage": "attribute_logits", "name": "column", "target": {"column": "one"}},
        {"stage": "attribute_logits", "name": "text", "target": " the"},
    ]
    run({**recipe, "stages": [*recipe["stages"], *stages]}, folder)
    one, other = (open_results(folder, stage["name"]) for stage in stages)

    np.testing.assert_array_equal(one.table["mean"], other.table["mean"])


def test_a_column_that_is_called_as_a_group_is_reached_by_its_key(tmp_path):
    stages = [
        {"stage": "attribute_logits", "name": "labels", "by": {"column": "token"}},
        {"stage": "attribute_logits", "name": "tokens", "by": "token"},
    ]
    run(recipe_of(tmp_path, "gpt2", documents(), *stages), tmp_path / "run")

    assert open_results(tmp_path / "run", "labels").dataset["value"].values.tolist() == ["a", "b"]
    assert "mean_by_token" in open_results(tmp_path / "run", "tokens").dataset


def test_experts_have_no_neurons_to_attribute_to(tmp_path):
    recipe = recipe_of(tmp_path, "mixtral", documents(), {"stage": "attribute_logits", "neurons": 3})
    recipe["stages"][1]["hooks"].remove("blocks.*.mlp.hook_post")

    with pytest.raises(RecipeError, match=r"mixtral model has an MLP with neurons.*leave out `neurons`"):
        run(recipe, tmp_path / "run")


def test_tokens_that_are_kept_suffice_where_no_next_token_is_asked_for(tmp_path):
    stage = {"stage": "attribute_logits", "target": {"column": "right"}, "minus": 3}
    everything, some = (recipe_of(tmp_path, "gpt2", documents(), stage | more) for more in ({"rows": "last"}, {}))
    some["stages"][1]["keep"] = {"positions": [-1]}
    run(everything, tmp_path / "everything")
    run(some, tmp_path / "some")
    one, other = (open_results(tmp_path / name, "attribute_logits") for name in ("everything", "some"))

    assert one.record.summary["n_rows"] == other.record.summary["n_rows"] == 6
    np.testing.assert_allclose(one.table["mean"], other.table["mean"], atol=1e-6)

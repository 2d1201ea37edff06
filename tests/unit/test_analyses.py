"""The analyses against the model itself and against formulas in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from support import MODELS, make_recipe, run

from actpipe import HookedModel, decompose_resid, open_results, open_store
from actpipe.compute.attribution import next_tokens
from actpipe.compute.grouping import RangeSums, sum_by_group
from actpipe.compute.heads import HeadScoreSums, score_heads
from actpipe.compute.patterns import PREVIOUS_TOKEN, TRANSFORMERLENS_PATTERNS
from actpipe.errors import ActpipeError, IdentityError, IncompleteStoreError
from actpipe.jobs.attribution import AttributionSums
from actpipe.jobs.blocks import even_blocks
from actpipe.jobs.heads import score_store_heads
from actpipe.jobs.metrics import metrics_by_position
from actpipe.lenses import attribution_weights

COMPONENTS = ["hook_embed", "blocks.*.hook_attn_out", "blocks.*.hook_mlp_out", "blocks.*.attn.hook_z"]
FAMILIES = ["gpt2", "llama", "gpt_neox"]


@pytest.fixture(scope="module", params=FAMILIES)
def analysed(request, tmp_path_factory):
    """A run of a tiny model with everything that the analyses read."""
    family = request.param
    folder = tmp_path_factory.mktemp(family)
    generator = np.random.default_rng(1)
    path = folder / "corpus.jsonl"
    path.write_text("".join(f'{{"ids": {generator.integers(5, 199, 20).tolist()}}}\n' for _ in range(6)))
    positions = ["hook_pos_embed"] if family == "gpt2" else []
    recipe = make_recipe(
        path,
        MODELS / family,
        hooks=[
            *COMPONENTS,
            *positions,
            "blocks.*.hook_resid_*",
            "blocks.*.attn.hook_pattern",
            "ln_final.hook_scale",
        ],
        metrics=["loss", "correct_logit"],
        rows_per_part=32,
    )
    recipe["stages"][0]["dataset"]["column"] = "ids"
    recipe["stages"] += [
        {"stage": "summarize_metrics"},
        {"stage": "decompose_residual", "block_bytes": 50_000},
        {"stage": "decompose_residual", "layer": 1, "name": "entering-1"},
        {"stage": "attribute_logits", "block_bytes": 50_000, "keep_rows": True},
        {"stage": "attribute_logits", "name": "top", "target": "top", "keep_rows": True, "block_bytes": 50_000},
        {"stage": "attribute_logits", "name": "difference", "target": 7, "minus": 9, "keep_rows": True, "by": "id"},
        {"stage": "score_heads", "block_bytes": 20_000},
        {"stage": "write_report"},
    ]
    run(recipe, folder / "run")
    return folder / "run", HookedModel.from_pretrained(str(MODELS / family), device="cpu")


def test_the_components_add_up_to_the_residual_stream(analysed):
    folder, model = analysed
    store = open_store(folder)

    for layer, total in (
        (None, "blocks.1.hook_resid_post"),
        (1, "blocks.1.hook_resid_pre"),
        (0, "blocks.0.hook_resid_pre"),
    ):
        stack, labels = decompose_resid(store, layer)
        np.testing.assert_allclose(stack.sum(0).compute(), store[total].compute(), atol=1e-5)
        positions = ["pos_embed"] if model.shape.learned_positions else []
        layers = range(2 if layer is None else layer)
        assert labels == ["embed", *positions, *(f"{i}_{kind}" for i in layers for kind in ("attn_out", "mlp_out"))]


def test_shares_of_the_residual_stream_add_up_to_one_and_norms_are_those_of_the_components(analysed):
    folder, _ = analysed
    store = open_store(folder)

    for name, layer in (("decompose_residual", None), ("entering-1", 1)):
        result = open_results(folder, name)
        stack = decompose_resid(store, layer)[0].compute().astype(np.float64)
        assert result.table["mean_share"].sum() == pytest.approx(1, abs=1e-5)
        np.testing.assert_allclose(result.table["mean_norm"], np.linalg.norm(stack, axis=-1).mean(-1), rtol=1e-6)
        assert result.record.summary["worst_sum_error"] < 1e-6


def test_attributions_add_up_to_the_models_own_logit(analysed):
    folder, model = analysed
    store, result = open_store(folder), open_results(folder, "attribute_logits")
    rows = result.dataset["attribution"].values
    labels = [str(label) for label in result.dataset["component"].values]
    is_head = np.array([label.startswith("L") or label.endswith("_attn_bias") for label in labels])
    is_attention = np.array([label.endswith("_attn_out") for label in labels])

    for sequence in store.tokens.read_sequences():
        logits = model.forward(sequence.ids)[0, :-1].numpy()
        expected = logits[np.arange(len(logits)), sequence.ids[1:]]
        found = rows[sequence.first_row : sequence.row_stop]
        np.testing.assert_allclose(found[:-1, ~is_head].sum(-1), expected, atol=1e-4)
        np.testing.assert_allclose(found[:-1, is_head | ~(is_head | is_attention)].sum(-1), expected, atol=1e-4)
        assert np.isnan(found[-1]).all()
    assert result.record.summary["worst_sum_error"] < 1e-4


def test_attributions_are_those_of_the_formula_in_float64(analysed):
    folder, model = analysed
    store, result = open_store(folder), open_results(folder, "attribute_logits")
    sequence = next(iter(store.tokens.read_sequences()))
    _, cache = model.run_with_cache(sequence.ids, names=["*", "blocks.*.attn.hook_result"])
    weights = model.weights
    W_U, gain = weights.W_U.double(), weights["ln_final.w"].double()
    directions = (gain[:, None] * W_U)[:, torch.from_numpy(sequence.ids[1:]).long()].T
    scale = cache["ln_final.hook_scale"][0, :-1].double()
    labels = [str(label) for label in result.dataset["component"].values]
    rows = result.dataset["attribution"].values[sequence.first_row : sequence.row_stop - 1]

    def expected(written: torch.Tensor) -> np.ndarray:
        written = written[:-1].double()
        if model.shape.norm == "LN":
            written = written - written.mean(-1, keepdim=True)
        return (written / scale * directions).sum(-1).numpy()

    for layer in range(2):
        for head in range(4):
            result_of_head = cache[f"blocks.{layer}.attn.hook_result"][0, :, head]
            np.testing.assert_allclose(rows[:, labels.index(f"L{layer}H{head}")], expected(result_of_head), atol=1e-5)
        for kind in ("attn_out", "mlp_out"):
            written = cache[f"blocks.{layer}.hook_{kind}"][0]
            np.testing.assert_allclose(rows[:, labels.index(f"{layer}_{kind}")], expected(written), atol=1e-5)


def test_means_of_attributions_are_means_of_the_rows(analysed):
    folder, _ = analysed
    store, result = open_store(folder), open_results(folder, "attribute_logits")
    rows = result.dataset["attribution"].values.astype(np.float64)
    position = store["tokens/position"].compute()

    np.testing.assert_allclose(result.table["mean"], np.nanmean(rows, 0), atol=1e-6)
    np.testing.assert_allclose(result.table["std"], np.nanstd(rows, 0), atol=1e-5)
    at_three = np.nanmean(rows[position == 3], 0)
    np.testing.assert_allclose(result.dataset["mean_by_position"].sel(position=3), at_three, atol=1e-6)


def test_a_store_that_contradicts_the_model_is_refused(analysed, tmp_path, monkeypatch):
    folder, model = analysed
    from actpipe.jobs import attribution

    weights = attribution_weights(model, heads=False)
    wrong = type(weights.unembedding)(weights.unembedding.directions * 1.5, weights.unembedding.constants)
    sums = attribution.attribute_store(open_store(folder), attribution.AttributionWeights(wrong), block_bytes=10**6)
    assert sums.worst > 1e-2

    monkeypatch.setattr(
        "actpipe.stages.attribute_logits.attribution_weights", lambda *_, **__: attribution.AttributionWeights(wrong)
    )
    recipe = {
        "model": {"name": str(model.source.folder), "dtype": "float32", "device": "cpu"},
        "stages": [{"stage": "attribute_logits", "name": "wrong", "heads": False}],
    }
    with pytest.raises(IdentityError, match="do not add up to the model's logit"):
        run(recipe, folder)
    with pytest.raises(IncompleteStoreError, match="has no result 'wrong'"):
        open_results(folder, "wrong")


def test_means_of_metrics_are_means_of_the_rows(analysed):
    folder, _ = analysed
    store, result = open_store(folder), open_results(folder, "summarize_metrics")
    loss, position = store["metrics/loss"].compute(), store["tokens/position"].compute()

    assert result.record.summary["loss"] == pytest.approx(np.nanmean(loss.astype(np.float64)))
    mean = result.dataset["mean"].sel(metric="loss", position=4)
    assert float(mean) == pytest.approx(np.nanmean(loss[position == 4].astype(np.float64)))


def reference_score(attention, pattern, *, exclude_bos, exclude_current_token, measure):
    """TransformerLens 2.16's `compute_head_attention_similarity_score`, from its description, in float64."""
    attention, pattern = attention.astype(np.float64).copy(), pattern.astype(np.float64)
    if measure == "mul":
        if exclude_bos:
            attention[:, 0] = 0
        if exclude_current_token:
            np.fill_diagonal(attention, 0)
        return (attention * pattern).sum() / attention.sum()
    difference = np.abs(attention - pattern)
    if exclude_bos:
        difference[:, 0] = 0
    if exclude_current_token:
        np.fill_diagonal(difference, 0)
    return 1 - round(float(difference.mean() * len(difference)), 3)


@pytest.mark.parametrize("exclude_bos", [False, True])
@pytest.mark.parametrize("exclude_current_token", [False, True])
@pytest.mark.parametrize("pattern", TRANSFORMERLENS_PATTERNS, ids=lambda pattern: pattern.name)
def test_head_scores_are_transformerlens_averaged_over_sequences(analysed, pattern, exclude_bos, exclude_current_token):
    folder, model = analysed
    store = open_store(folder)
    options = {"exclude_bos": exclude_bos, "exclude_current_token": exclude_current_token}
    found = score_store_heads(store, (pattern,), (0, 1), block_bytes=30_000, **options)

    expected = np.zeros((2, 2, 4))
    sequences = [s for s in store.tokens.read_sequences() if len(s.ids) > 1]
    for sequence in sequences:
        wanted = pattern.of(sequence.ids)
        _, cache = model.run_with_cache(sequence.ids, names=["blocks.*.attn.hook_pattern"])
        for measure_number, measure in enumerate(("mul", "abs")):
            for layer in range(2):
                for head in range(4):
                    attention = cache[f"blocks.{layer}.attn.hook_pattern"][0, head].numpy()
                    score = reference_score(attention, wanted, measure=measure, **options)
                    expected[measure_number, layer, head] += score / len(sequences)
    assert found.n_sequences == len(sequences)
    np.testing.assert_allclose(found.scores[0, 0], expected[0], atol=1e-5)
    np.testing.assert_allclose(found.scores[1, 0], expected[1], atol=1e-3 / len(sequences) + 1e-9)


def test_results_do_not_depend_on_the_blocks(analysed):
    store = open_store(analysed[0])
    options = {"exclude_bos": False, "exclude_current_token": False}
    scores = [
        score_store_heads(store, TRANSFORMERLENS_PATTERNS, (0, 1), block_bytes=n, **options).scores
        for n in (1, 20_000, 10**9)
    ]
    losses = [metrics_by_position(store, ["loss"], block_bytes=n).mean for n in (1, 100, 10**9)]

    for other in scores[1:]:
        np.testing.assert_allclose(other, scores[0], rtol=1e-12)
    for other in losses[1:]:
        np.testing.assert_allclose(other, losses[0], rtol=1e-12)


def test_an_analysis_of_what_is_not_stored_says_what_to_store(corpus, tmp_path):
    run(make_recipe(corpus), tmp_path / "run")

    with pytest.raises(IncompleteStoreError, match=r"needs hook_embed, hook_pos_embed, .* add them to `hooks`"):
        decompose_resid(open_store(tmp_path / "run"))


ids = hnp.arrays(np.int64, st.integers(1, 12), elements=st.integers(0, 4))


@given(ids)
def test_detection_patterns_are_what_they_say(ids):
    previous, duplicate, induction = (pattern.of(ids) for pattern in TRANSFORMERLENS_PATTERNS)

    for query in range(len(ids)):
        for key in range(len(ids)):
            assert previous[query, key] == (key == query - 1)
            assert duplicate[query, key] == (key < query and ids[key] == ids[query])
            assert induction[query, key] == (0 < key <= query and ids[key - 1] == ids[query])


@given(st.tuples(ids, ids, ids))
def test_head_scores_add_up_in_any_grouping(several):
    def sums(ids) -> HeadScoreSums:
        attention = np.tril(np.ones((len(ids), len(ids)), np.float32))
        attention /= attention.sum(-1, keepdims=True)
        return score_heads(attention[:, None], PREVIOUS_TOKEN.of(ids))

    first, second, third = map(sums, several)
    left, right = (first + second) + third, first + (second + third)
    np.testing.assert_allclose(left.means, right.means)


values = hnp.arrays(np.float32, st.tuples(st.integers(0, 30), st.just(2)), elements=st.floats(-5, 5, width=32))


@given(values, st.integers(0, 30))
def test_sums_by_group_add_up_however_the_rows_are_cut(values, cut):
    group = np.arange(len(values)) % 4
    whole = sum_by_group(values, group)
    parts = sum_by_group(values[:cut], group[:cut]) + sum_by_group(values[cut:], group[cut:])

    np.testing.assert_allclose(parts.total, whole.total, atol=1e-9)
    np.testing.assert_array_equal(parts.count, whole.count)
    for number in range(len(whole.count)):
        rows = values[group == number].astype(np.float64)
        np.testing.assert_allclose(whole.mean[number], rows.mean(0), atol=1e-6)
        np.testing.assert_allclose(whole.std[number], rows.std(0), atol=1e-4)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.data())
def test_next_tokens_stop_at_the_end_of_each_sequence(lengths, data):
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    ids = np.arange(len(sequence)) + 100
    start = data.draw(st.integers(0, len(ids) - 1))
    stop = data.draw(st.integers(start + 1, len(ids)))

    found = next_tokens(ids[start : stop + 1], sequence[start : stop + 1], stop - start)
    expected = [ids[i + 1] if i + 1 < len(ids) and sequence[i + 1] == sequence[i] else -1 for i in range(start, stop)]
    assert found.tolist() == expected


def kept_sums(folder, name):
    """Return what a row's components and the constant term add up to."""
    result = open_results(folder, name).dataset
    last = [str(label) for label in result["component"].values].index("bias")
    return result["attribution"].values[:, : last + 1].sum(-1)


def logits_of(folder, model):
    """Return the model's own logits of every row, in the order of rows."""
    store = open_store(folder)
    sequences = store.tokens.read_sequences(0, store.n_rows)
    rows = [model.forward(torch.tensor(sequence.ids[None].astype(np.int64)))[0] for sequence in sequences]
    return torch.cat(rows).detach().numpy()


def test_the_report_says_whose_logit_each_attribution_is_of(analysed):
    page = (analysed[0] / "report.html").read_text()

    for whose in ("the correct next token", "the model&#39;s top token", "token 7 minus token 9"):
        assert f"Logit of {whose}, by component" in page


def test_the_top_tokens_logit_is_shared_out_whole(analysed):
    folder, model = analysed

    np.testing.assert_allclose(kept_sums(folder, "top"), logits_of(folder, model).max(-1), atol=1e-4)
    assert open_results(folder, "top").record.summary["logit"] == "the model's top token"


def test_a_difference_of_two_tokens_logits_is_shared_out_whole(analysed):
    folder, model = analysed
    logits = logits_of(folder, model)

    np.testing.assert_allclose(kept_sums(folder, "difference"), logits[:, 7] - logits[:, 9], atol=1e-4)
    assert open_results(folder, "difference").record.summary["worst_sum_error"] < 1e-4


def test_means_by_a_documents_column_are_those_of_its_rows(analysed):
    folder, _ = analysed
    store, result = open_store(folder), open_results(folder, "difference").dataset
    ids = np.array(store.documents.column("id").to_pylist(), dtype=str)
    of_row = ids[store.documents.of_rows(np.arange(store.n_rows))]

    assert result["count_by_value"].values.sum() == store.n_rows
    for number, value in enumerate(result["value"].values):
        expected = result["attribution"].values[of_row == value].mean(0, dtype=np.float64)
        np.testing.assert_allclose(result["mean_by_value"].values[number], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": 10**6}, "token 1000000 is outside the vocabulary"),
        ({"minus": "To be or not"}, "name one token"),
        ({"target": "top"}, r"blocks.1.hook_resid_post"),
        ({"by": "speaker"}, "no column 'speaker'"),
    ],
)
def test_targets_and_columns_that_are_not_there_are_refused(tmp_path, settings, message):
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"text": "to be or not to be"}\n')
    recipe = make_recipe(path, hooks=[*COMPONENTS, "hook_pos_embed", "ln_final.hook_scale"])
    recipe["stages"].append({"stage": "attribute_logits", **settings})

    with pytest.raises(ActpipeError, match=message):
        run(recipe, tmp_path / "run")


def test_an_attribution_that_is_not_a_number_stays_one_when_sums_are_put_together():
    nothing = sum_by_group(np.zeros((1, 1), np.float32), np.zeros(1, np.int64))
    ranges, modulus = RangeSums(0, nothing), np.zeros((1, 1))
    good, bad = (AttributionSums(nothing, ranges, modulus, worst) for worst in (0.0, float("nan")))

    assert np.isnan((good + bad).worst)
    assert np.isnan((bad + good).worst)


@pytest.mark.parametrize("block_bytes", [1_000, 20_000])
def test_blocks_have_room_for_every_array_that_is_named_and_for_what_else_a_row_takes(analysed, block_bytes):
    store = open_store(analysed[0])
    d_model, name = store.shape.d_model, "blocks.0.hook_resid_post"

    for names, more in (([name], 0), ([name] * 3, 0), ([name], 100)):
        blocks = even_blocks(store, names, block_bytes, more_row_bytes=more)
        row_bytes = 4 * d_model * len(names) + more
        assert max(block.n_rows for block in blocks) == min(store.n_rows, max(1, block_bytes // row_bytes))
        assert sum(block.n_rows for block in blocks) == store.n_rows

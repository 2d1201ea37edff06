"""Singular vectors as tokens against dense formulas in float64, written anew from what TransformerLens computes."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import load_file
from support import INDUCTION, MODELS, make_recipe, run

from actpipe import FactoredMatrix, HookedModel, open_results
from actpipe.compute.singular import outermost_tokens, singular_vectors
from actpipe.describing import describe_run, verify_run
from actpipe.errors import RecipeError
from actpipe.repairing import repair_run
from actpipe.telemetry import Telemetry

FAMILIES = ["gpt2", "llama", "gemma2", "gpt_neox", "qwen3"]
"""LayerNorm and a plain MLP; gated MLPs and shared keys; norms after branches; parallel blocks; norms of queries."""
ALL = ["OV", "QK", "W_in", "W_out"]
TOLERANCE = 2e-4


def recipe_of(model, *stages):
    return {"model": {"name": str(model), "device": "cpu"}, "stages": list(stages)}


def interpret(folder, family, **settings):
    run(recipe_of(MODELS / family, {"stage": "interpret_weights", **settings}), folder)
    return open_results(folder, "interpret_weights")


class Dense:
    """The matrices of `SVDInterpreter`, dense, in float64, of weights as they are or processed by hand."""

    def __init__(self, family, *, processed):
        model = HookedModel.from_pretrained(str(MODELS / family), dtype="float32", device="cpu")
        self.weights, self.processed, self.centred = model.weights, processed, model.shape.norm == "LN"
        self.softcap = model.shape.logit_softcap

    def raw(self, name):
        return self.weights[name].double().numpy()

    def reads(self, name, norm):
        """A weight `(..., d_model, out)` that reads what a norm gives."""
        W = self.raw(name)
        if self.processed and norm in self.weights.names():
            W = W * self.raw(norm)[:, None]
            W = W - W.mean(-2, keepdims=True) if self.centred else W
        return W

    def writes(self, name):
        W = self.raw(name)
        return W - W.mean(-1, keepdims=True) if self.processed and self.centred else W

    def matrix(self, which, layer, head):
        block = f"blocks.{layer}."
        if which == "W_in":
            W, norm = self.reads(f"{block}mlp.W_in", f"{block}ln2.w"), f"{block}ln2.w"
            return W.T if self.processed or norm not in self.weights.names() else W.T * self.raw(norm)
        if which == "W_out":
            return self.writes(f"{block}mlp.W_out")
        W_Q, W_K, W_V = (self.reads(f"{block}attn.W_{name}", f"{block}ln1.w")[head] for name in "QKV")
        return W_V @ self.writes(f"{block}attn.W_O")[head] if which == "OV" else W_Q @ W_K.T

    def vocabulary(self, which):
        if which == "W_E":
            return self.writes("embed.W_E").T
        W_U = self.reads("unembed.W_U", "ln_final.w")
        return W_U - W_U.mean(-1, keepdims=True) if self.processed and self.softcap is None else W_U


@pytest.mark.parametrize("processed", [True, False], ids=["processed", "native"])
@pytest.mark.parametrize("family", FAMILIES)
def test_lines_are_the_outermost_products_of_dense_singular_vectors_with_the_unembedding(family, processed, tmp_path):
    result = interpret(tmp_path / "run", family, matrices=ALL, n_vectors=3, n_tokens=4, processed=processed)
    dense, table = Dense(family, processed=processed), result.table
    W_U = dense.vocabulary("W_U")

    n_seen = 0
    for (which, layer, head), of_matrix in table.groupby(["matrix", "layer", "head"], dropna=False, sort=False):
        U, S, Vh = np.linalg.svd(dense.matrix(which, layer, None if pd.isna(head) else head), full_matrices=False)
        sides = {"OV": ("reads", "writes"), "QK": ("queries", "keys")}.get(which, (None, of_matrix["side"].iloc[0]))
        assert set(of_matrix["side"]) == {side for side in sides if side}
        for number in range(3):
            sign = np.sign(Vh[number][np.abs(Vh[number]).argmax()])
            for side, vector in zip(sides, (U[:, number], Vh[number]), strict=True):
                lines = of_matrix[(of_matrix["side"] == side) & (of_matrix["vector"] == number)]
                if side is None:
                    continue
                scores = sign * vector @ W_U
                for end, ordered in (("highest", np.sort(scores)[::-1]), ("lowest", np.sort(scores))):
                    found = lines[lines["end"] == end].sort_values("rank")
                    np.testing.assert_allclose(found["value"], ordered[:4], atol=TOLERANCE)
                    np.testing.assert_allclose(found["value"], scores[found["token_id"]], atol=TOLERANCE)
                    far = (found["value"] - scores.mean()) / scores.std()
                    np.testing.assert_allclose(found["deviations"], far, atol=5e-3)
                np.testing.assert_allclose(lines["singular_value"], S[number], rtol=1e-5)
                np.testing.assert_allclose(lines["share"], S[number] ** 2 / (S**2).sum(), rtol=1e-4)
                n_seen += len(lines)
    assert n_seen == len(table) == 2 * 8 * 3 * ((2 + 2) * 4 + 2)


def test_all_singular_values_are_kept_by_layer_and_head(tmp_path):
    result = interpret(tmp_path / "run", "llama", matrices=ALL, layers=[1], heads=["1-2"], n_vectors=1, n_tokens=1)
    dense, data = Dense("llama", processed=True), result.dataset

    assert data["head"].values.tolist() == [1, 2]
    assert data["layer"].values.tolist() == [1]
    for which in ALL:
        for place, head in enumerate([1, 2]):
            values = data[f"{which}_singular_value"].isel(layer=0)
            values = values.isel(head=place) if "head" in values.dims else values
            expected = np.linalg.svd(dense.matrix(which, 1, head), compute_uv=False)[: values.size]
            np.testing.assert_allclose(values, expected, atol=1e-5)
    assert set(result.table["head"].dropna()) == {1, 2}
    assert result.record.summary["n_vectors"] == 2 * 2 + 2 * 2 + 1 + 1


def test_the_transposed_embedding_may_stand_for_the_unembedding(tmp_path):
    result = interpret(tmp_path / "run", "gpt_neox", matrices=["W_out"], vocabulary="W_E", n_vectors=1, n_tokens=1)
    dense = Dense("gpt_neox", processed=True)
    Vh = np.linalg.svd(dense.matrix("W_out", 0, None))[2]
    scores = np.abs(Vh[0] @ dense.vocabulary("W_E"))

    line = result.table.iloc[0]
    assert abs(line["value"]) == pytest.approx(scores[line["token_id"]], abs=TOLERANCE)


def test_directions_whose_singular_value_is_rounding_are_left_out(tmp_path):
    """Centring takes one dimension of 32 from what LayerNorm reads."""
    table = interpret(tmp_path / "run", "gpt2", matrices=["W_in"], n_vectors=32, n_tokens=1).table

    assert table.groupby("layer")["vector"].nunique().tolist() == [31, 31]


def test_files_are_read_without_the_model_and_without_tokens(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the model was loaded")

    expected = interpret(tmp_path / "first", "llama").table
    monkeypatch.setattr(HookedModel, "from_source", refuse)
    found = interpret(tmp_path / "run", "llama").table

    pd.testing.assert_frame_equal(found, expected)
    assert not (tmp_path / "run" / "documents.parquet").exists()


def test_without_safetensors_files_the_model_is_loaded(tmp_path):
    shutil.copytree(MODELS / "gpt2", tmp_path / "gpt2")
    torch.save(load_file(tmp_path / "gpt2" / "model.safetensors"), tmp_path / "gpt2" / "pytorch_model.bin")
    (tmp_path / "gpt2" / "model.safetensors").unlink()
    run(recipe_of(tmp_path / "gpt2", {"stage": "interpret_weights"}), tmp_path / "run")

    expected = interpret(tmp_path / "other", "gpt2").table
    pd.testing.assert_frame_equal(open_results(tmp_path / "run", "interpret_weights").table, expected)


def test_tokens_of_the_report_are_escaped(tmp_path):
    shutil.copytree(MODELS / "gpt2", tmp_path / "evil")
    path = tmp_path / "evil" / "tokenizer.json"
    definition = json.loads(path.read_text())
    definition["model"]["vocab"] = {
        f"<script>alert({number})</script>": number for number in definition["model"]["vocab"].values()
    }
    definition["added_tokens"] = []
    path.write_text(json.dumps(definition))
    (tmp_path / "evil" / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    run(recipe_of(tmp_path / "evil", {"stage": "interpret_weights"}, {"stage": "write_report"}), tmp_path / "run")

    assert open_results(tmp_path / "run", "interpret_weights").table["token"].str.startswith("<script>alert(").all()
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Singular vectors of W_out as tokens" in page
    assert "&lt;script&gt;alert(" in page
    assert "<script>alert" not in page


def test_a_second_run_does_nothing_and_other_settings_compute_anew(tmp_path):
    n_lines = len(interpret(tmp_path / "run", "gpt2", n_vectors=1).table)
    written = (tmp_path / "run" / "results" / "interpret_weights.parquet").stat().st_mtime_ns
    interpret(tmp_path / "run", "gpt2", n_vectors=1)
    assert (tmp_path / "run" / "results" / "interpret_weights.parquet").stat().st_mtime_ns == written

    assert len(interpret(tmp_path / "run", "gpt2", n_vectors=2).table) == 2 * n_lines


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        ("gpt2", {"layers": [2]}, r"`layers` \[2\] must name some of the 2 of gpt2"),
        ("gpt2", {"heads": ["3-1"]}, r"`heads` \['3-1'\] must name some of the 4"),
        ("mixtral", {}, r"reads W_in and W_out, which this mixtral model does not have in layers 0, 1"),
        ("bert", {}, "reads W_Q, W_K, W_V and W_O of every head of a decoder"),
        ("bert", {"matrices": ["W_in"]}, "is for models that predict the next token"),
        ("gpt2", {"n_tokens": 10_000}, r"would list [\d,]+ tokens, at most 2,000,000 are"),
    ],
)
def test_what_a_model_does_not_have_is_refused_before_anything_runs(model, settings, message, tmp_path):
    with pytest.raises(RecipeError, match=message):
        run(recipe_of(MODELS / model, {"stage": "interpret_weights", **settings}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_heads_of_a_mixture_of_experts_have_singular_vectors(tmp_path):
    table = interpret(tmp_path / "run", "mixtral", matrices=["OV"], n_vectors=2).table

    dense = Dense("mixtral", processed=False)
    value = np.linalg.svd(dense.matrix("OV", 1, 3), compute_uv=False)[0]
    line = table[table["label"] == "L1H3 OV writes 0"].iloc[0]
    assert line["singular_value"] == pytest.approx(value, rel=1e-5)  # TransformerLens folds no norms of experts


@settings(deadline=None)
@given(st.integers(2, 9), st.integers(1, 5), st.integers(2, 9))
def test_the_sign_is_that_of_the_largest_entry_of_the_right_vector_and_pairs_stay_pairs(n_left, n_inner, n_right):
    generator = torch.Generator().manual_seed(n_left + 10 * n_inner + 100 * n_right)
    A, B = (torch.randn(*shape, generator=generator) for shape in ((n_left, n_inner), (n_inner, n_right)))
    found, dense = singular_vectors(FactoredMatrix(A, B), 99), singular_vectors(A.double() @ B.double(), 99)

    rebuilt = torch.einsum("v,vl,vr->lr", found.values, found.left, found.right)
    torch.testing.assert_close(rebuilt, A.double() @ B.double(), atol=1e-9, rtol=1e-9)
    largest = found.right.gather(-1, found.right.abs().argmax(-1, keepdim=True))
    assert (largest > 0).all()
    n_there = int(found.there.sum())
    assert n_there <= min(n_left, n_inner, n_right)
    turned = singular_vectors(FactoredMatrix(-A, B), 99)
    torch.testing.assert_close(turned.right[:n_there], found.right[:n_there], atol=1e-6, rtol=0)
    torch.testing.assert_close(turned.left[:n_there], -found.left[:n_there], atol=1e-6, rtol=0)
    torch.testing.assert_close(dense.values[:n_there], found.values[:n_there])


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(-3, 3), min_size=6, max_size=6), min_size=0, max_size=4), st.integers(1, 9))
def test_outermost_tokens_are_sorted_and_the_lower_id_comes_first_among_equals(rows, n_tokens):
    scores = torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)
    ids, values = outermost_tokens(scores, n_tokens)

    assert ids.shape == (len(rows), 2, min(n_tokens, 6))
    for row, found, there in zip(rows, ids.tolist(), values.tolist(), strict=True):
        for end, direction in enumerate((-1, 1)):
            expected = sorted(range(6), key=lambda token: (direction * row[token], token))[:n_tokens]
            assert found[end] == expected
            assert there[end] == [row[token] for token in expected]


def test_scores_of_weights_are_the_same_from_files_and_need_no_tokens(corpus, tmp_path):
    recipe = make_recipe(corpus, INDUCTION)
    recipe["stages"] = [{"stage": "score_weights"}]
    run(recipe, tmp_path / "run")

    best = open_results(tmp_path / "run", "score_weights").table.iloc[0]
    assert (best["layer"], best["head"]) == (1, 0)


def test_what_a_run_without_tokens_holds_is_told_with_its_results_and_shown_in_its_report(tmp_path):
    stages = [{"stage": "interpret_weights"}, {"stage": "score_weights", "corpus": "other"}, {"stage": "write_report"}]
    run(recipe_of(MODELS / "gpt2", *stages), tmp_path / "run")

    told = {finding.title: finding.rows for finding in describe_run(tmp_path / "run")}
    assert told["Corpus main"] == told["Corpus other"] == (("not tokenized",),)
    assert told["Results of main"] == (("interpret_weights", "singular-vectors", "n_vectors 168"),)
    assert told["Results of other"] == (("score_weights", "weights", "n_heads 8"),)
    assert verify_run(tmp_path / "run")[0] == []
    assert "No tokens; nothing was extracted." in (tmp_path / "run" / "report.html").read_text()


def test_a_damaged_result_of_a_run_without_tokens_is_computed_again(tmp_path):
    expected = interpret(tmp_path / "run", "gpt2", n_vectors=2).table
    path = tmp_path / "run" / "results" / "interpret_weights.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])

    (problem,) = verify_run(tmp_path / "run")[0]
    assert problem == f"results/interpret_weights.parquet: {len(whole) - 9} bytes, committed were {len(whole)}"
    summary = repair_run(tmp_path / "run", telemetry=Telemetry(Console(quiet=True)))
    assert (len(summary.mended), summary.left) == (1, ())
    assert path.read_bytes() == whole
    pd.testing.assert_frame_equal(open_results(tmp_path / "run", "interpret_weights").table, expected)

"""What the stage `decompose_residual` says of streams' parts, against the stacks of parts in float64."""

from __future__ import annotations

import json

import dask
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from support import MODELS, make_recipe, run

import actpipe
from actpipe import HookedModel, open_results, open_store
from actpipe.compute.residual import sum_residual_shares
from actpipe.errors import IdentityError, RecipeError

FAMILIES = ["gpt2", "gemma2"]
HOOKS = [
    "hook_embed",
    "blocks.*.hook_attn_out",
    "blocks.*.hook_mlp_out",
    "blocks.*.hook_resid_*",
    "blocks.*.attn.hook_z",
    "blocks.*.mlp.hook_post",
]
MORE = {
    "gpt2": ["hook_pos_embed"],
    "gemma2": ["blocks.*.ln1_post.hook_scale", "blocks.*.ln2_post.hook_scale"],
}
LAST = "blocks.1.hook_resid_post"
STAGES = {
    "whole": {},
    "attn": {"mode": "attn"},
    "mlp": {"mode": "mlp", "incl_embeds": False},
    "mid": {"layer": 1, "mlp_input": True},
    "heads": {"heads": True},
    "heads-mid": {"layer": 1, "mlp_input": True, "heads": True},
    "neurons": {"neurons": 4},
    "full": {"heads": True, "neurons": 4},
    "attn-heads": {"mode": "attn", "heads": True, "incl_embeds": False},
    "accumulated": {"accumulated": True, "incl_mid": True},
    "accumulated-1": {"accumulated": True, "layer": 1, "mlp_input": True},
}


def documents() -> list[dict]:
    generator = np.random.default_rng(1)
    return [{"id": f"d{i}", "ids": generator.integers(5, 199, n).tolist()} for i, n in enumerate((9, 2, 14, 5, 1, 11))]


def recipe_of(folder, family, rows, hooks=None):
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = make_recipe(path, MODELS / family, hooks=hooks or [*HOOKS, *MORE[family]], rows_per_part=16)
    recipe["stages"][0] |= {"layout": "documents", "context_length": 24, "prepend_bos": False}
    recipe["stages"][0]["dataset"]["column"] = "ids"
    for name, stage in STAGES.items():
        recipe["stages"].append({"stage": "decompose_residual", "name": name, "block_bytes": 40_000, **stage})
    return recipe


@pytest.fixture(scope="module", params=FAMILIES)
def decomposed(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    recipe = recipe_of(folder, request.param, documents())
    recipe["stages"].append({"stage": "write_report"})
    run(recipe, folder / "run")
    return folder / "run", HookedModel.from_pretrained(str(MODELS / request.param), device="cpu")


def stack_of(store, weights, name) -> tuple[np.ndarray, list[str]]:
    """Return the parts of a stage's stream by the library's stacks, in float64."""
    stage = STAGES[name]
    options = {key: stage[key] for key in ("layer", "mlp_input") if key in stage}
    if stage.get("accumulated"):
        found = actpipe.accumulated_resid(store, **options, incl_mid=stage.get("incl_mid", False))
    elif name == "attn-heads":
        heads, labels = actpipe.stack_head_results(store, weights)
        written, _ = actpipe.decompose_resid(store, mode="attn", incl_embeds=False)
        bias = written.sum(0) - heads.sum(0)
        found = np.concatenate([heads.compute(), bias.compute()[None]]), [*labels, "bias"]
    elif "heads" in stage or "neurons" in stage:
        found = actpipe.get_full_resid_decomposition(store, weights, **options, expand_neurons="neurons" in stage)
    else:
        modes = {key: stage[key] for key in ("mode", "incl_embeds") if key in stage}
        found = actpipe.decompose_resid(store, **options, **modes)
    stack, labels = found
    return np.asarray(stack).astype(np.float64), labels


def witness(part: np.ndarray, stream: np.ndarray) -> dict[str, float]:
    norm, length = np.linalg.norm(part, axis=-1), np.linalg.norm(stream, axis=-1)
    product = (part * stream).sum(-1)
    centred = stream - stream.mean(0)
    return {
        "mean_norm": norm.mean(),
        "mean_share": (product / length**2).mean(),
        "mean_cosine": (product / length / norm).mean(),
        "variance_share": ((part - part.mean(0)) * centred).sum() / (centred**2).sum(),
    }


@pytest.mark.parametrize("name", [name for name in STAGES if "neurons" not in STAGES[name]])
def test_measures_are_those_of_the_parts_that_transformerlens_names(decomposed, name):
    folder, model = decomposed
    store, result = open_store(folder), open_results(folder, name)
    stack, labels = stack_of(store, model.weights, name)
    stream = store[result.record.summary["stream"]].compute().astype(np.float64)

    assert result.table["component"].tolist() == labels
    for line, part in zip(result.table.to_dict("records"), stack, strict=True):
        if np.abs(part).max() < 1e-6:  # a model without biases
            assert line["mean_norm"] == line["mean_share"] == line["mean_cosine"] == 0
            continue
        for measure, expected in witness(part, stream).items():
            assert line[measure] == pytest.approx(expected, abs=2e-5), (line["component"], measure)


def test_neurons_with_the_largest_shares_are_listed_and_all_others_are_one(decomposed):
    folder, model = decomposed
    store, table = open_store(folder), open_results(folder, "neurons").table.set_index("component")
    stack, labels = stack_of(store, model.weights, "neurons")
    stream = store[LAST].compute().astype(np.float64)
    neurons = [place for place, label in enumerate(labels) if "N" in label]
    shares = np.abs((stack[neurons] * stream).sum(-1) / (stream**2).sum(-1)).mean(-1)
    largest = {labels[neurons[place]] for place in np.argsort(-shares)[:4]}

    assert set(table.index[table["kind"] == "neuron"]) == largest
    for label in largest:
        for measure, expected in witness(stack[labels.index(label)], stream).items():
            if measure != "mean_cosine":
                assert table.loc[label, measure] == pytest.approx(expected, abs=2e-5)
    for layer in range(2):
        others = [p for p in neurons if labels[p].startswith(f"L{layer}N") and labels[p] not in largest]
        for measure, expected in witness(stack[others].sum(0), stream).items():
            assert table.loc[f"{layer}_other_neurons", measure] == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("name", ["whole", "mid", "heads", "heads-mid", "neurons", "full"])
def test_shares_of_all_parts_add_up_to_one(decomposed, name):
    result = open_results(decomposed[0], name)

    assert result.table["mean_share"].sum() == pytest.approx(1, abs=1e-5)
    assert result.table["variance_share"].sum() == pytest.approx(1, abs=1e-5)
    assert result.record.summary["worst_sum_error"] < 1e-5


def test_some_parts_are_not_said_to_add_up(decomposed):
    for name in ("attn", "mlp", "attn-heads", "accumulated"):
        assert "worst_sum_error" not in open_results(decomposed[0], name).record.summary


def test_the_order_of_documents_and_the_number_of_workers_change_nothing(decomposed, tmp_path):
    folder, model = decomposed
    with dask.config.set(scheduler="synchronous"):
        run(recipe_of(tmp_path, model.source.folder.name, documents()[::-1]), tmp_path / "run")

    for name in STAGES:
        one, other = (open_results(where, name).table for where in (folder, tmp_path / "run"))
        assert one["component"].tolist() == other["component"].tolist()
        for measure in ("mean_norm", "mean_share", "mean_cosine", "variance_share"):
            np.testing.assert_allclose(other[measure], one[measure], atol=2e-5)


def test_parts_that_contradict_the_stream_are_refused(decomposed, monkeypatch):
    folder, model = decomposed
    from actpipe.jobs.written import branch_of

    def wrong(*arguments):
        branch = branch_of(*arguments)
        return type(branch)(branch.W * 1.5, branch.b, branch.norm)

    monkeypatch.setattr("actpipe.stages.decompose_residual.branch_of", wrong)
    recipe = {
        "model": {"name": str(model.source.folder), "dtype": "float32", "device": "cpu"},
        "stages": [{"stage": "decompose_residual", "name": "wrong", "heads": True}],
    }
    with pytest.raises(IdentityError, match="do not add up to"):
        run(recipe, folder)


def test_the_report_shows_shares_by_head_and_streams_by_layer(decomposed):
    page = (decomposed[0] / "report.html").read_text()

    for title in (
        "Share of the residual stream by head: full",
        "Share of the residual stream&#39;s variance by component: neurons",
        "Length of the residual stream by layer: accumulated",
    ):
        assert title in page


@pytest.mark.parametrize(
    ("family", "stage", "message"),
    [
        ("gpt2", {"layer": 3}, "layer 3 is not one of 0 to 2"),
        ("gpt2", {"layer": 2, "mlp_input": True}, "no MLP reads it"),
        ("gpt2", {"mlp_input": True}, "name a `layer`"),
        ("gpt2", {"incl_mid": True}, "belongs to `accumulated: true`"),
        ("gpt2", {"accumulated": True, "heads": True}, "measures streams"),
        ("gpt2", {"mode": "mlp", "heads": True}, "`heads` are what attention writes"),
        ("gpt2", {"mode": "attn", "neurons": 1}, "`neurons` are what MLPs write"),
        ("gpt2", {"layer": 0, "incl_embeds": False}, "nothing writes to this stream"),
        ("gpt2", {"neurons": 2}, r"needs blocks\.0\.mlp\.hook_post"),
        ("gpt_neox", {"layer": 1, "mlp_input": True}, "there is none between them"),
        ("mixtral", {"neurons": 2}, "mixtral model has an MLP with neurons"),
    ],
)
def test_parts_that_are_not_there_are_refused_before_anything_runs(corpus, tmp_path, family, stage, message):
    hooks = ["hook_embed", *MORE.get(family, []), "blocks.*.hook_attn_out", "blocks.*.hook_mlp_out", LAST]
    recipe = make_recipe(corpus, MODELS / family, hooks=[*hooks, "blocks.*.hook_resid_pre"])
    recipe["stages"].append({"stage": "decompose_residual", **stage})

    with pytest.raises(RecipeError, match=message):
        run(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


parts = hnp.arrays(
    np.float32, st.tuples(st.integers(1, 4), st.integers(2, 12), st.just(3)), elements=st.integers(-3, 3)
)


@given(parts, st.data())
def test_sums_add_up_however_rows_are_cut_and_ordered(parts, data):
    order = np.array(data.draw(st.permutations(range(parts.shape[1]))))
    cut = data.draw(st.integers(0, len(order)))
    stream = parts.sum(0)

    whole = sum_residual_shares(iter(parts), stream)
    first, second = (sum_residual_shares(iter(parts[:, rows]), stream[rows]) for rows in (order[:cut], order[cut:]))
    together = first + second
    for name in ("norm", "share", "cosine", "product", "written", "stream", "squared"):
        np.testing.assert_allclose(getattr(together, name), getattr(whole, name), atol=1e-9)
    assert together.worst == whole.worst == 0
    rows = stream.astype(np.float64)
    if np.ptp(rows, axis=0).any():
        centred = rows - rows.mean(0)
        wide = parts.astype(np.float64)
        expected = ((wide - wide.mean(1, keepdims=True)) * centred).sum((1, 2)) / (centred**2).sum()
        np.testing.assert_allclose(together.variance_share, expected, atol=1e-9)

"""Directions and probes are those of all rows at once, judged on documents that no fit saw."""

from __future__ import annotations

from functools import reduce
from operator import add

import dask
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import TEXTS, make_recipe, run

from actpipe import open_results, open_store
from actpipe.compute.directions import mean_differences, principal_axes, sum_classes
from actpipe.compute.geometry import cross_moments
from actpipe.compute.probing import (
    balanced_weights,
    bound_of_hessian,
    class_scores,
    count_scores,
    list_scores,
    log_softmax,
    logits_of,
    minimize,
    penalized,
    reliability,
    softmax_loss,
)
from actpipe.errors import DatasetError, RecipeError
from actpipe.jobs.labels import label_rows
from actpipe.stores.directions import read_directions

HOOKS = ["blocks.*.hook_resid_post"]
LABELS = {"label": "kind", "hooks": HOOKS, "penalty": 0.01, "validation_fraction": 0.4}


def clouds(n_rows: int, width: int, n_classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    number = np.arange(n_rows) % n_classes
    centers = random.normal(size=(n_classes, width))
    return centers[number] + random.normal(size=(n_rows, width)), number


def newton(rows: np.ndarray, number: np.ndarray, n_classes: int, penalty: float) -> np.ndarray:
    """Return what minimizes the same objective, by Newton's method on all of it at once."""
    inputs = np.concatenate([rows, np.ones((len(rows), 1))], 1)
    width = inputs.shape[1]
    ridge = np.full((width, n_classes), penalty)
    ridge[-1] = 0.0
    weights = np.zeros((width, n_classes))
    for _ in range(25):
        p = np.exp(inputs @ weights)
        p /= p.sum(1, keepdims=True)
        gradient = inputs.T @ (p - np.eye(n_classes)[number]) / len(rows) + ridge * weights
        spread = np.einsum("nk,kl->nkl", p, np.eye(n_classes)) - np.einsum("nk,nl->nkl", p, p)
        hessian = np.einsum("nd,nkl,ne->dkel", inputs, spread, inputs, optimize=True).reshape(
            width * n_classes, -1
        ) / len(rows)
        hessian += np.diag(ridge.ravel())
        weights -= (np.linalg.pinv(hessian, hermitian=True) @ gradient.ravel()).reshape(weights.shape)
    return weights


def witness_auc(scores: np.ndarray, own: np.ndarray) -> float:
    gaps = scores[own][:, None] - scores[~own][None]
    return float((gaps > 0).mean() + (gaps == 0).mean() / 2)


def witness_calibration(p: np.ndarray, number: np.ndarray, n_bins: int) -> float:
    sure, right = p.max(1), p.argmax(1) == number
    error = 0.0
    for low in np.arange(n_bins) / n_bins:
        these = (sure > low) & (sure <= low + 1 / n_bins)
        if these.any():
            error += these.mean() * abs(right[these].mean() - sure[these].mean())
    return error


@pytest.mark.parametrize("n_classes", [2, 4])
@pytest.mark.parametrize("penalty", [1e-3, 0.3])
def test_a_probe_is_the_minimum_that_newtons_method_finds(n_classes, penalty):
    rows, number = clouds(120, 5, n_classes, 0)
    rows = (rows - rows.mean(0)) / rows.std(0)

    def evaluate(weights: np.ndarray) -> tuple[float, np.ndarray]:
        return penalized(softmax_loss(rows, number, weights), weights, penalty)

    start = np.zeros((6, n_classes))
    solve = bound_of_hessian(np.corrcoef(rows.T), penalty)
    fit = minimize(evaluate, start, solve, tolerance=1e-9, max_iterations=200)

    assert fit.slope <= 1e-9
    assert fit.n_iterations < 60
    np.testing.assert_allclose(fit.weights, newton(rows, number, n_classes, penalty), atol=1e-6)


def test_channels_that_say_the_same_and_classes_that_are_apart_still_have_a_minimum():
    rows, number = clouds(40, 2, 2, 0)
    rows = np.concatenate([rows + 50 * number[:, None], rows + 50 * number[:, None]], 1)
    rows = (rows - rows.mean(0)) / rows.std(0)
    solve = bound_of_hessian(np.corrcoef(rows.T), 1e-3)

    fit = minimize(
        lambda weights: penalized(softmax_loss(rows, number, weights), weights, 1e-3),
        np.zeros((5, 2)),
        solve,
        tolerance=1e-8,
        max_iterations=200,
    )
    assert fit.slope <= 1e-8
    assert (logits_of(rows, fit.weights).argmax(1) == number).all()


@given(st.lists(st.integers(0, 30), max_size=3), st.permutations(range(30)), st.integers(2, 4))
def test_sums_are_those_of_all_rows_however_they_are_cut_and_ordered(cuts, order, n_classes):
    rows, number = clouds(30, 3, n_classes, 1)
    weights = np.random.default_rng(2).normal(size=(4, n_classes))
    pieces = [np.array(piece, int) for piece in np.split(np.array(order), sorted(cuts))]
    logs = log_softmax(logits_of(rows, weights))
    own = number[:, None] == np.arange(n_classes)

    loss = reduce(add, (softmax_loss(rows[piece], number[piece], weights) for piece in pieces))
    exact = reduce(add, (list_scores(class_scores(logs[piece]), number[piece]) for piece in pieces))
    classes = reduce(add, (sum_classes(rows[piece], number[piece], n_classes) for piece in pieces))
    judged = reduce(add, (reliability(logs[piece], number[piece], 10) for piece in pieces))
    scores = reduce(add, (count_scores(class_scores(logs[piece]), own[piece]) for piece in pieces))

    p = np.exp(logs)
    inputs = np.concatenate([rows, np.ones((30, 1))], 1)
    assert loss.loss == pytest.approx(-np.log(p[np.arange(30), number]).sum())
    np.testing.assert_allclose(loss.gradient, inputs.T @ (p - own), atol=1e-12)
    means = [rows[number == k].mean(0) - rows[number != k].mean(0) for k in range(n_classes)]
    np.testing.assert_allclose(mean_differences(classes), means, atol=1e-12)
    assert judged.accuracy == pytest.approx((p.argmax(1) == number).mean())
    assert judged.error == pytest.approx(witness_calibration(p, number, 10))
    odds = np.log(p / (1 - p))
    np.testing.assert_allclose(scores.auc, [witness_auc(odds[:, k], own[:, k]) for k in range(n_classes)], atol=0.02)
    np.testing.assert_allclose(exact.auc, [witness_auc(odds[:, k], own[:, k]) for k in range(n_classes)], atol=1e-12)
    recall = [(p.argmax(1) == number)[number == k].mean() for k in range(n_classes)]
    assert judged.balanced_accuracy == pytest.approx(np.mean(recall))


def test_scores_that_are_equal_count_half_and_scores_out_of_range_count():
    scores = np.array([[1e9], [-1e9], [0.5], [0.5]])
    own = np.array([[True], [False], [True], [False]])

    assert count_scores(scores, own).auc[0] == pytest.approx((4 - 0.5) / 4)
    assert np.isnan(count_scores(scores, np.ones((4, 1), bool)).auc[0])


scores = st.lists(st.tuples(st.sampled_from([-1.0, 0.0, 0.1, 0.1 + 1e-12, 40.0, 41.0]), st.integers(0, 1)), max_size=12)


@given(scores, st.integers(0, 12))
def test_auc_of_listed_scores_counts_every_pair_and_ties_half(rows, cut):
    values = np.array([[-score, score] for score, _ in rows]).reshape(-1, 2)
    number = np.array([side for _, side in rows], int)
    found = (list_scores(values[:cut], number[:cut]) + list_scores(values[cut:], number[cut:])).auc

    if 0 < number.sum() < len(number):
        rounded = values.astype(np.float32)
        np.testing.assert_allclose(found, [witness_auc(rounded[:, k], number == k) for k in (0, 1)], atol=1e-12)
    else:
        assert np.isnan(found).all()


def test_a_balanced_probe_is_that_of_rows_repeated_until_all_classes_have_as_many():
    rows, number = clouds(60, 3, 2, 4)
    keep = np.flatnonzero((number == 0) | (np.arange(60) % 6 == 1))  # 30 of the first class, 10 of the second
    rows, number = rows[keep], number[keep]
    weights = balanced_weights(np.bincount(number))
    repeated = np.concatenate([rows, rows[number == 1], rows[number == 1]])
    numbers = np.concatenate([number, np.ones(20, int)])

    def fitted(evaluate) -> np.ndarray:
        solve = bound_of_hessian(np.corrcoef(rows.T), 0.01)
        return minimize(evaluate, np.zeros((4, 2)), solve, tolerance=1e-10, max_iterations=200).weights

    found = fitted(lambda w: penalized(softmax_loss(rows, number, w, weights), w, 0.01))
    np.testing.assert_allclose(weights, [2 / 3, 2.0])
    np.testing.assert_allclose(found, newton(repeated, numbers, 2, 0.01), atol=1e-6)
    assert not np.allclose(found, newton(rows, number, 2, 0.01), atol=1e-2)


def test_principal_axes_are_those_of_the_covariance_with_a_sign_that_is_fixed():
    rows, _ = clouds(50, 4, 2, 3)
    axes, shares = principal_axes(cross_moments(rows).covariance, 2)
    _, singular, witness = np.linalg.svd(rows - rows.mean(0), full_matrices=False)

    np.testing.assert_allclose(np.abs(axes.T @ witness[:2].T), np.eye(2), atol=1e-9)
    np.testing.assert_allclose(shares, (singular**2 / (singular**2).sum())[:2])
    assert (np.take_along_axis(axes, np.abs(axes).argmax(0)[None], 0) > 0).all()


@pytest.fixture
def labelled(write_jsonl):
    kinds = ["sea", "land", None, "sky"]
    rows = [
        {"id": f"d{i}", "text": f"{kinds[i % 4] or 'none'} {TEXTS[i % 5]}", "kind": kinds[i % 4], "odd": bool(i % 2)}
        for i in range(40)
    ]
    return write_jsonl(rows)


def rows_by_side(store, hook, classes):
    """Return rows and classes of both sides, from the columns of documents.parquet and a hash of their ids."""
    labels = label_rows(store.documents, "kind", classes=classes, max_classes=9, fraction=0.4, seed=0)
    document = store.documents.of_rows(np.arange(store.n_rows))
    values = store[hook].compute().reshape(store.n_rows, -1).astype(np.float64)
    kind = [store.documents.column("kind").to_pylist()[number] for number in document]
    sides = []
    for held_out in (False, True):
        these = [i for i in range(store.n_rows) if kind[i] in classes and labels.held_out[document[i]] == held_out]
        sides.append((values[these], np.array([classes.index(kind[i]) for i in these]), {document[i] for i in these}))
    return sides


@pytest.mark.parametrize("classes", [["land", "sea", "sky"], ["sky", "sea"]])
def test_a_stores_directions_are_those_of_its_rows_whatever_the_blocks(labelled, tmp_path, classes):
    recipe = make_recipe(labelled, hooks=HOOKS)
    wanted = LABELS | ({} if len(classes) == 3 else {"classes": classes})
    recipe["stages"] += [
        {"stage": "fit_directions", **wanted},
        {"stage": "fit_directions", **wanted, "name": "small", "block_bytes": 400_000},
    ]
    run(recipe, tmp_path / "run")
    store = open_store(tmp_path / "run")
    result, small = (open_results(tmp_path / "run", name) for name in ("fit_directions", "small"))
    data = result.dataset.load()
    assert [str(name) for name in data["class"].values] == classes

    probes = {}
    for row in result.table.itertuples():
        (fitted, number, seen), (rows, wanted_number, unseen) = rows_by_side(store, row.hook, classes)
        assert not seen & unseen
        mean, scale = fitted.mean(0), fitted.std(0)
        weights = newton((fitted - mean) / scale, number, len(classes), 0.01) if len(classes) == 2 else None
        file = read_directions(result.files / f"{row.hook}.probe.safetensors", "test")
        differences = read_directions(result.files / f"{row.hook}.mean_difference.safetensors", "test")
        probes[row.hook] = file.W
        logits = file(rows.astype(np.float32))
        if weights is not None:
            expected = (weights[:-1, 1] - weights[:-1, 0]) / scale
            np.testing.assert_allclose(file.W[:, 0], expected, atol=1e-4)
            logits = np.concatenate([np.zeros_like(logits), logits], 1)
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        assert row.accuracy == pytest.approx((p.argmax(1) == wanted_number).mean())
        assert row.majority == pytest.approx(np.bincount(wanted_number).max() / len(wanted_number))
        assert row.calibration_error == pytest.approx(witness_calibration(p, wanted_number, 15), abs=2e-3)
        odds = np.log(p / (1 - p))
        own = wanted_number[:, None] == np.arange(len(classes))
        aucs = [witness_auc(odds[:, k], own[:, k]) for k in range(len(classes))]
        np.testing.assert_allclose(data["auc"].sel(hook=row.hook), aucs, atol=2e-3)
        recall = [(p.argmax(1) == k)[wanted_number == k].mean() for k in range(len(classes))]
        assert row.balanced_accuracy == pytest.approx(np.mean(recall))
        last = fitted[number == len(classes) - 1].mean(0) - fitted[number != len(classes) - 1].mean(0)
        np.testing.assert_allclose(differences.W[:, -1], last / np.linalg.norm(last), atol=1e-6)
        np.testing.assert_allclose(differences.mean, mean, atol=1e-5)
        assert file.labels == (tuple(classes) if len(classes) == 3 else ("sea",))

    one, other = (W[:, -1] / np.linalg.norm(W[:, -1]) for W in probes.values())
    assert float(data["cosine_probe"][-1, 0, 1]) == pytest.approx(one @ other, abs=1e-5)
    for name in data.data_vars:
        atol = 1e-3 if "auc" in name or "bin" in name else 1e-4
        np.testing.assert_allclose(small.dataset[name], data[name], atol=atol)


def pooled_by_side(store, hook, classes, how):
    """Return one sample of each document of both sides, by a loop over documents."""
    labels = label_rows(store.documents, "kind", classes=classes, max_classes=9, fraction=0.4, seed=0, is_pooled=True)
    kind, values = store.documents.column("kind").to_pylist(), store[hook].compute().astype(np.float64)
    stops = store.documents.row_stops.tolist()
    sides = []
    for held_out in (False, True):
        these = [i for i, one in enumerate(kind) if one in classes and labels.held_out[i] == held_out]
        rows = [values[([0, *stops])[i] : stops[i]] for i in these]
        samples = np.stack([row[-1] if how == "last" else row.mean(0) for row in rows])
        sides.append((samples, np.array([classes.index(kind[i]) for i in these])))
    return sides


@pytest.mark.parametrize("how", ["mean", "last"])
@pytest.mark.parametrize("block_bytes", [250_000, 2**28])
def test_pooled_samples_are_one_of_each_document(labelled, tmp_path, how, block_bytes):
    classes = ["sky", "sea"]
    recipe = make_recipe(labelled)
    stage = {**LABELS, "hooks": ["blocks.0.hook_resid_post"], "pool": how, "block_bytes": block_bytes}
    recipe["stages"] += [
        {"stage": "fit_directions", **stage, "classes": classes, "class_weights": "balanced"},
        {"stage": "fit_directions", **stage, "classes": classes, "name": "binned", "exact_scores": 0},
        {"stage": "write_report"},
    ]
    run(recipe, tmp_path / "run")
    store, result = open_store(tmp_path / "run"), open_results(tmp_path / "run", "fit_directions")
    (fitted, number), (rows, wanted) = pooled_by_side(store, "blocks.0.hook_resid_post", classes, how)
    line = result.table.iloc[0]

    assert (line["n_train"], line["n_validation"]) == (len(number), len(wanted))
    counts = np.bincount(number)
    repeats = {k: counts[1 - k] for k in (0, 1)}  # every class as often as the other, then as heavy as balanced
    mean, scale = fitted.mean(0), fitted.std(0)
    again = np.concatenate([np.repeat(fitted[number == k], repeats[k], 0) for k in (0, 1)])
    numbers = np.repeat([0, 1], [counts[0] * repeats[0], counts[1] * repeats[1]])
    weights = newton((again - mean) / scale, numbers, 2, 0.01)
    file = read_directions(result.files / "blocks.0.hook_resid_post.probe.safetensors", "test")
    np.testing.assert_allclose(file.mean, mean, atol=1e-5)
    np.testing.assert_allclose(file.W[:, 0], (weights[:-1, 1] - weights[:-1, 0]) / scale, rtol=1e-3, atol=1e-3)
    logits = file(rows.astype(np.float32))[:, 0]
    assert line["accuracy"] == pytest.approx(((logits > 0) == wanted).mean())
    assert line["auc"] == pytest.approx(witness_auc(logits, wanted == 1), abs=1e-3)
    assert result.record.summary["auc"] == "exact"
    assert open_results(tmp_path / "run", "binned").record.summary["auc"] == "scores in bins of 1/128"
    assert "documents" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize("how", ["mean", "last"])
def test_pooled_directions_do_not_depend_on_the_order_of_documents_or_on_workers(write_jsonl, tmp_path, how):
    kinds = ["sea", "land", "sky"]
    rows = [{"id": f"d{i}", "text": f"{kinds[i % 3]} {TEXTS[i % 5]}", "kind": kinds[i % 3]} for i in range(18)]
    tables = []
    for name, ordered, scheduler in (("one", rows, "threads"), ("other", rows[::-1], "synchronous")):
        recipe = make_recipe(write_jsonl(ordered, f"{name}.jsonl"))
        recipe["stages"][0] |= {"layout": "documents", "context_length": 64}
        recipe["stages"].append({"stage": "fit_directions", **LABELS, "pool": how, "block_bytes": 400_000})
        with dask.config.set(scheduler=scheduler):
            run(recipe, tmp_path / name)
        tables.append(open_results(tmp_path / name, "fit_directions").table)

    for column in ("accuracy", "balanced_accuracy", "auc", "loss", "control_auc", "mean_difference_auc"):
        relative = 1e-4 if column == "loss" else 1e-7  # of few documents it is several nats
        np.testing.assert_allclose(tables[0][column], tables[1][column], rtol=relative, atol=1e-4)


def test_the_number_of_workers_changes_no_bit(labelled, tmp_path):
    recipe = make_recipe(labelled, hooks=HOOKS)
    recipe["stages"].append({"stage": "fit_directions", **LABELS, "block_bytes": 400_000})
    files = []
    for name, scheduler in (("one", "synchronous"), ("many", "threads")):
        with dask.config.set(scheduler=scheduler):
            run(recipe, tmp_path / name)
        folder = open_results(tmp_path / name, "fit_directions").files
        files.append({path.name: path.read_bytes() for path in folder.iterdir()})

    assert len(files[0]) == 6
    assert files[0] == files[1]


def test_shuffled_labels_are_the_same_ones_dealt_out_by_the_documents_ids(labelled, tmp_path):
    run(make_recipe(labelled), tmp_path / "run")
    documents = open_store(tmp_path / "run").documents
    labels = label_rows(documents, "kind", classes=None, max_classes=9, fraction=0.4, seed=0)
    shuffled = labels.shuffled(0)

    assert (shuffled.number != labels.number).any()
    assert shuffled.number.tolist() == labels.shuffled(0).number.tolist()
    assert shuffled.number.tolist() != labels.shuffled(1).number.tolist()
    assert (shuffled.number[labels.number < 0] == -1).all()
    for side in (False, True):
        these = labels.held_out == side
        assert sorted(shuffled.number[these]) == sorted(labels.number[these])


def test_directions_project_activations_by_derive_and_by_top_examples(labelled, tmp_path):
    recipe = make_recipe(labelled)
    recipe["stages"].append({"stage": "fit_directions", **LABELS, "components": 2})
    run(recipe, tmp_path / "run")
    folder = open_results(tmp_path / "run", "fit_directions").files
    hook = "blocks.0.hook_resid_post"
    entries = [
        {"name": name, "hooks": [hook], "matrix": str(folder / f"{hook}.{method}.safetensors")}
        for name, method in (("probe", "probe"), ("pca", "pca"), ("means", "mean_difference"))
    ]
    again = make_recipe(labelled, derive=entries)
    path = str(folder / f"{hook}.probe.safetensors")
    again["stages"].append({"stage": "top_examples", "hooks": [hook], "directions": path})
    run(again, tmp_path / "again")

    store = open_store(tmp_path / "again")
    logits = read_directions(folder / f"{hook}.probe.safetensors", "test")(store[hook].compute())
    np.testing.assert_allclose(store[f"derived/probe/{hook}"].compute(), logits, atol=1e-4)
    np.testing.assert_allclose(
        open_results(tmp_path / "again", "top_examples").dataset["max"], logits.max(0), rtol=1e-5
    )
    assert store[f"derived/pca/{hook}"].shape == (store.n_rows, 2)
    assert [str(label) for label in open_results(tmp_path / "again", "top_examples").dataset["label"].values] == [
        "land",
        "sea",
        "sky",
    ]


def test_without_a_control_none_is_fitted_and_the_report_is_drawn(labelled, tmp_path):
    recipe = make_recipe(labelled, hooks=HOOKS)
    recipe["stages"] += [
        {"stage": "fit_directions", "label": "odd", "control": False, "components": 0},
        {"stage": "describe_residual"},
        {"stage": "write_report"},
    ]
    run(recipe, tmp_path / "run")
    result = open_results(tmp_path / "run", "fit_directions")

    assert result.table["control_accuracy"].isna().all()
    assert [str(name) for name in result.dataset["class"].values] == ["False", "True"]
    page = (tmp_path / "run" / "report.html").read_text()
    for title in ("Calibration of probes", "Similarity of mean differences", "Similarity of activations"):
        assert title in page


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"label": "kin"}, DatasetError, "no column 'kin'.*did you mean 'kind'"),
        ({"classes": ["sea", "see"]}, DatasetError, "no document with tokens has 'see'.*did you mean 'sea'"),
        ({"validation_fraction": 0.01}, DatasetError, "is left to judge on"),
        ({"label": "share"}, DatasetError, "holds double"),
    ],
)
def test_labels_that_tell_nothing_apart_are_refused(write_jsonl, tmp_path, settings, error, message):
    rows = [{"id": f"d{i}", "text": TEXTS[i % 6], "kind": ["sea", "land"][i % 2], "share": i / 7} for i in range(12)]
    recipe = make_recipe(write_jsonl(rows))
    run(recipe, tmp_path / "run")
    recipe["stages"].append({"stage": "fit_directions", **LABELS, **settings})

    with pytest.raises((error, RecipeError), match=message):
        run(recipe, tmp_path / "run")


@pytest.mark.parametrize(
    ("tokenize", "settings", "message"),
    [
        ({"compat": "tl2"}, {}, "keeps no track of documents"),
        ({"keep_columns": ["line"]}, {}, "no column 'kind', only line"),
        ({}, {"hooks": ["blocks.1.hook_resid_post"]}, "does not store it"),
        ({}, {"penalty": 0.0}, "greater than 0"),
        ({}, {"pool": "first"}, "'mean' or 'last'"),
        ({}, {"class_weights": "equal"}, "'balanced'"),
        ({}, {"classes": ["sea"]}, "two different values"),
        ({}, {"classes": ["sea", "sea"]}, "two different values"),
    ],
)
def test_what_cannot_be_fitted_is_refused_before_anything_runs(corpus, tmp_path, tokenize, settings, message):
    recipe = make_recipe(corpus)
    recipe["stages"][0] |= tokenize
    recipe["stages"].append({"stage": "fit_directions", **LABELS, "hooks": ["blocks.0.hook_resid_post"], **settings})

    with pytest.raises(RecipeError, match=message):
        run(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()

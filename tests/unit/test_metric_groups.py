"""Metrics by position, document, token and label are means of the rows, whatever the blocks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import TEXTS, make_recipe, run

from actpipe import open_results, open_store
from actpipe.compute.grouping import sum_by_group, sum_by_range
from actpipe.errors import RecipeError

KINDS = ["prose", None, "verse"]


@pytest.fixture
def labelled(write_jsonl, tmp_path):
    rows = [{"id": f"d{i}", "text": text, "kind": KINDS[i % 3]} for i, text in enumerate(TEXTS)]
    recipe = make_recipe(write_jsonl(rows), metrics=["loss", "correct"])
    by = {"by": ["position", "document", "token"], "columns": ["kind"], "examples": 2}
    recipe["stages"] += [
        {"stage": "summarize_metrics", **by},
        {"stage": "summarize_metrics", **by, "name": "small-blocks", "block_bytes": 300},
    ]
    run(recipe, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("name", ["summarize_metrics", "small-blocks"])
def test_each_groups_statistics_are_those_of_its_rows(labelled, name):
    store, data = open_store(labelled), open_results(labelled, name).dataset.load()
    loss = store["metrics/loss"].compute().astype(np.float64)
    document = store.documents.of_rows(np.arange(store.n_rows))
    groups = {
        "document": document,
        "token": store["tokens/input_ids"].compute(),
        "column.kind": np.array([KINDS[i % 3] or "(none)" for i in range(len(TEXTS))])[document],
    }

    for group, of_row in groups.items():
        found = data.sel(metric="loss")
        assert set(found[group].values.tolist()) == set(of_row[~np.isnan(loss)].tolist())
        for label in found[group].values:
            rows = loss[(of_row == label) & ~np.isnan(loss)]
            one = found.sel({group: label})
            assert int(one[f"{group}.count"]) == len(rows)
            if len(rows) > 1:
                assert float(one[f"{group}.mean"]) == pytest.approx(rows.mean())
                assert float(one[f"{group}.std"]) == pytest.approx(rows.std(), abs=1e-6)
                expected = rows.std(ddof=1) / np.sqrt(len(rows))
                assert float(one[f"{group}.standard_error"]) == pytest.approx(expected, abs=1e-6)


def test_the_listed_documents_are_the_worst_and_the_best(labelled):
    result = open_results(labelled, "summarize_metrics")
    mean = result.dataset["document.mean"].sel(metric="loss").values
    order = np.argsort(-mean)

    assert result.table["document"].tolist() == [*order[:2], *order[:-3:-1]]
    assert result.table["end"].tolist() == ["highest", "highest", "lowest", "lowest"]
    for row in result.table.itertuples():
        assert TEXTS[row.document].startswith(row.excerpt[:20])


def test_a_column_that_the_documents_will_not_have_is_refused_before_anything_runs(corpus, tmp_path):
    recipe = make_recipe(corpus, metrics=["loss"])
    recipe["stages"][0]["keep_columns"] = ["line"]
    recipe["stages"].append({"stage": "summarize_metrics", "columns": ["lines"]})

    with pytest.raises(RecipeError, match=r"no column 'lines', only line; did you mean 'line'"):
        run(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_documents_of_a_corpus_without_them_are_refused_before_anything_runs(corpus, tmp_path):
    recipe = make_recipe(corpus, metrics=["loss"])
    recipe["stages"][0]["compat"] = "tl2"
    recipe["stages"].append({"stage": "summarize_metrics", "by": ["document"]})

    with pytest.raises(RecipeError, match="keeps no track of documents"):
        run(recipe, tmp_path / "run")


@given(st.lists(st.integers(100, 110), max_size=30), st.integers(0, 30), st.integers(0, 30))
def test_sums_of_ranges_are_those_of_all_groups_however_the_rows_are_cut(group, one, other):
    group = np.sort(np.array(group, np.int64))
    values = np.stack([np.arange(len(group)), np.where(group % 2, np.nan, 1.0)], -1).astype(np.float64)
    low, high = sorted((one, other))
    first, *rest = (
        sum_by_range(values[piece], group[piece]) for piece in (slice(low), slice(low, high), slice(high, None))
    )
    for more in rest:
        first = first + more

    whole = sum_by_group(values, group)
    np.testing.assert_array_equal(first.over(0, first.start + len(first.sums.count)).total, whole.total)

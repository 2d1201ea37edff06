"""What is said of attention is what a reading of it query by query, in float64, gives."""

from __future__ import annotations

import math
import tracemalloc

import dask
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from support import INDUCTION, MODELS, TEXTS, make_recipe, run

from actpipe import open_results, open_store
from actpipe.compute.attention import STATISTICS, describe_rows
from actpipe.compute.patterns import NAMED_PATTERNS
from actpipe.errors import ActpipeError
from actpipe.jobs.attention import describe_store_attention
from actpipe.jobs.heads import score_store_heads

PATTERN = "blocks.*.attn.hook_pattern"
MEASURED = {"stage": "describe_attention", "by_position": True}


def described(row, position):
    """Describe one query's attention key by key."""
    seen = [(key, float(share)) for key, share in enumerate(row)]
    return [
        -sum(share * math.log(share) for _, share in seen if share > 0),
        sum(share * abs(position - key) for key, share in seen),
        seen[0][1],
        seen[position][1],
        max(share for _, share in seen),
        sum(share for _, share in seen),
    ]


@given(hnp.arrays(np.float32, (3, 2, 5), elements=st.floats(0, 1, width=32)), st.lists(st.integers(0, 4), min_size=3))
def test_statistics_are_those_of_each_query_by_itself(attention, positions):
    position = np.array(positions[:3])
    found = describe_rows(attention, position)

    for row in range(3):
        for head in range(2):
            expected = described(attention[row, head], position[row])
            np.testing.assert_allclose(found[row, head], expected, rtol=1e-5, atol=1e-6)


@given(st.integers(0, 20), st.integers(1, 5))
def test_even_attention_has_the_logarithm_of_what_it_sees_and_half_the_way_as_distance(position, padding):
    row = np.zeros((1, 1, position + 1 + padding), np.float32)
    row[..., : position + 1] = 1 / (position + 1)
    found = dict(zip(STATISTICS, describe_rows(row, np.array([position]))[0, 0], strict=True))

    assert found["entropy"] == pytest.approx(math.log(position + 1), abs=1e-5)
    assert found["distance"] == pytest.approx(position / 2, rel=1e-5)
    assert found["total"] == pytest.approx(1.0, rel=1e-6)


@pytest.fixture(scope="module", params=["packed", "documents", "windows", "kept", "bfloat16", "bert"])
def stored(request, tmp_path_factory):
    """Stores of full and of short rows, of some tokens, in half precision, and of a model that sees both sides."""
    folder = tmp_path_factory.mktemp("attention")
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(TEXTS))
    kind = request.param
    recipe = make_recipe(corpus, MODELS / "bert" if kind == "bert" else INDUCTION, hooks=[PATTERN], rows_per_part=48)
    tokenizing, extracting = recipe["stages"]
    tokenizing["context_length"] = 24
    if kind not in ("packed", "bfloat16"):
        tokenizing["layout"] = "documents"
    if kind == "windows":
        tokenizing |= {"overflow": "windows", "stride": 10}
    if kind == "kept":
        extracting["keep"] = {"every": 3}
    if kind == "bfloat16":
        extracting["dtype"] = "bfloat16"
    recipe["stages"].append(MEASURED)
    run(recipe, folder / "run")
    return folder / "run"


def test_means_are_those_of_all_stored_queries(stored):
    store, result = open_store(stored), open_results(stored, "describe_attention")
    position = store["tokens/position"].compute()

    for layer in range(2):
        attention = store[f"blocks.{layer}.attn.hook_pattern"].compute().astype(np.float64)
        for head in range(4):
            expected = np.array([described(row[head], p) for row, p in zip(attention, position, strict=True)])
            row = result.table[(result.table["layer"] == layer) & (result.table["head"] == head)]
            np.testing.assert_allclose(row[list(STATISTICS)].to_numpy()[0], expected.mean(0), rtol=1e-5)
            deviations = row[[f"{name}_std" for name in STATISTICS]].to_numpy()[0]
            np.testing.assert_allclose(deviations, expected.std(0), rtol=1e-3, atol=1e-4)
            one = result.dataset.sel(layer=layer, head=head)
            np.testing.assert_allclose(one["mean"], expected.mean(0), rtol=1e-5)
            at_six = expected[position == 6].mean(0)
            np.testing.assert_allclose(one["mean_by_position"].sel(position=6), at_six, rtol=1e-5)
            assert int(result.dataset["count"].sel(position=6)) == (position == 6).sum()
    assert result.record.summary["n_rows"] == store.n_rows


def test_numbers_depend_on_no_block(stored):
    store = open_store(stored)
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(2)]
    one, *others = (
        describe_store_attention(store, names, by_position=True, block_bytes=size) for size in (10**9, 3_000, 30_000)
    )

    for other in others:
        for name in names:
            np.testing.assert_allclose(other[name].mean, one[name].mean, rtol=1e-12)


def test_the_number_of_workers_changes_no_bit(tmp_path):
    run(synthetic_recipe(), tmp_path)
    store, names = open_store(tmp_path), [f"blocks.{layer}.attn.hook_pattern" for layer in range(2)]
    options = {"exclude_bos": False, "exclude_current_token": False, "block_bytes": 40_000}
    scores, sums = [], []
    for scheduler in ("synchronous", "threads"):
        with dask.config.set(scheduler=scheduler):
            scores.append(score_store_heads(store, list(NAMED_PATTERNS.values()), (0, 1), **options).scores)
            sums.append(describe_store_attention(store, names, by_position=False, block_bytes=40_000))

    np.testing.assert_array_equal(*scores)
    for name in names:
        np.testing.assert_array_equal(sums[0][name].total, sums[1][name].total)


def synthetic_recipe(**settings):
    recipe = make_recipe(INDUCTION, hooks=[PATTERN])
    recipe["stages"][0] = {
        "stage": "tokenize_text",
        "synthetic": {"n_documents": 12, "period": 9, "repeats": 3, **settings},
        "layout": "documents",
        "context_length": 32,
    }
    return recipe


def test_the_order_of_documents_changes_no_mean(tmp_path):
    tables = []
    for name, lines in (("forth", TEXTS), ("back", TEXTS[::-1])):
        corpus = tmp_path / f"{name}.txt"
        corpus.write_text("\n".join(lines))
        recipe = make_recipe(corpus, hooks=[PATTERN], rows_per_part=40)
        recipe["stages"][0]["layout"] = "documents"
        recipe["stages"] += [{"stage": "score_heads", "block_bytes": 30_000}, {**MEASURED, "block_bytes": 30_000}]
        run(recipe, tmp_path / name)
        scores = open_results(tmp_path / name, "score_heads").table.set_index(["pattern", "layer", "head"])
        means = open_results(tmp_path / name, "describe_attention").table.set_index(["layer", "head"])
        tables.append((scores.sort_index(), means.sort_index()))

    for one, other in zip(*tables, strict=True):
        np.testing.assert_allclose(one, other.reindex(one.index), rtol=1e-4, atol=1e-5)


def test_memory_is_that_of_blocks_whatever_the_corpus(tmp_path):
    peaks, sizes = [], []
    for n_documents in (100, 800):
        out = tmp_path / str(n_documents)
        recipe = synthetic_recipe(n_documents=n_documents)
        recipe["stages"][1]["rows_per_part"] = 2800  # maps of parts are kept: thousands of tiny ones would be seen
        run(recipe, out)
        store, names = open_store(out), [f"blocks.{layer}.attn.hook_pattern" for layer in range(2)]
        files = (out / "store.zarr/activations").rglob("*")
        sizes.append(sum(path.stat().st_size for path in files if path.is_file()))
        with dask.config.set(scheduler="synchronous"):
            describe_store_attention(store, names, by_position=True, block_bytes=1_500_000)  # imports, opens
            tracemalloc.start()
            describe_store_attention(store, names, by_position=True, block_bytes=1_500_000)
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()

    assert sizes[1] > 4 * peaks[1]
    assert peaks[1] < 1_500_000 + 0.05 * sizes[1]
    assert peaks[1] - peaks[0] < 0.05 * (sizes[1] - sizes[0])  # some kB of Dask's graph for each block


def test_what_is_no_attention_is_refused(tmp_path):
    recipe = synthetic_recipe()
    recipe["stages"].append({"stage": "describe_attention", "hooks": ["blocks.0.hook_resid_post"]})

    with pytest.raises(ActpipeError, match=r"blocks\.0\.hook_resid_post is something else; name hooks such as"):
        run(recipe, tmp_path)


def test_patterns_that_are_not_stored_are_asked_for(tmp_path):
    recipe = synthetic_recipe()
    recipe["stages"][1]["hooks"] = ["blocks.0.attn.hook_pattern"]
    recipe["stages"].append({"stage": "describe_attention"})

    with pytest.raises(ActpipeError, match=r"describe_attention needs blocks\.1\.attn\.hook_pattern"):
        run(recipe, tmp_path)

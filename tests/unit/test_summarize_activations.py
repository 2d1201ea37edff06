"""Statistics of a store against numpy in float64, and against those that are taken while the model runs."""

from __future__ import annotations

import numpy as np
import pytest
from support import MODELS, make_recipe, run

from actpipe import open_results, open_store
from actpipe.errors import ActpipeError, DtypeOverflowError
from actpipe.jobs.blocks import even_blocks

HOOKS = ["blocks.*.hook_resid_post", "blocks.0.attn.hook_z"]
CALLED = {"derived/some/blocks.1.hook_mlp_out": "blocks.1.hook_mlp_out.some"}
"""Of what is derived: its name among the results, as `reduce_activations` has it."""
ALL = ["blocks.0.attn.hook_z", "blocks.0.hook_resid_post", "blocks.1.hook_resid_post", *CALLED]


def recipe_of(folder, *stages, **extract):
    generator = np.random.default_rng(1)
    path = folder / "corpus.jsonl"
    path.write_text("".join(f'{{"ids": {generator.integers(5, 199, 20).tolist()}}}\n' for _ in range(9)))
    hooks = [*HOOKS, "blocks.0.attn.hook_pattern"]
    derive = [{"name": "some", "hooks": ["blocks.1.hook_mlp_out"], "channels": ["3-9"]}]
    recipe = make_recipe(path, MODELS / "llama", **{"hooks": hooks, "derive": derive, "rows_per_part": 32} | extract)
    recipe["stages"][0]["dataset"]["column"] = "ids"
    return {**recipe, "stages": [*recipe["stages"], *stages]}


@pytest.fixture(scope="module")
def summarized(tmp_path_factory):
    folder = tmp_path_factory.mktemp("summarized")
    settings = {"hooks": [*HOOKS, "derived/some/*"], "covariance": True, "histogram": True}
    stages = [
        {"stage": "summarize_activations", **settings},
        {"stage": "summarize_activations", "name": "pieces", "block_bytes": 4000, **settings},
        {"stage": "reduce_activations", "hooks": HOOKS, "statistics": ["mean", "variance", "extremes", "covariance"]},
        {"stage": "write_report"},
    ]
    run(recipe_of(folder, *stages), folder / "run")
    return folder / "run"


@pytest.mark.parametrize("hook", ALL)
def test_statistics_are_those_of_all_rows_by_channel(summarized, hook):
    data, rows = open_results(summarized, "summarize_activations").dataset, open_store(summarized)[hook].compute()
    x, hook = rows.astype(np.float64), CALLED.get(hook, hook)

    assert int(data[f"{hook}.count"]) == len(x)
    for name, expected in (
        ("mean", x.mean(0)),
        ("variance", x.var(0)),
        ("rms", np.sqrt((x**2).mean(0))),
        ("min", x.min(0)),
        ("max", x.max(0)),
        ("density", (x > 0).mean(0)),
    ):
        assert data[f"{hook}.{name}"].shape == rows.shape[1:]
        np.testing.assert_allclose(data[f"{hook}.{name}"], expected, rtol=1e-9, atol=1e-12, err_msg=name)
    flat = x.reshape(len(x), -1)
    covariance = np.cov(flat, rowvar=False, ddof=0)
    np.testing.assert_allclose(data[f"{hook}.covariance"], covariance, atol=1e-5 * covariance.diagonal().max())
    levels = data["level"].values
    exact = np.quantile(flat, levels, method="inverted_cdf")
    np.testing.assert_allclose(data[f"{hook}.quantile"], exact, rtol=1 / 16)
    assert int(data[f"{hook}.bin_count"].sum()) == flat.size


def test_the_table_sums_each_activation_up(summarized):
    table, store = open_results(summarized, "summarize_activations").table.set_index("hook"), open_store(summarized)

    assert list(table.index) == [CALLED.get(hook, hook) for hook in ALL]
    for hook in ALL:
        x = store[hook].compute().astype(np.float64).reshape(store.n_rows, -1)
        line = table.loc[CALLED.get(hook, hook)]
        assert line["d_row"] == x.shape[1]
        assert line["n_rows"] == store.n_rows
        assert line["rms"] == pytest.approx(np.sqrt((x**2).mean()))
        assert line["deviation"] == pytest.approx(np.sqrt(x.var(0).mean()))
        assert line["mean_length"] == pytest.approx(np.linalg.norm(x.mean(0)))
        assert line["largest_rms_channel"] == np.sqrt((x**2).mean(0)).argmax()
        assert (line["min"], line["max"]) == (x.min(), x.max())
        assert line["density"] == pytest.approx((x > 0).mean())


def test_blocks_of_another_size_give_the_same_numbers(summarized):
    whole, pieces = (open_results(summarized, name) for name in ("summarize_activations", "pieces"))

    for name, values in whole.dataset.data_vars.items():
        scale = float(np.abs(values).max())
        np.testing.assert_allclose(pieces.dataset[name], values, rtol=1e-9, atol=1e-6 * scale, err_msg=name)


def test_what_is_stored_and_what_is_only_computed_have_the_same_statistics(summarized):
    stored = open_results(summarized, "summarize_activations").dataset
    computed = open_results(summarized, "reduce_activations").dataset

    assert len(computed.data_vars) == 3 * 7
    for name, values in computed.data_vars.items():
        np.testing.assert_allclose(stored[name], values, rtol=1e-4, atol=1e-5, err_msg=name)


def test_the_report_shows_sizes_channels_and_distributions(summarized):
    page = (summarized / "report.html").read_text()

    for title in ("Size of activations: summarize_activations", "Size of channels: pieces", "Distribution: blocks.0."):
        assert title in page


def test_an_array_that_is_named_twice_makes_blocks_of_half_as_many_rows(summarized):
    store, name = open_store(summarized), "blocks.0.hook_resid_post"
    row_bytes = 4 * store.shape.d_model

    for n_times in (1, 2, 4):
        blocks = even_blocks(store, [name] * n_times, 8 * row_bytes)
        assert max(block.n_rows for block in blocks) == 8 // n_times
        assert sum(block.n_rows for block in blocks) == store.n_rows


def test_values_that_are_not_finite_are_refused_with_their_rows(tmp_path):
    recipe = recipe_of(tmp_path, derive=[], hooks=["blocks.0.hook_resid_post"], dtype="float32")
    run(recipe, tmp_path / "run")
    path = tmp_path / "run/store.zarr/activations/blocks.0.hook_resid_post/c/1/0"
    values = np.frombuffer(path.read_bytes(), np.float32).copy()
    values[5] = np.inf
    path.write_bytes(values.tobytes())

    stage = {"stage": "summarize_activations", "block_bytes": 4 * (6 * 32 + 1) * 32}
    with pytest.raises(DtypeOverflowError, match=r"1 values of blocks\.0\.hook_resid_post in rows 32 to 64 are not"):
        run({**recipe, "stages": [*recipe["stages"], stage]}, tmp_path / "run")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hooks": ["blocks.1.hook_resid_pre"]}, r"needs blocks\.1\.hook_resid_pre of the corpus 'main'"),
        ({"hooks": ["blocks.0.attn.hook_pattern"]}, "is no space of directions"),
        (
            {"covariance": True, "max_bytes": 1000},
            r"needs 32,768 bytes of memory for the covariance of bl",
        ),
        ({"hooks": []}, "at least one entry is needed"),
    ],
)
def test_what_cannot_be_summarized_is_refused_before_anything_runs(tmp_path, settings, message):
    with pytest.raises(ActpipeError, match=message):
        run(recipe_of(tmp_path, {"stage": "summarize_activations", **settings}), tmp_path / "run")
    assert not (tmp_path / "run").exists()

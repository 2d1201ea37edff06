"""What lenses, stacks and statistics find does not depend on blocks, parts, workers, or the order of documents."""

from __future__ import annotations

import json

import dask
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import MODELS, make_recipe, run

import actpipe
from actpipe import HookedModel, open_store
from actpipe.compute.accumulators import Covariance, Extremes, Histogram, Moments
from actpipe.jobs.accumulating import TOKEN, accumulate
from actpipe.jobs.blocks import even_blocks
from actpipe.jobs.geometry import flat_rows
from actpipe.jobs.lens import fit_translators, look_through_lens, rows_of_split
from actpipe.lenses import lens_of

HOOKS = [
    "hook_embed",
    "hook_pos_embed",
    "blocks.*.hook_attn_out",
    "blocks.*.hook_mlp_out",
    "blocks.*.attn.hook_z",
    "blocks.*.mlp.hook_post",
    "blocks.*.hook_resid_pre",
    "blocks.-1.hook_resid_post",
    "ln_final.hook_scale",
]
STREAM = "blocks.1.hook_resid_post"
BLOCK_BYTES = st.integers(12_000, 200_000)
SCHEDULERS = ("synchronous", "threads")
QUICK = settings(deadline=None, max_examples=4)


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def stores(request, tmp_path_factory):
    """One corpus twice: in parts of 32 rows, and with its documents in another order in parts of 48."""
    generator = np.random.default_rng(1)
    documents = [
        {"id": f"d{number}", "ids": generator.integers(5, 199, generator.integers(2, 30)).tolist()}
        for number in range(14)
    ]
    hooks = [name for name in HOOKS if request.param == "gpt2" or name != "hook_pos_embed"]
    found = []
    for name, order, rows_per_part in (("one", np.arange(14), 32), ("other", generator.permutation(14), 48)):
        folder = tmp_path_factory.mktemp(name)
        (folder / "corpus.jsonl").write_text("".join(json.dumps(documents[number]) + "\n" for number in order))
        recipe = make_recipe(folder / "corpus.jsonl", MODELS / request.param, hooks=hooks, rows_per_part=rows_per_part)
        recipe["stages"][0] |= {"layout": "documents"}
        recipe["stages"][0]["dataset"]["column"] = "ids"
        run(recipe, folder / "run")
        found.append(open_store(folder / "run"))
    model = HookedModel.from_pretrained(str(MODELS / request.param), device="cpu")
    return found[0], found[1], model


def rows_alike(one, other):
    """Return the rows of `other` that are those of `one`, in the order of `one`."""
    ids, others = (store.documents.column("id").to_pylist() for store in (one, other))
    stops = other.documents.row_stops
    starts = np.concatenate([[0], stops[:-1]])
    return np.concatenate([np.arange(starts[others.index(name)], stops[others.index(name)]) for name in ids])


def test_the_two_stores_hold_the_same_tokens_in_another_order(stores):
    one, other, _ = stores
    rows = rows_alike(one, other)

    assert (rows != np.arange(one.n_rows)).any()
    for name in ("tokens/input_ids", "tokens/position"):
        np.testing.assert_array_equal(other[name].compute()[rows], one[name].compute())


@QUICK
@given(block_bytes=BLOCK_BYTES, scheduler=st.sampled_from(SCHEDULERS))
def test_a_lens_shows_the_same_in_blocks_of_any_size_and_in_any_order_of_documents(stores, block_bytes, scheduler):
    one, other, model = stores
    whole, labels = look_through_lens(one, lens_of(model), block_bytes=2**30)

    for store in (one, other):
        with dask.config.set(scheduler=scheduler):
            pieces, seen = look_through_lens(store, lens_of(model), block_bytes=block_bytes)
        assert seen == labels
        np.testing.assert_array_equal(pieces.count, whole.count)
        np.testing.assert_allclose(pieces.mean, whole.mean, rtol=2e-4, atol=2e-4)
        np.testing.assert_allclose(pieces.std, whole.std, rtol=2e-3, atol=2e-3)


@QUICK
@given(block_bytes=BLOCK_BYTES)
def test_translators_are_those_of_the_documents_whatever_their_order_and_the_blocks(stores, block_bytes):
    one, other, _ = stores
    fitted = []
    for store, size in ((one, 2**30), (one, block_bytes), (other, block_bytes)):
        choose = rows_of_split(store, 0.4, 0, validation=False)
        fitted.append(fit_translators(store, block_bytes=size, ridge=1e-2, choose=choose))

    for found in fitted[1:]:
        assert found.keys() == fitted[0].keys()
        for label, pair in found.items():
            for tensor, expected in zip(pair, fitted[0][label], strict=True):
                np.testing.assert_allclose(tensor, expected, atol=1e-3)


def test_the_number_of_workers_changes_no_bit_of_lenses_translators_and_statistics(stores):
    (one, _, model), block_bytes = stores, 20_000
    choose = rows_of_split(one, 0.4, 0, validation=False)
    found = []
    for scheduler in SCHEDULERS:
        with dask.config.set(scheduler=scheduler):
            sums, _ = look_through_lens(one, lens_of(model), block_bytes=block_bytes)
            fitted = fit_translators(one, block_bytes=block_bytes, ridge=1e-2, choose=choose)
            moments = statistics(one, block_bytes)
        tensors = [tensor.numpy() for pair in fitted.values() for tensor in pair]
        found.append([sums.mean, sums.std, *tensors, *moments.values()])

    for first, second in zip(*found, strict=True):
        np.testing.assert_array_equal(first, second)


def statistics(store, block_bytes):
    blocks = even_blocks(store, [STREAM, TOKEN], block_bytes)
    accumulators = {"m": Moments(), "c": Covariance(), "e": Extremes(), "h": Histogram()}
    found = accumulate(blocks, lambda block: flat_rows(block, STREAM), accumulators)
    return {f"{key}.{name}": values for key, of in found.items() for name, values in of.items()}


@QUICK
@given(block_bytes=BLOCK_BYTES)
def test_statistics_are_the_same_in_blocks_of_any_size_and_in_any_order_of_documents(stores, block_bytes):
    one, other, _ = stores
    whole = statistics(one, 2**30)

    for store in (one, other):
        found = statistics(store, block_bytes)
        # passes of another shape may move a value over a bin's edge by its last bit
        names = [name for name in whole if store is one or not name.startswith("h.")]
        for name in names:
            np.testing.assert_allclose(found[name], whole[name], rtol=1e-4, atol=2e-5, err_msg=name)


STACKS = {
    "decompose_resid": lambda store, _: actpipe.decompose_resid(store),
    "accumulated_resid": lambda store, _: actpipe.accumulated_resid(store, apply_ln=True),
    "stack_head_results": lambda store, weights: actpipe.stack_head_results(store, weights, incl_remainder=True),
    "stack_neuron_results": lambda store, weights: actpipe.stack_neuron_results(store, weights, neurons=[5, 2]),
    "get_full_resid_decomposition": actpipe.get_full_resid_decomposition,
}


@pytest.mark.parametrize("name", STACKS)
@settings(deadline=None, max_examples=3)
@given(data=st.data())
def test_any_rows_of_a_stack_are_those_of_the_whole_stack_in_any_order_of_documents(stores, name, data):
    one, other, model = stores
    stack, labels = STACKS[name](one, model.weights)
    moved, same = STACKS[name](other, model.weights)
    whole = stack.compute()
    start = data.draw(st.integers(0, one.n_rows - 1))
    stop = data.draw(st.integers(start + 1, one.n_rows))

    assert labels == same
    np.testing.assert_allclose(stack[:, start:stop].compute(), whole[:, start:stop], atol=2e-5)
    np.testing.assert_allclose(moved.compute()[:, rows_alike(one, other)], whole, atol=5e-5)
    rechunked = stack.rechunk({1: data.draw(st.integers(1, one.n_rows))})
    np.testing.assert_allclose(rechunked.mean(1).compute(), whole.mean(1, dtype=np.float64), atol=2e-5)


@pytest.mark.parametrize("name", STACKS)
def test_the_number_of_workers_changes_no_bit_of_a_stack(stores, name):
    one, _, model = stores
    found = []
    for scheduler in SCHEDULERS:
        with dask.config.set(scheduler=scheduler):
            found.append(STACKS[name](one, model.weights)[0].compute())

    np.testing.assert_array_equal(found[0], found[1])

"""Stacks of the residual stream's parts against the model's own activations, row by row."""

from __future__ import annotations

import numpy as np
import pytest
from support import MODELS, make_recipe, run

import actpipe
from actpipe import HookedModel
from actpipe.errors import ActpipeError, IncompleteStoreError, UnsupportedModelError

FAMILIES = ["gpt2", "llama", "gemma2", "olmo2", "gpt_neox"]
HOOKS = [
    "hook_embed",
    "blocks.*.hook_attn_out",
    "blocks.*.hook_mlp_out",
    "blocks.*.attn.hook_z",
    "blocks.*.mlp.hook_post",
    "blocks.*.hook_resid_pre",
    "blocks.-1.hook_resid_post",
    "ln_final.hook_scale",
]
MORE = {
    "gpt2": ["hook_pos_embed", "blocks.*.hook_resid_mid", "blocks.*.ln1.hook_scale", "blocks.*.ln2.hook_scale"],
    "llama": ["blocks.*.hook_resid_mid"],
    "gemma2": ["blocks.*.hook_resid_mid", "blocks.*.ln1_post.hook_scale", "blocks.*.ln2_post.hook_scale"],
    "olmo2": ["blocks.*.hook_resid_mid", "blocks.*.ln1_post.hook_scale", "blocks.*.ln2_post.hook_scale"],
    "gpt_neox": [],
}


def recipe_of(folder, family, hooks):
    generator = np.random.default_rng(1)
    path = folder / "corpus.jsonl"
    path.write_text("".join(f'{{"ids": {generator.integers(5, 199, 20).tolist()}}}\n' for _ in range(5)))
    recipe = make_recipe(path, MODELS / family, hooks=hooks, rows_per_part=32)
    recipe["stages"][0]["dataset"]["column"] = "ids"
    return recipe


@pytest.fixture(scope="module", params=FAMILIES)
def stored(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stacks")
    run(recipe_of(folder, request.param, [*HOOKS, *MORE[request.param]]), folder / "run")
    store = actpipe.open_store(folder / "run")
    return request.param, store, HookedModel.from_pretrained(str(MODELS / request.param), device="cpu").weights


def close(found, expected, tolerance=2e-5):
    np.testing.assert_allclose(found.compute(), expected.compute(), atol=tolerance)


@pytest.mark.parametrize("expand_neurons", [True, False])
def test_heads_neurons_embeddings_and_biases_add_up_to_the_stream(stored, expand_neurons):
    family, store, weights = stored

    for layer, total in (
        (None, "blocks.1.hook_resid_post"),
        (1, "blocks.1.hook_resid_pre"),
        (0, "blocks.0.hook_resid_pre"),
    ):
        stack, labels = actpipe.get_full_resid_decomposition(store, weights, layer, expand_neurons=expand_neurons)
        assert len(labels) == len(stack)
        assert labels[-1] == "bias"
        close(stack.sum(0), store[total], 1e-4)
    if family != "gpt_neox":  # blocks in parallel have no stream between attention and MLP
        stack, _ = actpipe.get_full_resid_decomposition(
            store, weights, 1, mlp_input=True, expand_neurons=expand_neurons
        )
        close(stack.sum(0), store["blocks.1.hook_resid_mid"], 1e-4)


def test_heads_of_a_layer_and_its_bias_add_up_to_what_attention_writes(stored):
    _, store, weights = stored
    stack, labels = actpipe.stack_head_results(store, weights)
    n_heads = store.shape.n_heads

    assert labels == [f"L{layer}H{head}" for layer in range(2) for head in range(n_heads)]
    if not store.shape.blocks[1].ln1_post:
        total = stack[n_heads:].sum(0) + weights["blocks.1.attn.b_O"].detach().numpy()
        close(total, store["blocks.1.hook_attn_out"])


def test_the_remainder_is_what_heads_and_neurons_leave_of_the_stream(stored):
    _, store, weights = stored

    for function in (actpipe.stack_head_results, actpipe.stack_neuron_results):
        for layer, total in ((None, "blocks.1.hook_resid_post"), (1, "blocks.1.hook_resid_pre")):
            stack, labels = function(store, weights, layer, incl_remainder=True)
            assert labels[-1] == "remainder"
            close(stack.sum(0), store[total], 1e-4)
        stack, labels = function(store, weights, 0, incl_remainder=True)
        assert labels == ["remainder"]
        close(stack[0], store["blocks.0.hook_resid_pre"])
        assert function(store, weights, 0)[0].shape == (0, store.n_rows, store.shape.d_model)


def test_some_neurons_are_those_of_all(stored):
    _, store, weights = stored
    everything, names = actpipe.stack_neuron_results(store, weights)
    some, labels = actpipe.stack_neuron_results(store, weights, neurons=[3, 1])

    assert labels == ["L0N3", "L0N1", "L1N3", "L1N1"]
    close(some, everything[[names.index(label) for label in labels]])


def test_accumulated_streams_are_the_stored_ones_under_their_labels(stored):
    family, store, _ = stored
    stack, labels = actpipe.accumulated_resid(store)

    assert labels == ["0_pre", "1_pre", "final_post"]
    for number, name in enumerate(("blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre", "blocks.1.hook_resid_post")):
        close(stack[number], store[name], 0)
    assert actpipe.accumulated_resid(store, -1, mlp_input=True)[1] == labels  # as in TransformerLens
    if family == "gpt_neox":
        with pytest.raises(IncompleteStoreError, match="hook_resid_mid"):
            actpipe.accumulated_resid(store, incl_mid=True)
        return
    assert actpipe.accumulated_resid(store, 1, incl_mid=True)[1] == ["0_pre", "0_mid", "1_pre"]
    assert actpipe.accumulated_resid(store, 1, mlp_input=True)[1] == ["0_pre", "1_pre", "1_mid"]


def test_modes_part_the_decomposition(stored):
    _, store, _ = stored
    everything, _ = actpipe.decompose_resid(store)
    parts = [
        actpipe.decompose_resid(store, mode=mode, incl_embeds=embeds)[0].sum(0)
        for mode, embeds in (("attn", True), ("mlp", False))
    ]

    close(parts[0] + parts[1], everything.sum(0))
    labels = actpipe.decompose_resid(store, 1, mlp_input=True, incl_embeds=False)[1]
    assert labels == ["0_attn_out", "0_mlp_out", "1_attn_out"]


def test_after_the_norm_a_stack_adds_up_to_what_the_norm_gives_before_its_weights(stored):
    _, store, _ = stored
    stack, _ = actpipe.accumulated_resid(store, apply_ln=True)
    x = store["blocks.1.hook_resid_post"].compute().astype(np.float64)
    if store.shape.norm == "LN":
        x = x - x.mean(-1, keepdims=True)

    np.testing.assert_allclose(stack[-1].compute(), x / store["ln_final.hook_scale"].compute(), atol=1e-5)
    parts, _ = actpipe.decompose_resid(store, apply_ln=True)
    close(parts.sum(0), stack[-1], 1e-4)


def test_before_the_last_layer_it_is_the_scale_of_that_layers_norm(stored):
    family, store, _ = stored
    if family == "olmo2":
        with pytest.raises(UnsupportedModelError, match=r"olmo2 has no norm .* as blocks\.1\.ln1\.hook_scale"):
            actpipe.decompose_resid(store, 1, apply_ln=True)
        return
    if family != "gpt2":
        with pytest.raises(IncompleteStoreError, match=r"blocks\.1\.ln1\.hook_scale"):
            actpipe.decompose_resid(store, 1, apply_ln=True)
        return
    plain, divided = (
        actpipe.decompose_resid(store, 1, mlp_input=True, apply_ln=ln)[0].compute() for ln in (False, True)
    )

    centred = plain - plain.mean(-1, keepdims=True)
    np.testing.assert_allclose(divided, centred / store["blocks.1.ln2.hook_scale"].compute(), atol=1e-5)


def test_biases_are_summed_as_transformerlens_sums_them(stored):
    family, _, weights = stored
    if family != "gpt2":
        assert np.any(actpipe.accumulated_bias(weights, 2)) == (family == "gpt_neox")
        return
    b_O, b_out = (weights[f"blocks.0.{name}"].double().detach().numpy() for name in ("attn.b_O", "mlp.b_out"))
    second = weights["blocks.1.attn.b_O"].double().detach().numpy()

    np.testing.assert_allclose(actpipe.accumulated_bias(weights, 1), b_O + b_out, rtol=1e-6)
    np.testing.assert_allclose(
        actpipe.accumulated_bias(weights, 1, mlp_input=True, include_mlp_biases=False), b_O + second, rtol=1e-6
    )


def test_wrong_layers_and_modes_are_refused(stored):
    _, store, weights = stored

    with pytest.raises(ValueError, match="layer 3 is not one of 0 to 2"):
        actpipe.decompose_resid(store, 3)
    with pytest.raises(ValueError, match="no MLP after the last layer"):
        actpipe.get_full_resid_decomposition(store, weights, mlp_input=True)
    assert actpipe.decompose_resid(store, mode="mlp", mlp_input=True)[1][-1] == "1_mlp_out"  # as in TransformerLens
    with pytest.raises(ValueError, match="below 0"):
        actpipe.accumulated_bias(weights, -1)
    with pytest.raises(ActpipeError, match=r"no weight 'blocks\.2\.attn\.b_O'"):
        actpipe.accumulated_bias(weights, 3)
    with pytest.raises(ValueError, match="not one of all, mlp and attn"):
        actpipe.decompose_resid(store, mode="heads")


def test_processed_activations_have_no_heads_of_native_weights(tmp_path):
    recipe = recipe_of(tmp_path, "gpt2", ["blocks.*.attn.hook_z"])
    recipe["model"]["convention"] = "processed"
    run(recipe, tmp_path / "run")
    weights = HookedModel.from_pretrained(str(MODELS / "gpt2"), device="cpu").weights

    with pytest.raises(UnsupportedModelError, match="native"):
        actpipe.stack_head_results(actpipe.open_store(tmp_path / "run"), weights)


def test_experts_are_no_neurons(tmp_path):
    run(recipe_of(tmp_path, "mixtral", ["blocks.*.attn.hook_z"]), tmp_path / "run")
    weights = HookedModel.from_pretrained(str(MODELS / "mixtral"), device="cpu").weights

    with pytest.raises(ActpipeError, match=r"blocks\.0\.mlp\.hook_post"):
        actpipe.stack_neuron_results(actpipe.open_store(tmp_path / "run"), weights)

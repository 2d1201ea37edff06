"""Processed weights and the processed convention: what TransformerLens gives by default."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from families import CONFIGS, build

from actpipe import HookedModel
from actpipe.errors import UnsupportedModelError
from actpipe.models.identities import probe_ids
from actpipe.models.processing import process_weights, refactor_attention

DATA = Path(__file__).parent / "data"


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_processed_convention_is_what_2_16_gives_by_default(family):
    model = HookedModel.from_pretrained(str(DATA / family), dtype="float32", device="cpu", convention="processed")
    recorded = dict(np.load(DATA / family / "tl2_processed.npz").items())
    logits, cache = model.run_with_cache(np.load(DATA / family / "inputs.npz")["ids"], names=list(model.hook_points))
    ours = {name: tensor.numpy() for name, tensor in cache.items()} | {"logits": logits.numpy()}

    for name, expected in recorded.items():
        np.testing.assert_allclose(ours[name], expected, atol=1e-4, err_msg=name)
    assert torch.equal(logits, model.forward(np.load(DATA / family / "inputs.npz")["ids"]))


def run_by_hand(weights, shape, cache, layer):
    """Compute one block's attention from processed weights and the stream that enters it."""
    prefix, block = f"blocks.{layer}.", shape.blocks[layer]
    stream = cache[f"{prefix}hook_resid_pre"].double()
    if shape.norm == "LN":
        stream = stream - stream.mean(-1, keepdim=True)
    normalized = stream / cache[f"{prefix}ln1.hook_scale"].double()
    mark = "" if block.n_heads == block.n_kv_heads else "_"
    v = torch.einsum("bpm,hmd->bphd", normalized, weights[f"{prefix}attn.{mark}W_V"].double())
    v = (v + weights[f"{prefix}attn.{mark}b_V"].double()).repeat_interleave(block.n_heads // block.n_kv_heads, dim=2)
    z = torch.einsum("bhqk,bkhd->bqhd", cache[f"{prefix}attn.hook_pattern"].double(), v)
    out = torch.einsum("bphd,hdm->bpm", z, weights[f"{prefix}attn.W_O"].double())
    return z, out + weights[f"{prefix}attn.b_O"].double()


@pytest.mark.parametrize("name", ["gpt2", "opt", "gpt_neox", "gptj", "phi", "llama, biases", "qwen2", "starcoder2"])
def test_processed_weights_and_the_processed_convention_are_one_model(name):
    native = build(name)
    model = HookedModel(native.native, native.source, "processed")
    weights = process_weights(native.weights.state_dict(), model.shape)
    logits, cache = model.run_with_cache(probe_ids(model), names=list(model.hook_points))

    for layer in range(model.shape.n_layers):
        z, out = run_by_hand(weights, model.shape, cache, layer)
        torch.testing.assert_close(cache[f"blocks.{layer}.attn.hook_z"].double(), z, atol=1e-4, rtol=0)
        torch.testing.assert_close(cache[f"blocks.{layer}.hook_attn_out"].double(), out, atol=1e-4, rtol=0)
    final = cache["ln_final.hook_normalized"].double() @ weights["unembed.W_U"].double()
    torch.testing.assert_close(logits.double(), final + weights["unembed.b_U"].double(), atol=1e-4, rtol=0)
    assert not any(key.startswith("ln_final") for key in weights)


@pytest.mark.parametrize("name", CONFIGS)
def test_processing_changes_no_prediction_and_no_weight_in_place(name):
    model = build(name)
    if not model.shape.sums_to_logits:
        for process in (
            lambda: process_weights(model.weights.state_dict(), model.shape),
            lambda: HookedModel(model.native, model.source, "processed"),
        ):
            with pytest.raises(UnsupportedModelError, match="encoders and encoder-decoders are not processed"):
                process()
        return
    before = {key: tensor.clone() for key, tensor in model.weights.state_dict().items()}
    process_weights(model.weights.state_dict(), model.shape)

    assert all(torch.equal(before[key], tensor) for key, tensor in model.weights.state_dict().items())
    if model.shape.embed_norm:
        with pytest.raises(UnsupportedModelError, match="processed convention is not offered for bloom"):
            HookedModel(model.native, model.source, "processed")
        return
    processed = HookedModel(model.native, model.source, "processed")
    ids = probe_ids(model)
    torch.testing.assert_close(
        processed.forward(ids).log_softmax(-1), model.forward(ids).log_softmax(-1), atol=1e-5, rtol=0
    )


def test_refactored_attention_keeps_both_products_and_evens_their_factors():
    model = build("gpt2")
    before, after = model.weights.state_dict(), refactor_attention(model.weights.state_dict(), model.shape)

    def product(weights, names, layer):
        left, right = (weights[f"blocks.{layer}.attn.{name}"] for name in names)
        return left @ (right if names[1] == "W_O" else right.transpose(-1, -2))

    for layer in range(2):
        for names in (("W_Q", "W_K"), ("W_V", "W_O")):
            torch.testing.assert_close(product(before, names, layer), product(after, names, layer), atol=1e-4, rtol=0)
        prefix = f"blocks.{layer}.attn."
        W_O, W_Q, W_K = after[f"{prefix}W_O"], after[f"{prefix}W_Q"], after[f"{prefix}W_K"]
        torch.testing.assert_close(W_O @ W_O.transpose(-1, -2), torch.eye(8).expand(4, 8, 8), atol=1e-4, rtol=0)
        q = torch.cat([W_Q, after[f"{prefix}b_Q"].unsqueeze(1)], dim=1).norm(dim=1)
        k = torch.cat([W_K, after[f"{prefix}b_K"].unsqueeze(1)], dim=1).norm(dim=1)
        torch.testing.assert_close(q, k, atol=1e-4, rtol=0)
        assert not after[f"{prefix}b_V"].any()
    with pytest.raises(UnsupportedModelError, match="cannot be refactored"):
        refactor_attention(build("llama").weights.state_dict(), build("llama").shape)

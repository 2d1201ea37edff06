"""Encoders and encoder-decoders: names, shapes, values and weights are TransformerLens'."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest

from actpipe import HookedModel

DATA = Path(__file__).parent / "data"
FAMILIES = ["bert", "t5"]
TOLERANCE = 1e-4

# What 2.16 calls otherwise than 4.3; where it is not only the name, the value under 4.3's name is another one.
NAMES_IN_TL4 = {
    "bert": [
        ("embed_ln.", "embed.ln."),
        ("ln_final.", "mlm_head.ln."),  # 4.3 has the head's norm under the name of a final norm
        ("hook_embed", "hook_full_embed"),  # the embedding after its norm; before it `embed.hook_embed` is the tokens'
        ("hook_resid_post", "hook_normalized_resid_post"),  # the block's output
        ("hook_resid_mid", "hook_resid_post"),  # 4.3's `resid_mid` is the sum after the MLP, before its norm
        ("hook_attn_out", "ln1.hook_normalized"),  # 4.3's `attn_out` is the sum after attention and its norm
    ],
    "t5": [
        ("encoder_blocks.", "encoder."),
        ("decoder_blocks.", "decoder."),
        ("self_attn.", "attn."),
        ("hook_resid_mid2", "hook_resid_mid_cross"),
        ("encoder_ln_final.", "encoder_final_ln."),
        ("decoder_ln_final.", "decoder_final_ln."),
    ],
}
# LayerNorm's `hook_normalized` is before weight and bias in 4.3; T5's norms are computed there as LayerNorm, but are
# RMSNorm in the model and in 2.16.
DIFFERENT_IN_TL4 = {"bert": {"hook_normalized"}, "t5": {"hook_normalized", "hook_scale"}}


@cache
def loaded(family: str) -> HookedModel:
    return HookedModel.from_pretrained(str(DATA / family), dtype="float32", device="cpu")


def run(family: str, *, masked: bool = False, n_decoder: int | None = None, segments: bool = False):
    model, inputs = loaded(family), np.load(DATA / family / "inputs.npz")
    others = {"decoder_input_ids": inputs["decoder_input_ids"][:, :n_decoder]} if family == "t5" else {}
    if segments:
        others["token_type_ids"] = (np.arange(12) >= 5).astype(int)[None].repeat(3, 0)
    names = ["*", *(name for name in model.hook_points if name.endswith("hook_result"))]
    logits, cache = model.run_with_cache(inputs["ids"], inputs["mask"] if masked else None, names=names, **others)
    return logits.numpy(), {name: tensor.numpy() for name, tensor in cache.items()}


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    assert ours.shape == theirs.shape
    with np.errstate(invalid="ignore"):
        return float(np.where(ours == theirs, 0.0, np.abs(ours - theirs)).max())


def in_2_16(family: str, name: str) -> str:
    for theirs, ours in NAMES_IN_TL4[family]:
        if theirs in name:
            name = name.replace(theirs, ours)
            if family == "bert":
                break
    return name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("masked", [False, True])
def test_every_activation_of_2_16_is_there_in_its_order_with_its_value(family, masked):
    recorded = dict(np.load(DATA / family / f"tl2{'_masked' if masked else ''}.npz").items())
    logits, ours = run(family, masked=masked, n_decoder=1, segments=masked and family == "bert")
    assert difference(logits, recorded.pop("logits")) < TOLERANCE

    assert list(ours) == list(recorded)
    for name, theirs in recorded.items():
        if family == "t5" and name.endswith("scores"):  # Masked there by adding the smallest number, here -inf.
            assert np.array_equal(theirs < -1e30, np.isneginf(ours[name]))
            theirs = np.where(theirs < -1e30, -np.inf, theirs)
        assert difference(ours[name], theirs) < TOLERANCE, name


@pytest.mark.parametrize("family", FAMILIES)
def test_activations_agree_with_4_3_but_for_the_known_differences(family):
    _, ours = run(family)
    theirs = {in_2_16(family, name): values for name, values in np.load(DATA / family / "tl4.npz").items()}
    assert set(theirs) <= set(ours)

    differing = {name for name in theirs if not difference(ours[name], theirs[name]) < TOLERANCE}
    assert {name.rsplit(".", 1)[-1] for name in differing} <= DIFFERENT_IN_TL4[family]


def test_layernorm_of_4_3_is_ours_before_weight_and_bias():
    _, ours = run("bert")
    recorded = np.load(DATA / "bert" / "tl4.npz")

    for name in recorded.files:
        if name.endswith("hook_normalized"):
            prefix = in_2_16("bert", name).removesuffix(".hook_normalized")
            weight, bias = (loaded("bert").weights[f"{prefix}.{which}"].numpy() for which in ("w", "b"))
            assert difference(ours[f"{prefix}.hook_normalized"], recorded[name] * weight + bias) < TOLERANCE


def test_norms_of_t5_in_4_3_are_centred_which_the_models_own_are_not():
    _, ours = run("t5")
    stream, theirs = ours["encoder.0.hook_resid_pre"], np.load(DATA / "t5" / "tl4.npz")

    scale = np.sqrt(stream.var(-1, keepdims=True) + 1e-6)
    assert difference(scale, theirs["encoder_blocks.0.ln1.hook_scale"]) < TOLERANCE
    centred = (stream - stream.mean(-1, keepdims=True)) / scale
    assert difference(centred, theirs["encoder_blocks.0.ln1.hook_normalized"]) < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("masked", [False, True])
def test_logits_are_the_recorded_ones(family, masked):
    logits, _ = run(family, masked=masked)

    expected = np.load(DATA / family / "inputs.npz")["masked_logits" if masked else "logits"]
    assert difference(logits, expected) < TOLERANCE

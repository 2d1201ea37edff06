"""Names, shapes and values are TransformerLens'."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from actpipe import HookedModel

DATA = Path(__file__).parent / "data"
FAMILIES = sorted(path.name for path in DATA.iterdir() if path.is_dir() and path.name not in ("bert", "t5"))
IN_TL2 = [family for family in FAMILIES if (DATA / family / "tl2.npz").exists()]
WITH_LAYERNORM = ["bloom", "falcon", "gpt2", "gpt_neo", "gpt_neox", "gptj", "opt", "phi"]
TOLERANCE = 1e-4

# What TransformerLens 4.3 does otherwise than 2.16, which is the authority.
DIFFERENT_IN_TL4 = {
    "hook_normalized": "LayerNorm: before weight and bias there, after them in 2.16",
    "hook_attn_scores": "masked entries: the type's smallest number there, -inf in 2.16; ALiBi's bias (bloom) and"
    " the pattern in its place (gpt_neo, gptj, opt)",
    "hook_expert_weights": "weights of the chosen experts there, of all in 2.16",
}
NOT_IN_2_16 = {
    "mixtral": {"mlp.hook_pre": "the experts' input", "mlp.hook_post": "the experts' output"},
}


@cache
def captured(family: str) -> tuple[torch.Tensor, dict[str, np.ndarray]]:
    """Return the logits and every activation of a family's model on the recorded ids."""
    model = HookedModel.from_pretrained(str(DATA / family), dtype="float32", device="cpu")
    names = ["*", "blocks.*.attn.hook_result"]
    logits, cache = model.run_with_cache(np.load(DATA / family / "inputs.npz")["ids"], names=names)
    return logits, {name: tensor.numpy() for name, tensor in cache.items()}


def recorded(family: str, version: str) -> dict[str, np.ndarray]:
    return {name: values for name, values in np.load(DATA / family / f"{version}.npz").items() if name != "logits"}


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    if ours.shape != theirs.shape:  # There, norms of queries and keys, and OPT's in 4.3, join or swap axes.
        if ours.ndim == theirs.ndim == 4:
            ours = ours.transpose(0, 2, 1, 3)
        assert ours.size == theirs.size
        ours = ours.reshape(theirs.shape)
    with np.errstate(invalid="ignore"):
        return float(np.where(ours == theirs, 0.0, np.abs(ours - theirs)).max())


@pytest.mark.parametrize("family", IN_TL2)
def test_every_activation_of_2_16_is_there_with_its_value(family):
    _, ours = captured(family)
    theirs = recorded(family, "tl2")

    assert set(ours) == set(theirs)
    wrong = {name: difference(ours[name], theirs[name]) for name in theirs}
    assert {name: error for name, error in wrong.items() if not error < TOLERANCE} == {}


@pytest.mark.parametrize("family", IN_TL2)
def test_names_come_in_the_order_in_which_transformerlens_fires_them(family):
    _, ours = captured(family)

    assert list(ours) == list(recorded(family, "tl2"))


@pytest.mark.parametrize("family", FAMILIES)
def test_activations_agree_with_4_3_but_for_the_known_differences(family):
    _, ours = captured(family)
    theirs = recorded(family, "tl4")
    missing = {name.split(".", 2)[-1] for name in set(theirs) - set(ours)}
    assert missing == set(NOT_IN_2_16.get(family, ()))

    theirs = {name: values for name, values in theirs.items() if name in ours}
    differing = {name for name in theirs if not difference(ours[name], theirs[name]) < TOLERANCE}
    kinds = {name.rsplit(".", 1)[-1] for name in differing}
    assert kinds <= set(DIFFERENT_IN_TL4)
    assert family in WITH_LAYERNORM or all("hook_normalized" not in name for name in differing)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"bloom", "gpt_neo", "gptj", "opt"}))
def test_scores_agree_with_4_3_where_they_are_not_masked(family):
    _, ours = captured(family)

    for name, theirs in recorded(family, "tl4").items():
        if name.endswith("hook_attn_scores"):
            seen = np.isfinite(ours[name])
            np.testing.assert_allclose(ours[name][seen], theirs[seen], atol=TOLERANCE)


@pytest.mark.parametrize("family", ["gpt_neo", "gptj", "opt"])
def test_4_3_gives_the_pattern_under_the_name_of_the_scores_where_attention_is_the_models_own(family):
    _, ours = captured(family)

    for name, theirs in recorded(family, "tl4").items():
        if name.endswith("hook_attn_scores"):
            assert difference(ours[name.replace("attn_scores", "pattern")], theirs) < TOLERANCE


@pytest.mark.parametrize("family", WITH_LAYERNORM)
def test_layernorm_of_4_3_is_ours_before_weight_and_bias(family):
    model = HookedModel.from_pretrained(str(DATA / family), dtype="float32", device="cpu")
    _, ours = captured(family)

    for name, theirs in recorded(family, "tl4").items():
        if name.endswith("hook_normalized"):
            prefix = name.removesuffix(".hook_normalized")
            weight, bias = model.weights[f"{prefix}.w"].numpy(), model.weights[f"{prefix}.b"].numpy()
            assert difference(ours[name], theirs * weight + bias) < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("masked", [False, True])
def test_logits_are_the_recorded_ones(family, masked):
    inputs = np.load(DATA / family / "inputs.npz")
    model = HookedModel.from_pretrained(str(DATA / family), dtype="float32", device="cpu")

    logits = model.forward(inputs["ids"], torch.from_numpy(inputs["mask"]) if masked else None)
    expected = inputs["masked_logits" if masked else "logits"]
    assert difference(logits.numpy(), expected) < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_left_padding_gives_each_token_the_value_it_has_alone(family):
    ids = np.load(DATA / family / "inputs.npz")["ids"]
    model = HookedModel.from_pretrained(str(DATA / family), dtype="float32", device="cpu")
    padded = np.zeros((2, 12), int)
    padded[0], padded[1, 5:] = ids[0], ids[1, :7]
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, :5] = 0

    names = ["blocks.*.hook_resid_post", "blocks.*.attn.hook_z"]
    _, together = model.run_with_cache(padded, mask, names=names)
    _, alone = model.run_with_cache(ids[1, :7], names=names)

    for name in alone:
        np.testing.assert_allclose(together[name][1, 5:], alone[name][0], atol=1e-5)

"""Every entry says the truth about its architecture."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from families import CONFIGS, build

from actpipe.errors import UnsupportedModelError
from actpipe.models.capture import Capture
from actpipe.models.families import all_families
from actpipe.models.identities import check_identities, probe_ids


def failing(model):
    return [(o.statement, o.where, o.error) for o in check_identities(model, probe_ids(model)) if not o.holds]


def proven(model):
    return {kind for outcome in check_identities(model, probe_ids(model)) if outcome.holds for kind in outcome.kinds}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_identity_holds_and_every_hook_point_is_proven(name):
    model = build(name)

    assert failing(model) == []
    assert {point.kind for point in model.hook_points.values()} <= proven(model)


def test_every_entry_is_tried():
    tried = {model_type for model_type, _ in CONFIGS.values()}

    assert tried == set(all_families())


@pytest.mark.parametrize("name", CONFIGS)
def test_asking_for_everything_changes_no_logit_and_leaves_nothing_behind(name):
    model, ids = build(name), None
    ids = probe_ids(model)
    bare, attention = model.forward(ids), model.native.config._attn_implementation
    logits, _ = model.run_with_cache(ids)

    assert torch.equal(bare, logits)
    assert torch.equal(model.forward(ids), bare)
    assert model.native.config._attn_implementation == attention
    assert not any("forward" in vars(module) for module in model.native.modules())


WITH_DECODER = [name for name, (model_type, _) in CONFIGS.items() if model_type in ("t5", "mt5", "bart")]


# Gemma 2 and GPT-OSS have no padding of their own but in the mask; the two below count positions otherwise.
@pytest.mark.parametrize("name", sorted(set(CONFIGS) - set(WITH_DECODER)))
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_sequence_has_the_values_that_it_has_alone(name, side):
    model = build(name)
    ids = np.random.default_rng(0).integers(2, 199, (2, 12))
    mask = np.ones((2, 12), int)
    real = slice(5, 12) if side == "left" else slice(0, 7)
    mask[1, : 5 if side == "left" else 0] = 0
    mask[1, 12 if side == "left" else 7 :] = 0
    names = ["blocks.*.hook_resid_post", "blocks.*.attn.hook_z", "blocks.*.attn.hook_pattern"]
    _, together = model.run_with_cache(ids, mask, names=names)
    _, alone = model.run_with_cache(ids[1, real], names=names)

    for key, expected in alone.items():
        found = together[key][1, :, real, real] if key.endswith("pattern") else together[key][1, real]
        np.testing.assert_allclose(found, expected[0], atol=1e-4, err_msg=key)


# Each of these makes a hook wrong by a little: a fiftieth more, or one position off.
WRONG = {"larger": lambda tensor: tensor * 1.02, "shifted": lambda tensor: tensor.roll(1, dims=1)}
TRIED = ["bloom", "falcon, 40b", "gptj", "gemma3", "olmo2", "gpt_oss", "deepseek_v3", "granite", "glm4"]
TRIED += ["bert, next sentence", "roberta", "distilbert", "t5, gated", "bart"]


@pytest.mark.parametrize("how", WRONG)
@pytest.mark.parametrize("name", TRIED)
def test_a_hook_made_wrong_on_purpose_fails_an_identity(name, how, monkeypatch):
    model = build(name)
    deliver, missed = Capture._deliver, []
    for kind in sorted({point.kind for point in model.hook_points.values() if not point.integer}):

        def twisted(self, places, values, kind=kind):
            def twist(tap):
                point = model.hook_points.get(tap.name)
                if point is None or point.kind != kind:
                    return tap
                return replace(tap, read=lambda value, read=tap.read: WRONG[how](_with_positions(read(value), tap)))

            def _with_positions(tensor, tap):
                return tensor.unflatten(0, (self._batch_size, -1)) if tap.flat and len(tensor) > 2 else tensor

            deliver(self, [twist(tap) for tap in places], values)

        monkeypatch.setattr(Capture, "_deliver", twisted)
        if not failing(model):
            missed.append(kind)
    assert missed == []


HALVED = ["gpt2", "llama", "gemma2", "bloom", "gptj", "falcon, alibi", "mixtral", "gpt_oss"]
HALVED += ["bert, next sentence", "distilbert", "t5, gated", "bart"]


@pytest.mark.parametrize("name", HALVED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_identities_hold_in_half_precision(name, dtype):
    assert failing(build(name, dtype)) == []


def test_an_entry_that_does_not_fit_is_refused_with_the_missing_part():
    from actpipe.models.anatomy import find_anatomy
    from actpipe.models.recognition import family_for

    model = build("llama")
    del model.native.model.layers[1].mlp
    with pytest.raises(UnsupportedModelError, match="not laid out as the entry 'llama' says"):
        find_anatomy(model.native, family_for(model.native.config))

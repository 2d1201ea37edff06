"""Loading, running and checking models; what cannot work is refused with a reason."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from support import INDUCTION, MODELS

from actpipe import HookedModel
from actpipe.errors import IdentityError, ModelLoadError, RecipeError, UnknownHookError, UnsupportedModelError
from actpipe.models import taps
from actpipe.models.capture import Capture
from actpipe.models.hooked_model import ModelSpec
from actpipe.models.identities import probe_ids
from actpipe.models.loading import ModelSource

FAMILIES = ["gpt2", "llama", "gpt_neox"]


@pytest.fixture(params=FAMILIES)
def model(request):
    return HookedModel.from_pretrained(str(MODELS / request.param), dtype="float32", device="cpu")


def test_asking_for_everything_changes_no_logit(model):
    ids = probe_ids(model)
    bare = model.forward(ids)
    logits, _ = model.run_with_cache(ids)

    assert torch.equal(bare, logits)
    assert torch.equal(model.forward(ids), bare)
    assert model.native.config._attn_implementation == "sdpa"


def test_asking_for_patterns_changes_no_other_activation(model):
    ids = probe_ids(model)
    _, without = model.run_with_cache(ids, names=["blocks.*.attn.hook_z", "blocks.*.hook_resid_post"])
    _, beside = model.run_with_cache(ids)

    assert all(torch.equal(beside[name], value) for name, value in without.items())


def test_one_sequence_may_be_given_without_a_batch_axis(model):
    ids = probe_ids(model)
    logits, _ = model.run_with_cache(ids[0].tolist(), names=["hook_embed"])

    assert logits.shape == (1, ids.shape[1], model.shape.d_vocab)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[1, 2, 500]], "token id 500 is outside the vocabulary of 199"),
        ([[1, -2]], "token id -2 is outside"),
        ([], "must be"),
        (np.zeros((1, 2, 3), int), "must be"),
    ],
)
def test_ids_that_the_model_cannot_take_are_refused(ids, message):
    model = HookedModel.from_pretrained(str(MODELS / "gpt2"), device="cpu")

    with pytest.raises(ValueError, match=message):
        model.run_with_cache(ids)


def test_more_positions_than_were_learned_are_refused():
    model = HookedModel.from_pretrained(str(MODELS / "gpt2"), device="cpu")

    with pytest.raises(ValueError, match="65 positions, but this model has learned only 64"):
        model.forward(np.zeros((1, 65), int))


def test_a_mask_of_another_shape_is_refused(model):
    with pytest.raises(ValueError, match="attention_mask is"):
        model.forward([[1, 2, 3]], [[1, 1]])


def test_an_unknown_name_is_refused(model):
    with pytest.raises(UnknownHookError, match="did you mean"):
        model.run_with_cache([[1, 2]], names=["blocks.0.hook_resid_pots"])


def test_a_tensor_argument_that_attention_does_not_know_is_refused():
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from actpipe.models.attention import interface_watched, observe

    module, seen = torch.nn.Linear(2, 2), []
    observe(module, seen.append)
    q = torch.zeros(1, 1, 3, 2)
    with interface_watched():
        attend = ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", None)
        with pytest.raises(UnsupportedModelError, match="passes indices to its attention function"):
            attend(module, q, q, q, None, indices=torch.zeros(1))
        attend(module, q, q, q, None, position_ids=torch.zeros(1))
    assert len(seen) == 1


def test_a_hook_that_never_comes_by_is_an_error(model):
    tap = taps.Tap("never", torch.nn.Linear(1, 1), "output", lambda t: t)

    with (
        Capture(model.anatomy, [tap], lambda *_: None, stop=True) as capture,
        pytest.raises(IdentityError, match="never"),
    ):
        capture.run(torch.zeros(1, 3, dtype=torch.long))


class TestWeights:
    def test_layouts_are_transformerlens(self, model):
        shape, weights = model.shape, model.weights
        layers, heads, d_model, d_head = shape.n_layers, shape.n_heads, shape.d_model, shape.d_head

        assert weights.W_E.shape == (shape.d_vocab, d_model)
        assert weights.W_U.shape == (d_model, shape.d_vocab)
        assert weights.b_U.shape == (shape.d_vocab,)
        for name in ("W_Q", "W_K", "W_V"):
            assert getattr(weights, name).shape == (layers, heads, d_model, d_head)
        for name in ("b_Q", "b_K", "b_V"):
            assert getattr(weights, name).shape == (layers, heads, d_head)
        assert weights.W_O.shape == (layers, heads, d_head, d_model)
        assert weights.b_O.shape == weights.b_out.shape == (layers, d_model)
        assert weights.W_in.shape == (layers, d_model, shape.d_mlp)
        assert weights.W_out.shape == (layers, shape.d_mlp, d_model)
        assert weights.b_in.shape == (layers, shape.d_mlp)
        if shape.blocks[0].mlp == "gated":
            assert weights.W_gate.shape == weights.W_in.shape
        if shape.learned_positions:
            assert weights.W_pos.shape == (shape.n_ctx, d_model)

    def test_parameters_go_by_their_names(self, model):
        assert torch.equal(model.weights["blocks.1.attn.W_O"], model.weights.W_O[1])
        with pytest.raises(UnknownHookError, match=r"no weight 'blocks\.1\.attn\.W_X'"):
            model.weights["blocks.1.attn.W_X"]
        with pytest.raises(UnknownHookError, match="no weight"):
            model.weights["blocks.7.attn.W_O"]


class TestLoading:
    def test_a_mistyped_folder_names_the_nearest(self):
        with pytest.raises(ModelLoadError, match=r"does not exist; did you mean '.*/gpt_neox'"):
            HookedModel.from_pretrained(str(MODELS / "gpt_neoxx"))

    def test_an_architecture_that_structure_does_not_tell_is_refused(self, tmp_path):
        from transformers import XLMConfig

        XLMConfig(emb_dim=8, n_layers=2, n_heads=2, n_words=50).save_pretrained(tmp_path)
        with pytest.raises(UnsupportedModelError, match="no entry says where the parts of a 'xlm' model are, and"):
            ModelSpec(ModelSource(str(tmp_path)))

    def test_code_that_comes_with_a_model_is_not_run(self, tmp_path):
        shutil.copytree(MODELS / "gpt2", tmp_path / "model")
        config = json.loads((tmp_path / "model/config.json").read_text())
        config |= {
            "model_type": "mine",
            "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"},
        }
        (tmp_path / "model/config.json").write_text(json.dumps(config))
        (tmp_path / "model/mine.py").write_text("raise SystemExit('this code was run')")

        with pytest.raises(ModelLoadError, match="trust_remote_code"):
            HookedModel.from_pretrained(str(tmp_path / "model"))

    def test_weights_that_cannot_be_read_are_refused(self, tmp_path):
        shutil.copytree(MODELS / "gpt2", tmp_path / "model")
        (tmp_path / "model/model.safetensors").unlink()

        with pytest.raises(ModelLoadError, match="cannot load the weights"):
            HookedModel.from_pretrained(str(tmp_path / "model"))

    def test_an_absent_device_is_refused(self):
        with pytest.raises(RecipeError, match="device 'cuda:77' cannot be used here"):
            HookedModel.from_pretrained(str(MODELS / "gpt2"), device="cuda:77")

    def test_accelerate_may_place_the_model(self):
        spread = HookedModel.from_pretrained(str(MODELS / "llama"), dtype="float32", device_map={"": "cpu"})
        plain = HookedModel.from_pretrained(str(MODELS / "llama"), dtype="float32", device="cpu")
        ids = probe_ids(plain)

        assert torch.equal(spread.run_with_cache(ids)[0], plain.run_with_cache(ids)[0])

    def test_the_skeleton_knows_what_the_model_knows(self):
        for family in FAMILIES:
            spec, model = (
                ModelSpec(ModelSource(str(MODELS / family))),
                HookedModel.from_pretrained(str(MODELS / family)),
            )
            assert spec.shape == model.shape
            assert list(spec.hook_points) == list(model.hook_points)
            assert spec.n_parameters == sum(p.numel() for p in model.native.parameters())


def test_the_trained_model_is_what_its_description_says():
    model = HookedModel.from_pretrained(str(INDUCTION), device="cpu")

    assert (model.shape.n_layers, model.shape.n_heads, model.shape.d_model, model.shape.d_vocab) == (2, 4, 128, 512)
    assert sum(p.numel() for p in model.native.parameters()) == 495_104

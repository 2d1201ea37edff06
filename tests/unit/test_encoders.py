"""What encoders and encoder-decoders take, refuse and load; and that each of their names is proven by itself."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from families import build
from support import MODELS

from actpipe import HookedModel
from actpipe.errors import ModelLoadError, UnknownHookError
from actpipe.models.capture import Capture
from actpipe.models.identities import check_identities, probe_ids
from actpipe.models.position_bias import relative_bias
from actpipe.models.probe import COPIES

IDS = np.random.default_rng(0).integers(5, 199, (2, 12))


@pytest.mark.parametrize("name", ["t5, gated", "bart"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_of_the_encoder_reaches_neither_stack(name, side):
    model = build(name)
    mask, decoder = np.ones((2, 12), int), IDS[:, 3:8]
    real = slice(5, 12) if side == "left" else slice(0, 7)
    mask[1] = 0
    mask[1, real] = 1
    if (name, side) == ("bart", "left"):
        with pytest.raises(ValueError, match=r"bart counts positions from the first token.*pad on the right"):
            model.forward(IDS, mask)
        return
    names = ["*hook_resid_post", "*attn.hook_z", "decoder.*.cross_attn.hook_pattern"]
    logits, together = model.run_with_cache(IDS, mask, names=names, decoder_input_ids=decoder)
    expected_logits, alone = model.run_with_cache(IDS[1, real], names=names, decoder_input_ids=decoder[1])

    torch.testing.assert_close(logits[1], expected_logits[0], atol=1e-4, rtol=0)
    for key, expected in alone.items():
        found = together[key][1]
        found = found[..., real] if key.endswith("pattern") else found[real] if key.startswith("encoder") else found
        np.testing.assert_allclose(found, expected[0], atol=1e-4, err_msg=key)


@pytest.mark.parametrize("name", ["t5, gated", "bart"])
def test_the_decoder_sees_no_later_token_and_starts_by_itself(name):
    model = build(name)
    whole = model.forward(IDS, decoder_input_ids=IDS[:, :6])

    torch.testing.assert_close(model.forward(IDS, decoder_input_ids=IDS[:, :4]), whole[:, :4], atol=1e-5, rtol=0)
    start = model.native.config.decoder_start_token_id
    assert torch.equal(model.forward(IDS), model.forward(IDS, decoder_input_ids=np.full((2, 1), start)))


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_the_bias_of_every_distance_is_the_models_own(stack):
    model = build("t5")
    model.native.config.relative_attention_num_buckets = 32
    model.native.config.relative_attention_max_distance = 128
    attention = getattr(model.native, stack).block[0].layer[0].SelfAttention
    attention.relative_attention_num_buckets, attention.relative_attention_max_distance = 32, 128
    attention.relative_attention_bias = torch.nn.Embedding(32, 4).requires_grad_(False)

    found = relative_bias(model, 0 if stack == "encoder" else 2, (300, 300))
    assert torch.equal(found, attention.compute_bias(300, 300)[0])


def test_segments_change_what_comes_out_and_are_0_by_default():
    model = build("bert")
    zeros = np.zeros_like(IDS)

    assert torch.equal(model.forward(IDS), model.forward(IDS, token_type_ids=zeros))
    assert not torch.equal(model.forward(IDS), model.forward(IDS, token_type_ids=zeros + 1))


def test_roberta_counts_positions_over_real_tokens_only():
    model = build("roberta")
    ids = IDS.copy()
    ids[0, :3] = model.native.config.pad_token_id
    _, cache = model.run_with_cache(ids, names=["embed.hook_pos_embed"])

    table = model.native.roberta.embeddings.position_embeddings.weight
    assert torch.equal(cache["embed.hook_pos_embed"][0, 3], model.weights.W_pos[0])
    assert torch.equal(cache["embed.hook_pos_embed"][0, 0], table[model.native.config.pad_token_id])
    assert model.shape.n_ctx == len(table) - 2


def test_the_head_for_the_next_sentence_is_there_where_the_model_was_loaded_with_it():
    model = build("bert, next sentence")
    logits, cache = model.run_with_cache(IDS, names=["pooler.hook_pooler_out", "nsp_head.hook_nsp_out"])
    native = model.native(input_ids=torch.from_numpy(IDS))

    assert torch.equal(logits, native.prediction_logits)
    assert torch.equal(cache["nsp_head.hook_nsp_out"], native.seq_relationship_logits)
    assert cache["pooler.hook_pooler_out"].shape == (2, 32)
    assert "pooler.hook_pooler_out" not in model.run_with_cache(IDS)[1]
    with pytest.raises(UnknownHookError, match="no hook of this"):
        build("bert").select(["nsp_head.hook_nsp_out"])


@pytest.mark.parametrize(
    ("name", "inputs", "message"),
    [
        ("bert", {"decoder_input_ids": IDS}, "this bert model has no decoder"),
        ("gpt2", {"decoder_input_ids": IDS}, "this gpt2 model has no decoder"),
        ("distilbert", {"token_type_ids": IDS * 0}, "tells no segments apart"),
        ("bert", {"token_type_ids": IDS * 0 + 2}, "go from 2 to 2, but this model has types 0 to 1"),
        ("bert", {"token_type_ids": IDS[:, :3] * 0}, r"token_type_ids are \(2, 3\), input_ids are \(2, 12\)"),
        ("t5", {"decoder_input_ids": IDS[:1]}, r"for a batch of 2, got \(1, 12\)"),
        ("t5", {"decoder_input_ids": IDS + 199}, "outside the vocabulary of 199"),
        ("bart", {"decoder_input_ids": np.zeros((2, 65), int)}, "65 decoder positions, .* learned only 64"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(name, inputs, message):
    model = build(name)

    with pytest.raises(ValueError, match=message):
        model.run_with_cache(IDS, **inputs)


def test_a_decoder_of_which_no_start_is_known_is_not_started():
    model = build("t5")
    model.native.config.decoder_start_token_id = None
    model.native.generation_config.decoder_start_token_id = None

    with pytest.raises(ValueError, match="does not say with which token its decoder starts; give decoder_input_ids"):
        model.forward(IDS)


def test_bias_of_the_logits_is_that_of_bart():
    model = build("bart")
    model.native.final_logits_bias.normal_()
    failing = [outcome.statement for outcome in check_identities(model, probe_ids(model)) if not outcome.holds]

    assert failing == []
    assert torch.equal(model.weights.b_U, model.native.final_logits_bias[0])


@pytest.mark.parametrize("name", ["t5, gated", "bart", "bert, next sentence"])
def test_each_single_name_made_wrong_fails_an_identity(name, monkeypatch):
    model = build(name)
    deliver, missed = Capture._deliver, []
    names = [n for n, point in model.hook_points.items() if point.kind not in COPIES or point.layer == 0]
    for wrong in names:

        def twisted(self, taps, values, wrong=wrong):
            larger = [replace(t, read=lambda v, read=t.read: read(v) * 1.02) if t.name == wrong else t for t in taps]
            deliver(self, larger, values)

        monkeypatch.setattr(Capture, "_deliver", twisted)
        if all(outcome.holds for outcome in check_identities(model, probe_ids(model))):
            missed.append(wrong)
    assert missed == []


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_a_checkpoint_without_a_part_of_the_model_is_refused(family, tmp_path):
    from safetensors.torch import load_file, save_file

    weights = load_file(MODELS / family / "model.safetensors")
    part = "cls.predictions.transform" if family == "bert" else "decoder.block.1"
    save_file({n: t for n, t in weights.items() if part not in n}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((MODELS / family / "config.json").read_text())

    with pytest.raises(ModelLoadError, match=rf"lack {part}.* and \d+ more of .*, which would be random"):
        HookedModel.from_pretrained(str(tmp_path), dtype="float32", device="cpu")


def test_a_checkpoint_saved_without_its_head_is_loaded_only_if_the_head_has_no_weights_of_its_own(tmp_path):
    build("bart").native.model.save_pretrained(tmp_path / "bart")
    build("bert").native.bert.save_pretrained(tmp_path / "bert")
    loaded = HookedModel.from_pretrained(str(tmp_path / "bart"), dtype="float32", device="cpu")

    torch.testing.assert_close(loaded.forward(IDS), build("bart").forward(IDS), atol=1e-5, rtol=0)
    with pytest.raises(
        ModelLoadError, match=r"lack cls\.predictions.*take a checkpoint that has its language-modelling"
    ):
        HookedModel.from_pretrained(str(tmp_path / "bert"), dtype="float32", device="cpu")


@pytest.mark.parametrize("said", ["BertForMaskedLM", "BertForPreTraining"])
def test_the_next_sentence_head_is_loaded_where_the_weights_are_there_whatever_the_configuration_says(said, tmp_path):
    build("bert, next sentence").native.save_pretrained(tmp_path / "with")
    build("bert").native.save_pretrained(tmp_path / "without")
    for folder, next_sentence in ((tmp_path / "with", True), (tmp_path / "without", False)):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"architectures": [said]}))
        loaded = HookedModel.from_pretrained(str(folder), dtype="float32", device="cpu")

        assert loaded.shape.next_sentence == next_sentence
        assert ("pooler.hook_pooler_out" in loaded.hook_points) == next_sentence
        expected = build("bert, next sentence" if next_sentence else "bert").forward(IDS)
        torch.testing.assert_close(loaded.forward(IDS), expected, atol=1e-5, rtol=0)


def test_layers_of_encoder_and_decoder_are_counted_apart():
    model = build("t5")

    assert model.select(["decoder.-1.hook_resid_post"]) == ("decoder.2.hook_resid_post",)
    assert model.select(["encoder.[0-1].hook_resid_post"])[-1] == "encoder.1.hook_resid_post"
    with pytest.raises(UnknownHookError, match="asks for layer 2, but this model has layers 0 to 1"):
        model.select(["encoder.2.hook_resid_post"])
    with pytest.raises(UnknownHookError, match=r"did you mean 'encoder.0.hook_resid_post'"):
        model.select(["encoder.0.hook_resid_pots"])

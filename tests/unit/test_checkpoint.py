"""Weights read from a model's files are those of the loaded model."""

from __future__ import annotations

import json

import pytest
import torch
from families import CONFIGS, build
from safetensors.torch import load_file, save_file
from support import MODELS

import actpipe
from actpipe import HookedModel, open_weights
from actpipe.errors import ModelLoadError, UnknownHookError, UnsupportedModelError


def differing(found, expected):
    """Return the names of those weights that are not equal to the bit, or not there on one side."""
    assert found.names() == expected.names()
    pairs = {name: (found[name], expected[name]) for name in expected.names()}
    return [name for name, (a, b) in pairs.items() if a.dtype != b.dtype or not torch.equal(a, b)]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_weight_is_that_of_the_loaded_model(name, tmp_path):
    model = build(name)
    model.native.save_pretrained(tmp_path)

    assert differing(open_weights(str(tmp_path)), model.weights) == []


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["gpt2", "gemma2", "gpt_oss", "xglm", "deepseek_v3"])
def test_a_type_asked_for_is_that_of_the_model_loaded_in_it(name, dtype, tmp_path):
    build(name).native.save_pretrained(tmp_path)
    loaded = HookedModel.from_pretrained(str(tmp_path), dtype=dtype, device="cpu")

    assert differing(open_weights(str(tmp_path), dtype=dtype), loaded.weights) == []


def test_a_model_kept_in_half_precision_stays_so(tmp_path):
    model = build("llama", torch.bfloat16)
    model.native.save_pretrained(tmp_path)

    weights = open_weights(str(tmp_path))
    assert weights.W_E.dtype == torch.bfloat16
    assert differing(weights, model.weights) == []


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "qwen3"])
def test_only_the_files_that_hold_a_weight_are_needed(name, tmp_path):
    model = build(name)
    model.native.save_pretrained(tmp_path, max_shard_size="20KB")
    weight_map = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert differing(open_weights(str(tmp_path)), model.weights) == []

    needed = next(file for key, file in weight_map.items() if key.endswith(("ln_f.weight", "model.norm.weight")))
    for file in set(weight_map.values()) - {needed}:
        (tmp_path / file).unlink()
    weights = open_weights(str(tmp_path))
    assert torch.equal(weights["ln_final.w"], model.weights["ln_final.w"])
    with pytest.raises(ModelLoadError, match=r"lacks model-0.*, which its index names"):
        weights.state_dict()


def test_keys_without_the_base_models_prefix_are_found(tmp_path):
    model = build("gpt2")
    model.native.transformer.save_pretrained(tmp_path)
    assert not any(key.startswith("transformer.") for key in load_file(tmp_path / "model.safetensors"))

    assert differing(open_weights(str(tmp_path)), model.weights) == []


def test_a_weight_kept_under_the_other_of_two_tied_names_is_found(tmp_path):
    model = build("gpt2")
    model.native.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("transformer.wte.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})

    assert differing(open_weights(str(tmp_path)), model.weights) == []


def test_a_name_of_the_hub_is_looked_up_in_the_cache(tmp_path, monkeypatch):
    model, snapshot = build("llama"), tmp_path / "models--someone--tiny/snapshots" / ("0" * 40)
    model.native.save_pretrained(snapshot)
    (tmp_path / "models--someone--tiny/refs").mkdir()
    (tmp_path / "models--someone--tiny/refs/main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    assert differing(open_weights("someone/tiny"), model.weights) == []


class TestRefusals:
    @pytest.fixture
    def folder(self, tmp_path):
        build("llama").native.save_pretrained(tmp_path)
        return tmp_path

    def change_config(self, folder, **changes):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    def change_tensor(self, folder, key, change):
        tensors = load_file(folder / "model.safetensors")
        changed = change(tensors.pop(key))
        tensors |= {} if changed is None else {key: changed}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    def test_a_model_kept_in_another_format(self, folder):
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        with pytest.raises(ModelLoadError, match=r"\(only pytorch_model\.bin\); load the model"):
            open_weights(str(folder))

    def test_a_quantised_model(self, folder):
        self.change_config(folder, quantization_config={"quant_method": "fp8"})
        with pytest.raises(UnsupportedModelError, match="quantised weights; load the model"):
            open_weights(str(folder))

    def test_a_quantised_tensor(self, folder):
        self.change_tensor(folder, "model.layers.0.mlp.up_proj.weight", lambda t: t.to(torch.int8))
        with pytest.raises(UnsupportedModelError, match=r"up_proj\.weight is stored quantised, as torch\.int8"):
            open_weights(str(folder))["blocks.0.mlp.W_in"]

    def test_a_missing_tensor(self, folder):
        self.change_tensor(folder, "model.layers.1.mlp.up_proj.weight", lambda _: None)
        weights = open_weights(str(folder))
        assert weights["blocks.0.mlp.W_in"].shape == (32, 48)
        with pytest.raises(ModelLoadError, match=r"no tensor for model\.layers\.1\.mlp\.up_proj\.weight"):
            weights["blocks.1.mlp.W_in"]

    def test_files_of_another_model(self, folder):
        self.change_config(folder, intermediate_size=64)
        with pytest.raises(ModelLoadError, match=r"shape \(48, 32\) in the files, but \(64, 32\) by the configuration"):
            open_weights(str(folder))["blocks.0.mlp.W_in"]

    def test_a_file_that_is_cut_off(self, folder):
        data = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
        with pytest.raises(ModelLoadError, match=r"cannot read .*model\.safetensors"):
            open_weights(str(folder))

    def test_an_unknown_name(self, folder):
        with pytest.raises(UnknownHookError, match=r"no weight 'blocks\.0\.attn\.W_X'"):
            open_weights(str(folder))["blocks.0.attn.W_X"]

    def test_an_unknown_type(self, folder):
        with pytest.raises(ModelLoadError, match="dtype 'fp16' is none of"):
            open_weights(str(folder), dtype="fp16")


def test_a_shipped_model_has_the_same_weights_by_both_ways():
    for folder in sorted(MODELS.iterdir()):
        if folder.is_dir():
            loaded = HookedModel.from_pretrained(str(folder), device="cpu")
            assert differing(actpipe.open_weights(str(folder)), loaded.weights) == [], folder.name

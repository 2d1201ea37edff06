"""What structure tells is so; what it cannot tell is left out, withheld or refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from qwen_stand_in import QwenConfig
from toys import ToyConfig
from transformers import AutoConfig

from actpipe.errors import UnsupportedModelError
from actpipe.models.families import entry_for
from actpipe.models.hooked_model import HookedModel
from actpipe.models.loading import ModelSource
from actpipe.models.recognition.recognising import prove, recognise
from actpipe.models.twins import WINDOW, build_twin, twin_ids

SUM = {"hook_attn_out", "hook_mlp_out", "hook_resid_mid"}
ATTENTION = {f"attn.hook_{name}" for name in ("q", "k", "v", "pattern", "z")}


def recognised(config):
    return HookedModel(build_twin(config), ModelSource(config.model_type), family=recognise(config))


def toy(*ways):
    return recognised(ToyConfig(ways=ways))


def kinds(model):
    return {point.kind for point in model.hook_points.values()}


def assert_true(model):
    """Compare every offered value of the blocks with what the model itself kept."""
    _, cache = model.run_with_cache(twin_ids())
    compared = set()
    for layer in range(model.shape.n_layers):
        for kind, expected in model.native.truth(layer).items():
            name = f"blocks.{layer}.{kind}"
            if name in cache:
                torch.testing.assert_close(cache[name], expected.view(cache[name].shape), rtol=1e-5, atol=1e-6)
                compared.add(kind)
    return compared


def test_a_plain_model_is_told_whole():
    model = toy()

    assert assert_true(model) == SUM | ATTENTION | {"mlp.hook_pre"}
    assert model.anatomy.family.withheld == {}


def test_blocks_that_add_what_no_module_puts_out_have_no_sum():
    model = toy("adds what no module puts out")

    assert assert_true(model) >= {"attn.hook_pattern", "attn.hook_z"}
    assert not kinds(model) & SUM


def test_one_block_that_adds_something_else_costs_all_blocks_their_sum():
    model = toy("adds so in one layer")

    assert assert_true(model) >= ATTENTION
    assert "hook_mlp_out" not in kinds(model)
    assert "resid_post = resid_pre + attn_out + mlp_out" in model.anatomy.family.withheld["hook_mlp_out"]


def test_blocks_that_scale_the_stream_have_attention_and_no_sum():
    model = toy("scales the stream")

    assert assert_true(model) >= ATTENTION
    assert not kinds(model) & SUM
    assert model.anatomy.family.withheld == {}


def test_what_is_added_after_the_mlp_is_not_taken_for_it():
    model = toy("adds after its MLP")

    assert assert_true(model) == SUM | ATTENTION | {"mlp.hook_pre", "side.hook_out"}
    assert model.shape.blocks[0].branches == ("hook_attn_out", "hook_mlp_out", "side.hook_out")


def test_of_more_than_three_branches_each_goes_by_the_path_of_its_module():
    model = toy("three MLPs")
    _, cache = model.run_with_cache(twin_ids())
    branches = [f"{path}.hook_out" for path in ("attention", "mlp", "more.0", "more.1")]
    total = sum(cache[f"blocks.1.{kind}"] for kind in branches)

    assert model.shape.blocks[1].branches == tuple(branches)
    assert assert_true(model) >= {*ATTENTION, "more.0.hook_out", "more.1.hook_out"}
    torch.testing.assert_close(cache["blocks.1.hook_resid_pre"] + total, cache["blocks.1.hook_resid_post"])


def test_sinks_of_one_layer_take_their_share_there():
    model = toy("sinks in one layer")
    _, cache = model.run_with_cache(twin_ids(), names=["blocks.*.attn.hook_pattern"])

    assert assert_true(model) == SUM | ATTENTION | {"mlp.hook_pre"}
    assert [bool(torch.allclose(p.sum(-1), torch.ones(1))) for p in cache.values()] == [True, False, True]


def test_with_a_gate_z_is_what_the_output_projection_multiplies():
    model = toy("gate")
    _, cache = model.run_with_cache(twin_ids(), names=["blocks.1.attn.hook_z", "blocks.1.attn.hook_z_ungated"])

    assert assert_true(model) == SUM | ATTENTION | {"mlp.hook_pre", "attn.hook_z_ungated"}
    assert not torch.allclose(*cache.values(), rtol=0.1)


def test_layers_of_several_sizes_are_told_apart():
    model = toy("wider in every layer")

    assert assert_true(model) == SUM | ATTENTION | {"mlp.hook_pre"}
    assert [block.d_mlp for block in model.shape.blocks] == [48, 56, 64]


def test_key_heads_that_only_one_layer_has_are_all_there():
    model = toy("more key heads in one layer")

    assert assert_true(model) == SUM | ATTENTION | {"mlp.hook_pre"}
    assert [block.n_kv_heads for block in model.shape.blocks] == [2, 4, 2]


def test_a_window_of_one_layer_is_in_its_pattern():
    model = toy("window in one layer")
    _, cache = model.run_with_cache(twin_ids(), names=["blocks.*.attn.hook_pattern"])
    seen = [int((pattern > 0).sum(-1).max()) for pattern in cache.values()]

    assert assert_true(model) == SUM | ATTENTION | {"mlp.hook_pre"}
    assert seen == [twin_ids().shape[1], WINDOW, twin_ids().shape[1]]


@pytest.mark.parametrize(
    ("way", "reason"),
    [
        ("one block for all", "no list of blocks of which each takes what the one before it gives"),
        ("passes a tensor", "ToyAttention passes indices to its attention function"),
        ("looks ahead", "'a row does not depend on its batch or padding' is off"),
    ],
)
def test_what_cannot_be_told_is_refused_with_the_reason(way, reason):
    with pytest.raises(UnsupportedModelError, match=f"'toy'.*{reason}"):
        recognise(ToyConfig(ways=(way,)))


# Each of these does something else under the name of an attention function that it does not know, without an error.
@pytest.mark.parametrize("model_type", ["deepseek_v32", "glm_moe_dsa"])
def test_sparse_masks_are_in_the_pattern(model_type):
    model = recognised(AutoConfig.for_model(model_type, num_hidden_layers=2, first_k_dense_replace=1))
    logits, cache = model.run_with_cache(twin_ids(), names=["blocks.*.attn.hook_pattern"])

    assert torch.equal(logits, model.native(twin_ids()).logits)
    assert {int((pattern > 0).sum(-1).max()) for pattern in cache.values()} == {WINDOW}


def test_the_layout_of_the_first_qwen_is_told_whole():
    model = recognised(QwenConfig())
    family = model.anatomy.family

    assert family.withheld == {}
    assert kinds(model) >= SUM | ATTENTION | {"attn.hook_rot_q", "mlp.hook_pre", "mlp.hook_pre_linear", "mlp.hook_post"}
    assert (family.v.module, family.v.layout, family.out) == ("attn.c_attn", "columns", "attn.c_proj")
    assert (family.w_gate.module, family.w_in.module) == ("mlp.w2", "mlp.w1")
    assert (family.blocks, family.embed, family.final_norm) == ("h", "wte", "ln_f")


@pytest.mark.parametrize(("model_type", "wrong"), [("deepseek_v3", "softmax"), ("qwen3_moe", "sigmoid")])
def test_a_router_that_is_read_the_wrong_way_loses_its_weights(model_type, wrong):
    config = AutoConfig.for_model(model_type, num_hidden_layers=2, first_k_dense_replace=1)
    family = prove(replace(entry_for(config), router_scores=wrong), build_twin(config), twin_ids())

    assert set(family.withheld) == {"mlp.hook_expert_weights", "mlp.hook_expert_indices"}


TOLD = ["gpt2", "llama", "gpt_neox", "gemma2", "olmo", "olmo2", "bloom", "mixtral", "cohere", "falcon", "granite"]
TOLD += ["deepseek_v3", "gpt_oss"]
LESS = {"bloom": {"attn.hook_attn_scores"}}
"""Structure does not know ALiBi's slopes."""


@pytest.mark.parametrize("model_type", TOLD)
def test_structure_tells_what_the_entry_says(model_type):
    config = AutoConfig.for_model(model_type, num_hidden_layers=2)
    twin, source = build_twin(config), ModelSource(model_type)
    by_entry = HookedModel(twin, source, family=entry_for(config))
    by_structure = HookedModel(twin, source, family=recognise(config))
    assert kinds(by_entry) - kinds(by_structure) == LESS.get(model_type, set())
    names = [name for name in by_entry.hook_points if name in by_structure.hook_points]
    (_, wanted), (_, found) = (model.run_with_cache(twin_ids(), names=names) for model in (by_entry, by_structure))

    for name in names:
        size = wanted[name].float().abs().nan_to_num(posinf=0).max()
        torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=1e-5 * float(size), msg=name)

"""Running a hooked model: hook functions, gradients, start and stop layers, texts, losses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import build
from support import MODELS

from actpipe import HookedModel
from actpipe.errors import UnsupportedModelError
from actpipe.models.identities import probe_ids

FAMILIES = ["gpt2", "llama", "gemma2", "gptj", "bloom", "falcon, alibi", "mixtral", "olmo2", "opt", "granite"]
READ_ONLY = ("input", "attn_in", "expert", "router", "_norm.", "tokens")


def editable(model):
    return [name for name in model.hook_points if not any(word in name for word in READ_ONLY)]


@pytest.mark.parametrize("family", FAMILIES)
def test_putting_back_what_was_read_changes_nothing(family):
    model = build(family)
    ids = probe_ids(model)
    bare, cache = model.run_with_cache(ids, names=list(model.hook_points))
    refused = []
    for name in editable(model):
        seen = {}

        def look(tensor, point, seen=seen):
            seen[point.name] = tensor.clone()
            return tensor.clone()

        try:
            logits = model.run_with_hooks(ids, fwd_hooks=[(name, look)])
        except UnsupportedModelError:
            refused.append(model.hook_points[name].kind)
            continue
        torch.testing.assert_close(seen[name], cache[name], atol=1e-5, rtol=1e-4, msg=name)
        torch.testing.assert_close(logits, bare, atol=1e-5, rtol=1e-4, msg=name)
    assert torch.equal(model.forward(ids), bare)
    own_code = {"attn.hook_attn_scores", "attn.hook_rot_q", "attn.hook_rot_k", "hook_mlp_in"}
    assert set(refused) <= (own_code if family in ("gptj", "bloom", "falcon, alibi") else set())


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_hook_returns_goes_on_in_its_place(family):
    model = build(family)
    ids = probe_ids(model)
    bare = model.forward(ids)
    layer = 0
    for kind in (
        "hook_resid_pre",
        "attn.hook_z",
        "attn.hook_pattern",
        "hook_attn_out",
        "hook_mlp_out",
        "mlp.hook_post",
    ):
        name = f"blocks.{layer}.{kind}"
        if name not in model.hook_points:
            continue
        changed = model.run_with_hooks(ids, fwd_hooks=[(name, lambda tensor, _: tensor.roll(1, 1))])
        assert (changed - bare).abs().max() > 1e-3, name


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "granite"])
def test_later_activations_follow_from_the_replaced_one(family):
    model = build(family)
    ids = probe_ids(model)
    new = torch.randn(2, ids.shape[1], model.shape.d_model, generator=torch.Generator().manual_seed(1))
    with model.hooks(fwd_hooks=[(("resid_mid", 0), lambda *_: new)]):
        _, cache = model.run_with_cache(ids)
    torch.testing.assert_close(cache["blocks.0.hook_resid_mid"], new, atol=1e-5, rtol=1e-5)
    after = new + cache["blocks.0.hook_mlp_out"]
    torch.testing.assert_close(cache["blocks.0.hook_resid_post"], after, atol=1e-5, rtol=1e-5)


def test_ablating_a_head_takes_away_what_it_writes():
    model = build("gpt2")
    ids = probe_ids(model)
    _, cache = model.run_with_cache(ids, names=["blocks.0.attn.hook_result", "blocks.0.hook_attn_out"])

    def ablate(z, _):
        z[:, :, 2] = 0
        return z

    with model.hooks(fwd_hooks=[("z0", ablate)]):
        _, ablated = model.run_with_cache(ids, names=["blocks.0.hook_attn_out"])
    expected = cache["blocks.0.hook_attn_out"] - cache["blocks.0.attn.hook_result"][:, :, 2]
    torch.testing.assert_close(ablated["blocks.0.hook_attn_out"], expected, atol=1e-5, rtol=1e-5)


def test_a_pattern_can_be_replaced():
    model = build("llama")
    ids = probe_ids(model)
    uniform = torch.ones(2, 4, ids.shape[1], ids.shape[1]).tril()
    uniform = uniform / uniform.sum(-1, keepdim=True)
    with model.hooks(fwd_hooks=[("pattern1", lambda *_: uniform)]):
        _, cache = model.run_with_cache(ids, names=["z1", "v1"])
    v = cache["blocks.1.attn.hook_v"].repeat_interleave(4 // cache["blocks.1.attn.hook_v"].shape[2], dim=2)
    expected = torch.einsum("bhqk,bkhd->bqhd", uniform, v)
    torch.testing.assert_close(cache["blocks.1.attn.hook_z"], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "opt"])
def test_gradients_are_those_of_finite_differences(family):
    model = build(family, torch.float64)
    ids = probe_ids(model)
    gradients = {}

    def keep(gradient, point):
        gradients[point.name] = gradient.clone()

    names = ["hook_embed", "blocks.0.hook_resid_mid", "blocks.0.attn.hook_z", "blocks.1.attn.hook_pattern"]
    loss = model.run_with_hooks(ids, return_type="loss", bwd_hooks=[(name, keep) for name in names])
    loss.backward()
    for name in names:
        if name == "blocks.1.attn.hook_pattern":
            assert gradients[name].abs().max() > 0
            continue
        direction = torch.randn(gradients[name].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        step = direction * (1e-6 if family == "opt" else 1e-4)
        ends = [
            model.run_with_hooks(ids, return_type="loss", fwd_hooks=[(name, lambda t, _, s=s: t + s)])
            for s in (step, -step)
        ]
        slope = (ends[0] - ends[1]) / (step / direction).mean() / 2
        torch.testing.assert_close((gradients[name] * direction).sum(), slope, atol=1e-6, rtol=1e-3)


def test_a_backward_hook_may_replace_the_gradient():
    model = build("gpt2")
    seen = []
    loss = model.run_with_hooks(
        probe_ids(model),
        return_type="loss",
        bwd_hooks=[
            (("resid_post", 1), lambda gradient, _: torch.zeros_like(gradient)),
            (("resid_pre", 0), lambda gradient, _: seen.append(gradient)),
        ],
    )
    loss.backward()
    assert not seen[0].any()


def test_what_cannot_be_replaced_is_refused_with_the_way_out():
    model = build("llama")
    with pytest.raises(UnsupportedModelError, match=r"hook_q_input.*not replaced; hook_resid_pre changes"):
        model.run_with_hooks(probe_ids(model), fwd_hooks=[("blocks.0.hook_q_input", lambda t, _: t)])
    with pytest.raises(ValueError, match=r"returned shape \(1,\) in the place of"):
        model.run_with_hooks(probe_ids(model), fwd_hooks=[("hook_embed", lambda *_: torch.zeros(1))])
    processed = HookedModel(build("gpt2").native, build("gpt2").source, "processed")
    with pytest.raises(UnsupportedModelError, match="read and not written"):
        processed.run_with_hooks(probe_ids(processed), fwd_hooks=[("hook_embed", lambda t, _: t)])


@pytest.mark.parametrize("family", [*FAMILIES, "gpt_neox", "phi3", "deepseek_v3"])
def test_starting_and_stopping_at_a_layer_is_the_whole_pass_in_two_halves(family):
    model = build(family)
    ids = probe_ids(model)
    bare, cache = model.run_with_cache(ids)
    for layer in range(model.shape.n_layers):
        stream = model.forward(ids, stop_at_layer=layer)
        assert torch.equal(stream, cache[f"blocks.{layer}.hook_resid_pre"])
        torch.testing.assert_close(model.forward(stream, start_at_layer=layer), bare, atol=1e-6, rtol=1e-5)
    assert torch.equal(model.forward(ids, stop_at_layer=model.shape.n_layers), cache[f"blocks.{layer}.hook_resid_post"])
    assert torch.equal(
        model.forward(stream, start_at_layer=-1, tokens=ids, return_type="loss"), model(ids, return_type="loss")
    )
    assert torch.equal(model.forward(ids), bare)


def test_a_cache_up_to_a_layer():
    model = build("gpt2")
    ids = probe_ids(model)
    stream, cache = model.run_with_cache(ids, stop_at_layer=1)
    assert "blocks.0.hook_resid_post" in cache
    assert "hook_pos_embed" in cache
    assert not [name for name in cache if name.startswith(("blocks.1", "ln_final"))]
    assert torch.equal(stream, cache["blocks.0.hook_resid_post"])
    with pytest.raises(ValueError, match=r"ln_final\.hook_scale is not reached before layer 1"):
        model.run_with_cache(ids, names=["ln_final.hook_scale"], stop_at_layer=1)
    with pytest.raises(ValueError, match="layers 0 to 1"):
        model.forward(ids, stop_at_layer=7)
    with pytest.raises(ValueError, match=r"takes a residual stream \(batch, position, 32\)"):
        model.forward(ids, start_at_layer=1)


def test_names_filters_of_transformerlens():
    model = build("gpt2")
    ids = probe_ids(model)[:1]
    by_name = model.run_with_cache(ids, names_filter="blocks.0.attn.hook_z", remove_batch_dim=True)[1]
    by_function = model.run_with_cache(ids, names_filter=lambda name: name.endswith("hook_z"))[1]
    assert list(by_function) == ["blocks.0.attn.hook_z", "blocks.1.attn.hook_z"]
    assert torch.equal(by_name["blocks.0.attn.hook_z"], by_function["blocks.0.attn.hook_z"][0])
    with pytest.raises(ValueError, match="batch of one"):
        model.run_with_cache(probe_ids(model), remove_batch_dim=True)


class TestTexts:
    @pytest.fixture(scope="class")
    @classmethod
    def model(cls):
        return HookedModel.from_pretrained(str(MODELS / "gpt2"), device="cpu", dtype="float32")

    def test_tokens_and_back(self, model):
        ids = model.to_tokens("t5 t6 t7", prepend_bos=True)
        assert ids.shape[0] == 1
        assert int(ids[0, 0]) == (
            model.tokenizer.bos_token_id if model.tokenizer.bos_token_id is not None else model.tokenizer.eos_token_id
        )
        assert model.to_string(ids[0, 1:]) == "t5 t6 t7"
        assert model.to_str_tokens("t5 t6 t7", prepend_bos=False) == ["t5", "t6", "t7"]
        assert model.to_str_tokens(ids)[1:] == model.to_str_tokens("t5 t6 t7", prepend_bos=False)
        assert model.to_string(ids) == [model.to_string(ids[0])]

    def test_padding(self, model):
        texts = ["t5 t6 t7 t8 t9", "t5"]
        right, left = model.to_tokens(texts, padding_side="right"), model.to_tokens(texts, padding_side="left")
        assert right.shape == left.shape
        short = model.to_tokens("t5")
        assert torch.equal(right[1, : short.shape[1]], short[0])
        assert torch.equal(left[1, -short.shape[1] :], short[0])
        for side in ("left", "right"):
            logits = model(texts, padding_side=side)
            alone = model("t5")
            place = slice(-short.shape[1], None) if side == "left" else slice(0, short.shape[1])
            torch.testing.assert_close(logits[1, place], alone[0], atol=1e-4, rtol=1e-4)

    def test_single_tokens(self, model):
        token = model.to_single_token(model.to_single_str_token(5))
        assert token == 5
        with pytest.raises(ValueError, match="is not a single token but"):
            model.to_single_token("t5 t6 t7 t8 t9")
        ids = torch.tensor([3, 5, 4, 5])
        assert model.get_token_position(5, ids) == 1
        assert model.get_token_position(5, ids, mode="last") == 3
        with pytest.raises(ValueError, match="does not occur"):
            model.get_token_position(9, ids)

    def test_too_long_a_text_is_cut_with_a_warning(self, model):
        with pytest.warns(UserWarning, match="are cut to"):
            assert model.to_tokens("t5 t6 " * 2000).shape[1] == model.shape.n_ctx

    def test_loss_per_token_and_mean(self, model):
        ids = model.to_tokens("t5 t6 t7 t8 t9")
        logits, loss = model(ids, return_type="both")
        per_token = model(ids, return_type="loss", loss_per_token=True)
        expected = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none")
        torch.testing.assert_close(per_token[0], expected)
        torch.testing.assert_close(loss, expected.mean())
        padded = model(["t5 t6 t7 t8 t9", "t5 t6"], return_type="loss", loss_per_token=True)
        assert np.count_nonzero(padded[1].numpy()) == model.to_tokens("t5 t6").shape[1] - 1

    def test_ranks_of_an_answer(self, model, capsys):
        ranks = model.test_prompt("t5 t6 t7 t8", "t9", top_k=3)
        logits = model("t5 t6 t7 t8")[0, -1]
        token = model.to_tokens(" t9", prepend_bos=False)[0, 0]
        assert ranks[0][1] == int((logits > logits[token]).sum())
        assert "probability" in capsys.readouterr().out

"""Keys and values kept: activations in pieces equal those of one pass, and prompts go on as without."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import CONFIGS, build
from support import INDUCTION
from transformers import DynamicCache

from actpipe import HookedModel
from actpipe.compute.sampling import Sampling
from actpipe.errors import UnsupportedModelError
from actpipe.models.cache_proof import prove_cache
from actpipe.models.caching import KeyValueCache
from actpipe.models.generation import Continuation

ENCODERS = ("bert", "roberta", "camembert", "t5", "mt5", "bart")
DECODERS = [name for name in CONFIGS if not any(word in name for word in ENCODERS)]
POSITIONS = [
    "gpt2",
    "opt",
    "llama",
    "mistral",
    "gemma2",
    "gpt_neo",
    "gptj",
    "bloom",
    "falcon, alibi",
    "mpt",
    "deepseek_v3",
]
"""Learned, rotary and ALiBi; windows; attention through the interface and code of the models' own."""
LENGTHS = (9, 1, 6)


@pytest.fixture(scope="module")
def induction():
    return HookedModel.from_pretrained(str(INDUCTION), dtype="float32", device="cpu")


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in DECODERS])
def test_models_that_see_what_follows_have_no_cache(name):
    with pytest.raises(UnsupportedModelError, match="no keys and values to keep"):
        build(name).new_kv_cache()


@pytest.mark.parametrize("name", DECODERS)
def test_every_hook_is_the_same_in_pieces(name):
    model = build(name)
    prove_cache(model, [name for name, point in model.hook_points.items() if not point.on_request])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", POSITIONS)
def test_padded_batches_are_the_same_in_pieces(family, side):
    model = build(family)
    torch.manual_seed(1)
    ids, mask = torch.randint(2, 199, (3, sum(LENGTHS))), torch.ones(3, sum(LENGTHS), dtype=torch.long)
    for row, length in enumerate((16, 11, 4)):
        mask[row, : 16 - length] = side == "right"
        mask[row, length:] = side == "left" and mask[row, length:]
    names = model.select(["*"])
    logits, whole = model.run_with_cache(ids, mask, names=names)

    cache = model.new_kv_cache()
    pieces = [
        model.run_with_cache(ids[:, columns], mask[:, columns], names=names, past_kv_cache=cache)
        for columns in torch.arange(sum(LENGTHS)).split(LENGTHS)
    ]

    real = mask.bool()
    found = torch.cat([piece[0] for piece in pieces], dim=1)
    torch.testing.assert_close(found[real], logits[real], atol=1e-4, rtol=1e-4)
    for name in names:
        if model.hook_points[name].looks_at_keys:  # their rows are compared where all keys are there
            found, expected = pieces[-1][1][name].transpose(1, 2), whole[name][:, :, -LENGTHS[-1] :].transpose(1, 2)
            torch.testing.assert_close(found[real[:, -6:]], expected[real[:, -6:]], atol=1e-4, rtol=1e-4, msg=name)
        else:
            found = torch.cat([piece[1][name] for piece in pieces], dim=1)
            torch.testing.assert_close(found[real], whole[name][real], atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize("name", ["gpt2", "llama", "bloom", "mistral"])
def test_what_is_held_can_stand_before_a_batch(name):
    model = build(name)
    torch.manual_seed(1)
    start, rest = torch.randint(2, 199, (1, 9)), torch.randint(2, 199, (4, 5))
    cache = model.new_kv_cache()
    model.forward(start, past_kv_cache=cache)

    for _ in range(2):  # what is held is not used up
        found = model.forward(rest, past_kv_cache=cache.repeated(4))
        expected = model.forward(torch.cat([start.expand(4, -1), rest], dim=1))[:, 9:]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_pass_that_stops_early_still_leaves_what_the_next_one_needs():
    model = build("llama")
    ids = torch.randint(2, 199, (2, 12))
    for names in (["blocks.0.attn.hook_q"], ["hook_embed"], ["blocks.0.hook_resid_mid"]):
        caught = {name: [] for name in names}
        cache = model.new_kv_cache()
        with model.capture(names, lambda n, t, caught=caught: caught[n].append(t.clone()), stop=True) as capture:
            for piece in ids.split(5, dim=1):
                capture.run(**cache.extend({"input_ids": piece}))
        expected = model.run_with_cache(ids, names=names)[1]
        for name in names:
            torch.testing.assert_close(torch.cat(caught[name], dim=1), expected[name])


def test_a_model_that_loses_what_it_was_given_is_refused(monkeypatch):
    model = build("gpt2")
    prove_cache(model)
    monkeypatch.setattr(DynamicCache, "update", lambda self, keys, values, *_args, **_kwargs: (keys, values))
    with pytest.raises(UnsupportedModelError, match="not the same with a cache"):
        prove_cache(model)
    with pytest.raises(UnsupportedModelError, match="not the same with a cache"):
        build("gpt2").generate(np.array([[1, 2, 3]]), verbose=False, stop_at_eos=False)


def test_the_context_bounds_what_is_held_too():
    model = build("gpt2")
    cache = model.new_kv_cache()
    model.forward(torch.zeros(1, 60, dtype=torch.long), past_kv_cache=cache)
    with pytest.raises(ValueError, match="60 positions are held and 5 follow, but this model has learned only 64"):
        model.forward(torch.zeros(1, 5, dtype=torch.long), past_kv_cache=cache)


@pytest.mark.parametrize(
    "name", ["gpt2", "llama", "gemma2", "bloom", "gptj", "mistral", "mpt", "opt", "granite", "cohere"]
)
def test_greedy_continuations_are_those_of_transformers(name):
    model = build(name)
    ids = torch.randint(2, 199, (2, 7), generator=torch.Generator().manual_seed(3))
    expected = model.native.generate(
        ids, max_new_tokens=9, do_sample=False, eos_token_id=None, pad_token_id=1, attention_mask=torch.ones_like(ids)
    )
    for cached in (True, False):
        found = model.generate(
            ids, max_new_tokens=9, do_sample=False, stop_at_eos=False, use_past_kv_cache=cached, verbose=False
        )
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", POSITIONS)
def test_a_prompt_goes_on_the_same_alone_and_beside_longer_ones(name):
    model = build(name)
    generator = np.random.default_rng(0)
    prompts = [generator.integers(2, 199, length) for length in (3, 9, 6)]
    how = Continuation(max_new_tokens=8, sampling=Sampling(temperature=1.5, top_k=50, top_p=0.9), seed=5)
    together = model.continue_prompts(prompts, how)
    for number, prompt in enumerate(prompts):
        (alone,) = model.continue_prompts([prompt], how, numbers=[number])
        assert alone.tolist() == together[number].tolist()
    assert len({tuple(ids) for ids in together}) == 3


def test_a_sequence_ends_with_what_stops_it(induction):
    prompts = [np.array([0, 50, 47]), np.array([0, 41])]
    free = induction.continue_prompts(prompts, Continuation(12, Sampling(0.0)))
    stop = int(free[0][4])
    how = Continuation(12, Sampling(0.0), stop_ids=(stop,))
    first, second = induction.continue_prompts(prompts, how)
    assert first.tolist() == free[0][: free[0].tolist().index(stop) + 1].tolist()
    assert second.tolist() == free[1][: [*free[1].tolist(), stop].index(stop) + 1].tolist()


def test_texts_come_back_as_texts_and_ids_as_ids(induction):
    text = induction.generate("ROMEO: what", max_new_tokens=5, seed=1, verbose=False)
    assert text.startswith("ROMEO: what")
    assert text == induction.generate("ROMEO: what", max_new_tokens=5, seed=1, verbose=False)
    assert text != induction.generate("ROMEO: what", max_new_tokens=5, seed=2, verbose=False)
    texts = induction.generate(["ROMEO: what", "I am"], max_new_tokens=5, seed=1, verbose=False)
    assert texts[0] == text
    ids = induction.generate(["ROMEO: what", "I am"], max_new_tokens=5, seed=1, verbose=False, return_type="tokens")
    assert (
        induction.generate("ROMEO: what", max_new_tokens=5, seed=1, verbose=False, return_type="tokens").shape[0] == 1
    )
    assert induction.tokenizer.batch_decode(ids, skip_special_tokens=True) == texts


def test_padding_on_either_side_is_left_out(induction):
    ids = torch.tensor([[50, 47, 45, 37], [41, 35, 7, 7]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    right = induction.generate(ids, 6, do_sample=False, verbose=False, attention_mask=mask)
    left = induction.generate(
        torch.tensor([[50, 47, 45, 37], [7, 7, 41, 35]]),
        6,
        do_sample=False,
        verbose=False,
        attention_mask=torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]]),
    )
    alone = induction.generate(torch.tensor([[41, 35]]), 6, do_sample=False, verbose=False)
    assert torch.equal(right, left)
    assert right[1, 2:].tolist() == alone[0].tolist()


def test_hook_functions_stay_on_while_a_prompt_goes_on(induction):
    plain = induction.generate("ROMEO: what", 8, do_sample=False, verbose=False)
    with induction.hooks([("blocks.1.hook_resid_post", lambda tensor, _: torch.zeros_like(tensor))]):
        assert induction.generate("ROMEO: what", 8, do_sample=False, verbose=False) != plain
    assert induction.generate("ROMEO: what", 8, do_sample=False, verbose=False) == plain


def test_what_cannot_go_on_is_refused(induction):
    with pytest.raises(UnsupportedModelError, match="does not continue a prompt"):
        build("bert").generate(np.array([[1, 2, 3]]), stop_at_eos=False)
    with pytest.raises(ValueError, match="do not fit the 64 positions"):
        build("gpt2").generate(np.array([[1, 2, 3]]), max_new_tokens=62, stop_at_eos=False)
    with pytest.raises(ValueError, match="a prompt is empty"):
        induction.continue_prompts([np.array([], dtype=int)], Continuation(3, Sampling(0.0)))
    cache = KeyValueCache(induction.anatomy)
    induction.forward([[0, 1], [0, 1]], [[0, 1], [1, 1]], past_kv_cache=cache)
    with pytest.raises(ValueError, match="cannot follow a batch of 2"):
        induction.forward([[0, 1]], past_kv_cache=cache)

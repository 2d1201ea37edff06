"""Tokens are drawn by their probabilities, from those that are allowed, by numbers that nothing else changes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actpipe.compute.sampling import Sampling, choose_tokens, draws

LOGITS = st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=12)
UNIFORM = st.floats(0, 1, exclude_max=True, width=32)


@given(LOGITS, UNIFORM)
def test_temperature_zero_takes_the_largest(logits, uniform):
    chosen = choose_tokens(torch.tensor([logits]), torch.tensor([uniform]), Sampling(temperature=0.0))
    assert logits[int(chosen)] == max(logits)


@given(LOGITS, UNIFORM, st.integers(1, 14))
def test_top_k_draws_among_the_k_largest(logits, uniform, top_k):
    chosen = int(choose_tokens(torch.tensor([logits]), torch.tensor([uniform]), Sampling(top_k=top_k)))
    assert sum(value > logits[chosen] for value in logits) < top_k


@given(LOGITS, UNIFORM, st.floats(0.05, 1))
def test_top_p_draws_among_the_fewest_that_pass_p(logits, uniform, top_p):
    chosen = int(choose_tokens(torch.tensor([logits]), torch.tensor([uniform]), Sampling(top_p=top_p)))
    probabilities = torch.tensor(logits, dtype=torch.float64).softmax(-1)
    assert float(probabilities[probabilities > probabilities[chosen]].sum()) <= top_p + 1e-6


def test_each_token_is_drawn_as_often_as_it_is_probable():
    logits = torch.tensor([2.0, 0.0, 1.0, -1.0])
    uniform = (torch.arange(10_000) + 0.5) / 10_000
    chosen = choose_tokens(logits.expand(10_000, -1), uniform, Sampling(temperature=0.7))
    shares = torch.bincount(chosen, minlength=4) / 10_000
    torch.testing.assert_close(shares, (logits / 0.7).softmax(-1), atol=2e-4, rtol=0)


def test_the_frequency_penalty_counts_what_stands_before():
    logits = torch.tensor([[1.0, 0.9, 0.0]])
    how = Sampling(temperature=1.0, top_k=1, freq_penalty=0.2)
    assert int(choose_tokens(logits, torch.zeros(1), how, torch.tensor([[0.0, 0.0, 0.0]]))) == 0
    assert int(choose_tokens(logits, torch.zeros(1), how, torch.tensor([[1.0, 0.0, 0.0]]))) == 1


@given(st.integers(0, 2**63), st.lists(st.integers(0, 2**40), min_size=2, max_size=5, unique=True), st.integers(0, 999))
def test_draws_depend_on_seed_sequence_and_step_alone(seed, sequences, step):
    together = draws(seed, sequences, step)
    assert together.tolist() == [float(draws(seed, [sequence], step)) for sequence in sequences]
    assert len({*together.tolist(), *draws(seed, sequences, step + 1).tolist()}) == 2 * len(sequences)
    assert bool(((together >= 0) & (together < 1)).all())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**wrong)

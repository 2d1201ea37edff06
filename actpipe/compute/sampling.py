"""Choose the next token from logits; the same choice on every machine and in every batch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen.

    Source:
        TransformerLens 2.16, `utils.sample_logits`; unlike there, `top_k` and `top_p` may be combined.
    """

    temperature: float = 1.0
    """What logits are divided by; 0 takes the largest."""
    top_k: int | None = None
    """Choose among so many tokens only."""
    top_p: float | None = None
    """Choose among the fewest tokens whose probabilities sum to more than this."""
    freq_penalty: float = 0.0
    """What a token loses in scaled logits for each time that it stands before."""

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature ({self.temperature}) must be 0 or more")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k ({self.top_k}) must be 1 or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p ({self.top_p}) must be above 0 and at most 1")


def choose_tokens(
    logits: torch.Tensor, uniform: torch.Tensor, sampling: Sampling, counts: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the chosen ids, `(batch,)`.

    The most probable tokens come first, and the one is taken at which their summed probability passes `uniform`.

    Args:
        logits: `(batch, d_vocab)`.
        uniform: `(batch,)` numbers from [0, 1), one draw for each row.
        sampling: How to choose.
        counts: `(batch, d_vocab)`, how often each token stands before; for the frequency penalty.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    scaled = logits.float() / sampling.temperature
    if counts is not None:
        scaled = scaled - sampling.freq_penalty * counts
    ordered, ids = scaled.sort(descending=True, stable=True)
    if sampling.top_k is not None:
        ordered, ids = ordered[:, : sampling.top_k], ids[:, : sampling.top_k]
    probabilities = ordered.softmax(-1)
    summed = probabilities.cumsum(-1)
    kept = torch.full(summed.shape[:1], summed.shape[1], device=summed.device)
    if sampling.top_p is not None:
        kept = (summed - probabilities <= sampling.top_p).sum(-1)
    reached = summed.gather(-1, kept.unsqueeze(-1) - 1)
    chosen = torch.searchsorted(summed, uniform.to(summed).unsqueeze(-1) * reached, right=True)
    chosen = torch.minimum(chosen, kept.unsqueeze(-1) - 1)
    return ids.gather(-1, chosen).squeeze(-1)


def draws(seed: int, sequences: Iterable[int], step: int) -> torch.Tensor:
    """Return a number from [0, 1) for each sequence at one step, which no other sequence or step changes.

    Source:
        Philox 4x64, a generator that counts: seed as its key, step and sequence as its counter.
    """
    numbers = [
        np.random.Generator(np.random.Philox(key=seed, counter=[0, step, sequence, 0])).random()
        for sequence in sequences
    ]
    return torch.tensor(numbers, dtype=torch.float64)

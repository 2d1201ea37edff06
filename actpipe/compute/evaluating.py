"""What a model's answers to tasks add up to."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

FIRST_ID, STOP_ID = 100, 20_000
"""Ids that TransformerLens draws from."""


def repeated_ids(
    *, n_sequences: int, length: int, first_id: int, stop_id: int, bos_id: int | None, seed: int
) -> Int[np.ndarray, "sequence position"]:
    """Draw random tokens and repeat them once.

    BOS, where there is one, stands in the place of the first token of the first copy only: the first token of the
    second copy is then new to the model, which is one reason why `second_copy` leaves it out.

    Args:
        n_sequences: Sequences to make.
        length: Tokens of one copy.
        first_id: Lowest id.
        stop_id: One past the highest.
        bos_id: What to begin with; None begins with a random token.
        seed: Seed of numpy's PCG64 generator.

    Source:
        TransformerLens 2.16, `evals.induction_loss`, whose draws are seeded by torch and so not these.
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    ids = np.tile(generator.integers(first_id, stop_id, (n_sequences, length)), 2)
    if bos_id is not None:
        ids[:, 0] = bos_id
    return ids


def second_copy(
    per_token: Float[np.ndarray, "sequence predicted"], length: int
) -> Float[np.ndarray, "sequence repeated"]:
    """Return what a per-token measure is on the second copy, its first two tokens left out.

    Column `t` is of the prediction of token `t + 1`. The first token of the second copy cannot be known to repeat,
    and the second is the first that can: 2.16 starts after it, at column `length + 1`, and so does this.

    Args:
        per_token: Losses (nats) or the like of tokens 1 to `2 * length - 1`.
        length: Tokens of one copy.

    Source:
        TransformerLens 2.16, `evals.induction_loss`: `[:, subseq_len + 1:]`.
    """
    if per_token.shape[1] != 2 * length - 1:
        raise ValueError(f"two copies of {length} tokens have {2 * length - 1} predictions, not {per_token.shape[1]}")
    return per_token[:, length + 1 :]


def first_difference(right: list[int], wrong: list[int]) -> int:
    """Return the first place at which two lists of ids differ.

    Raises:
        ValueError: One is the beginning of the other.
    """
    for place, (one, other) in enumerate(zip(right, wrong, strict=False)):
        if one != other:
            return place
    raise ValueError("one list of ids is the beginning of the other")

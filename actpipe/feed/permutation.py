"""Random permutations that need no memory: where each index goes is computed."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

_ROUNDS = 8
_LEAST_SIDE = 8
Indices = npt.NDArray[np.int64]


class Permutation:
    """A pseudo-random permutation of `range(n)`, given by its key.

    A Feistel network over pairs (left, right) of numbers below the root of `n`, each round adding a hash of
    one half to the other; the few pairs at or beyond `n` walk on until they come back below it. Memory does
    not grow with `n`, and a key gives the same permutation in every version of numpy.

    Args:
        n: How many indices there are.
        key: Numbers from 0 on that choose the permutation.

    Source:
        Black and Rogaway (2002), "Ciphers with Arbitrary Finite Domains": generalised Feistel, cycle walking.
        Steele, Lea and Flood (2014), "Fast Splittable Pseudorandom Number Generators": the hash's mixing.
    """

    def __init__(self, n: int, *key: int) -> None:
        self._n = n
        self._side = np.uint64(max(_LEAST_SIDE, math.isqrt(max(n, 1) - 1) + 1))
        self._round_keys = np.random.SeedSequence(key).generate_state(_ROUNDS, np.uint64)

    def __call__(self, indices: Indices) -> Indices:
        """Return where each index goes."""
        result = self._walk(indices.astype(np.uint64))
        while len(beyond := np.flatnonzero(result >= self._n)):
            result[beyond] = self._walk(result[beyond])
        return result.astype(np.int64)

    def _walk(self, indices: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        left = indices // self._side
        right = indices - left * self._side
        for key in self._round_keys:
            left, right = right, self._below_side(left + _mix(right + key))
        return left * self._side + right

    def _below_side(self, values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        """Return the remainders; numpy divides many numbers by one much faster than it takes remainders."""
        values -= values // self._side * self._side
        return values


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Hash 64-bit numbers to 32 bits, so that sums with them do not wrap around."""
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(32)
    values *= np.uint64(0x94D049BB133111EB)
    values >>= np.uint64(32)
    return values

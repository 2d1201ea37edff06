"""Head scores over a whole store."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from actpipe.compute.heads import HeadScoreSums, detection_pattern, score_heads
from actpipe.jobs.blocks import Done, RowBlock, map_and_sum, require_arrays
from actpipe.records import Sequence
from actpipe.stores.reading import ActivationStore


@dataclass(frozen=True)
class _AllScores:
    """Sums of every pattern and layer; they add up."""

    sums: dict[tuple[str, int], HeadScoreSums]

    def __add__(self, other: _AllScores) -> _AllScores:
        both = dict(self.sums)
        for key, theirs in other.sums.items():
            both[key] = both[key] + theirs if key in both else theirs
        return _AllScores(both)


def score_store_heads(
    store: ActivationStore,
    patterns: tuple[str, ...],
    layers: tuple[int, ...],
    *,
    exclude_bos: bool,
    exclude_current_token: bool,
    block_bytes: int,
    done: Done = lambda _: None,
) -> tuple[npt.NDArray[np.float64], int]:
    """Score every head of some layers against detection patterns.

    Sequences of one token have no pattern to speak of and are left out.

    Returns:
        Scores `(measure, pattern, layer, head)`, NaN where nothing was measured, and the number of
        sequences that they are means of.
    """
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in layers]
    require_arrays(store, names, "score_heads")
    store.require_every_token("score_heads")
    arrays = {name: store.array(name) for name in names}
    row_bytes = 4 * 4 * max(int(np.prod(array.manifest.row_shape)) for array in arrays.values())

    def score(rows: tuple[int, int]) -> _AllScores:
        total = _AllScores({})
        for sequence in store.tokens.read_sequences(*rows):
            if len(sequence.ids) > 1:
                total = total + _score_sequence(sequence, RowBlock(sequence.first_row, sequence.row_stop, arrays))
        return total

    def _score_sequence(sequence: Sequence, block: RowBlock) -> _AllScores:
        length = len(sequence.ids)
        expected = {name: detection_pattern(name, sequence.ids)[sequence.n_context :] for name in patterns}
        sums = {}
        for layer, name in zip(layers, names, strict=True):
            attention = block.read(name)[:, :, :length]
            for pattern, wanted in expected.items():
                sums[pattern, layer] = score_heads(
                    attention, wanted, exclude_bos=exclude_bos, exclude_current_token=exclude_current_token
                )
        return _AllScores(sums)

    blocks = store.tokens.sequence_blocks(max(1, block_bytes // row_bytes))
    found = map_and_sum(score, blocks, done).sums
    if not found:
        nothing = np.full((3, len(patterns), len(layers), store.shape.n_heads), np.nan)
        return nothing, 0
    scores = np.stack([np.stack([found[pattern, layer].means.T for layer in layers], 1) for pattern in patterns], 1)
    return scores, next(iter(found.values())).n_sequences

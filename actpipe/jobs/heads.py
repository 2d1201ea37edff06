"""Head scores over a whole store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from actpipe.compute.heads import MEASURES, HeadScoreSums, score_heads
from actpipe.compute.patterns import DetectionPattern
from actpipe.errors import IncompleteStoreError
from actpipe.jobs.blocks import Done, RowBlock, require_arrays
from actpipe.jobs.sequences import sum_over_sequences
from actpipe.records import Sequence as ModelInput
from actpipe.stores.reading import ActivationStore

PERIOD = "period"
"""The column of documents.parquet with the period of repeated tokens."""


@dataclass(frozen=True)
class HeadScores:
    """Scores of every head against every pattern."""

    scores: npt.NDArray[np.float64]
    """`(measure, pattern, layer, head)`, NaN where nothing was measured."""
    uniform: npt.NDArray[np.float64]
    """`matched` of a head that spreads its attention evenly, `(pattern,)`."""
    n_sequences: int
    """Sequences that they are means of."""


def score_store_heads(
    store: ActivationStore,
    patterns: Sequence[DetectionPattern],
    layers: tuple[int, ...],
    *,
    exclude_bos: bool,
    exclude_current_token: bool,
    block_bytes: int,
    done: Done = lambda _: None,
) -> HeadScores:
    """Score every head of some layers against detection patterns.

    Sequences of one token have no pattern to speak of and are left out.
    """
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in layers]
    require_arrays(store, names, "score_heads")
    store.require_every_token("score_heads")
    periods = _periods(store) if any(pattern.needs_period for pattern in patterns) else None

    def score(sequence: ModelInput, block: RowBlock) -> dict[tuple[str, int], HeadScoreSums]:
        period = 0 if periods is None else int(periods[sequence.document])
        expected = {pattern.name: pattern.of(sequence.ids, period)[sequence.n_context :] for pattern in patterns}
        sums = {}
        for layer, name in zip(layers, names, strict=True):
            attention = block.read(name)[:, :, : len(sequence.ids)]
            for pattern, wanted in expected.items():
                sums[pattern, layer] = score_heads(
                    attention, wanted, exclude_bos=exclude_bos, exclude_current_token=exclude_current_token
                )
        return sums

    found = sum_over_sequences(store, names, score, block_bytes=block_bytes, done=done)
    if not found:
        shape = (len(MEASURES), len(patterns), len(layers), store.shape.n_heads)
        return HeadScores(np.full(shape, np.nan), np.full(len(patterns), np.nan), 0)
    by_pattern = [[found[pattern.name, layer] for layer in layers] for pattern in patterns]
    return HeadScores(
        np.stack([np.stack([sums.means.T for sums in of_layers], 1) for of_layers in by_pattern], 1),
        np.array([of_layers[0].uniform_matched for of_layers in by_pattern]),
        by_pattern[0][0].n_sequences,
    )


def _periods(store: ActivationStore) -> npt.NDArray[np.int64]:
    """Return the period of each document's tokens, 0 where it has none.

    Raises:
        IncompleteStoreError: Documents have no such column, or it holds something else than whole numbers.
    """
    columns = store.tokens.document_columns
    values = store.tokens.read_documents([PERIOD])[PERIOD].to_pylist() if PERIOD in columns else []
    if not values or not all(value is None or type(value) is int for value in values):
        raise IncompleteStoreError(
            f"documents of {store.folder.root} have no column {PERIOD!r} of whole numbers, by which stripes are found; "
            "leave out patterns with a period, or score a corpus of `synthetic` tokens"
        )
    return np.array([value or 0 for value in values], np.int64)

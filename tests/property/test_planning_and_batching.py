"""Parts hold every row once; batches hold every sequence once and keep to their budget."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from actpipe.planning import plan_parts, rows_per_part_for
from actpipe.records import Sequence
from actpipe.text.batching import make_batches


@given(st.integers(1, 5000), st.integers(1, 700))
def test_parts_hold_every_row_exactly_once(n_rows, rows_per_part):
    parts = plan_parts(n_rows, rows_per_part)

    assert [row for part in parts for row in range(part.row_start, part.row_stop)] == list(range(n_rows))
    assert [part.index for part in parts] == list(range(len(parts)))


@given(st.integers(1, 10**9), st.integers(1, 5000), st.integers(1, 100_000))
def test_chosen_parts_are_whole_sequences_and_not_too_large(n_rows, multiple_of, most):
    rows = rows_per_part_for(n_rows, multiple_of=multiple_of, most=most)

    assert rows % multiple_of == 0
    assert 0 < rows <= max(most, multiple_of)


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 200))
def test_batches_hold_every_sequence_once_within_the_budget(lengths, budget):
    sequences = [Sequence(i, i, 0, 0, 0, np.zeros(length, np.int32)) for i, length in enumerate(lengths)]
    batches = list(make_batches(sequences, budget))

    assert sorted(s.sequence for batch in batches for s in batch.sequences) == list(range(len(lengths)))
    assert all(len(b.sequences) == 1 or b.width * len(b.sequences) <= budget for b in batches)


@given(st.lists(st.integers(1, 50), max_size=40), st.randoms(use_true_random=False))
def test_batches_do_not_depend_on_the_order_in_which_sequences_arrive(lengths, random):
    sequences = [Sequence(i, i, 0, 0, 0, np.zeros(length, np.int32)) for i, length in enumerate(lengths)]
    shuffled = random.sample(sequences, len(sequences))

    numbers = [[s.sequence for s in batch.sequences] for batch in make_batches(sequences, 64)]
    assert [[s.sequence for s in batch.sequences] for batch in make_batches(shuffled, 64)] == numbers

"""Put sequences into batches of about equal length, under a budget of tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from actpipe.records import Batch, Sequence


def make_batches(sequences: Iterable[Sequence], max_tokens: int, *, n_more: int = 0) -> Iterator[Batch]:
    """Group sequences by length, longest first, so that little padding is computed.

    The grouping depends on the sequences alone: the same part gives the same batches, and so
    the same bytes, whoever runs it.

    Args:
        sequences: All sequences of one part.
        max_tokens: Most tokens of a batch, padding included. A longer sequence is a batch of its own.
        n_more: Tokens that each sequence will grow by.
    """
    by_length = sorted(sequences, key=lambda sequence: (-len(sequence.ids), sequence.sequence))
    batch: list[Sequence] = []
    for sequence in by_length:
        if batch and (len(batch[0].ids) + n_more) * (len(batch) + 1) > max_tokens:
            yield Batch(tuple(batch))
            batch = []
        batch.append(sequence)
    if batch:
        yield Batch(tuple(batch))

"""No token is lost, doubled or moved, whatever the documents and the borders."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from actpipe.records import DocumentRow, DocumentStatus, Sequence, TokenizedDocument
from actpipe.text.packing import Packing, pack, split

BOS, EOS = 900, 901

texts = st.lists(st.lists(st.integers(0, 255), max_size=23), max_size=9)
lengths = st.integers(2, 9)
maybe_bos = st.sampled_from([None, BOS])


def documents(ids_of_each):
    """Number documents; empty ones are marked as such, as tokenizing does."""
    for index, ids in enumerate(ids_of_each):
        status = DocumentStatus.OK if ids else DocumentStatus.EMPTY
        yield TokenizedDocument(index, f"d{index}", status, np.array(ids, np.int32))


def rows_of(records):
    """Return the stored id of each row, after checking that rows follow one another without a gap."""
    rows = []
    for sequence in (r for r in records if isinstance(r, Sequence)):
        assert sequence.first_row == len(rows)
        rows.extend(int(token) for token in sequence.ids[sequence.n_context :])
    return rows


def by_document(records):
    return {record.document: record for record in records if isinstance(record, DocumentRow)}


@given(texts, lengths, maybe_bos)
def test_packed_rows_without_bos_are_the_documents_joined_by_eos(ids_of_each, length, bos):
    records = list(pack(documents(ids_of_each), Packing(length, bos_id=bos, separator_id=EOS)))

    joined = [token for ids in ids_of_each if ids for token in (*ids, EOS)]
    assert [token for token in rows_of(records) if token != BOS] == joined


@given(texts, lengths, maybe_bos)
def test_packed_sequences_have_exactly_the_context_length_but_for_the_last(ids_of_each, length, bos):
    sequences = [r for r in pack(documents(ids_of_each), Packing(length, bos, EOS)) if isinstance(r, Sequence)]

    assert all(len(sequence.ids) == length for sequence in sequences[:-1])
    assert all(0 < len(sequence.ids) <= length for sequence in sequences[-1:])
    assert all(bos is None or sequence.ids[0] == bos for sequence in sequences)
    assert [sequence.sequence for sequence in sequences] == list(range(len(sequences)))


@given(texts, lengths, maybe_bos)
def test_a_packed_documents_rows_hold_its_tokens_then_eos(ids_of_each, length, bos):
    records = list(pack(documents(ids_of_each), Packing(length, bos, EOS)))
    rows = rows_of(records)

    for index, record in by_document(records).items():
        if record.row_start is None:
            assert not ids_of_each[index]
            continue
        held = [token for token in rows[record.row_start : record.row_stop] if token != BOS]
        assert held == [*ids_of_each[index], EOS]
        assert (record.n_tokens, record.n_truncated) == (len(ids_of_each[index]), 0)


@given(texts, lengths, maybe_bos, st.integers(1, 60), st.booleans())
def test_a_limit_of_rows_cuts_the_stream_there_and_says_what_it_cut(ids_of_each, length, bos, limit, packed):
    arrange = pack if packed else split
    separator = EOS if packed else None
    stride = None if packed else length - (bos is not None)
    whole = list(arrange(documents(ids_of_each), Packing(length, bos, separator, stride)))
    cut = list(arrange(documents(ids_of_each), Packing(length, bos, separator, stride, max_rows=limit)))

    rows = rows_of(cut)
    assert len(rows) <= limit
    assert rows == rows_of(whole)[: len(rows)]
    assert len(rows) >= min(limit, len(rows_of(whole))) - (bos is not None)
    for index, record in by_document(cut).items():
        assert record.n_tokens + record.n_truncated == len(ids_of_each[index])


@given(texts, lengths, maybe_bos, st.integers(1, 9))
def test_windows_store_every_token_once_with_its_context(ids_of_each, length, bos, stride):
    room = length - (bos is not None)
    stride = min(stride, room)
    records = list(split(documents(ids_of_each), Packing(length, bos, stride=stride)))
    found = by_document(records)

    for index, ids in enumerate(ids_of_each):
        sequences = [r for r in records if isinstance(r, Sequence) and r.document == index]
        stored = [int(t) for s in sequences for t in s.ids[s.n_context :] if t != BOS]
        assert stored == ids
        assert found[index].n_truncated == 0
        for position, sequence in enumerate(sequences):
            seen = [int(token) for token in sequence.ids if token != BOS]
            new = [int(token) for token in sequence.ids[sequence.n_context :] if token != BOS]
            begin = sequence.start + len(new) - len(seen)
            assert seen == ids[begin : begin + len(seen)]
            assert len(sequence.ids) <= length
            assert (bos is None) or sequence.ids[0] == bos
            assert position == 0 or len(seen) - len(new) >= room - stride


@given(texts, lengths, maybe_bos)
def test_truncated_documents_keep_their_beginning(ids_of_each, length, bos):
    room = length - (bos is not None)
    records = list(split(documents(ids_of_each), Packing(length, bos)))
    found = by_document(records)

    assert len(found) == len(ids_of_each)
    for sequence in (r for r in records if isinstance(r, Sequence)):
        own = [int(token) for token in sequence.ids if token != BOS]
        assert own == ids_of_each[sequence.document][:room]
        assert found[sequence.document].n_truncated == max(0, len(ids_of_each[sequence.document]) - room)


@given(texts, st.integers(3, 9), maybe_bos, st.sampled_from([None, *range(1, 40)]))
def test_a_closing_id_ends_every_sequence_and_takes_no_token_of_a_document(ids_of_each, length, bos, limit):
    room = length - (bos is not None) - 1
    records = list(split(documents(ids_of_each), Packing(length, bos, max_rows=limit, closing_id=EOS)))
    found = by_document(records)

    assert limit is None or len(rows_of(records)) <= limit
    for sequence in (r for r in records if isinstance(r, Sequence)):
        own = [int(token) for token in sequence.ids[:-1] if token != BOS]
        assert sequence.ids[-1] == EOS
        assert own == ids_of_each[sequence.document][: len(own)]
        assert len(own) == min(room, len(ids_of_each[sequence.document])) or limit is not None
        assert found[sequence.document].n_tokens == len(own) > 0

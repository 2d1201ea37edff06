"""`compat` gives the rows of TransformerLens' `tokenize_and_concatenate`, to the id."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from actpipe.schemas.recipe import DatasetConfig
from support import INDUCTION, SPEECHES
from transformers import AutoTokenizer

from actpipe.records import DocumentRow, DocumentStatus, Sequence, SourceDocument
from actpipe.text.compat import Compat, compat_pad_id, tokenize_and_concatenate
from actpipe.text.documents import open_corpus

# Shape and SHA-256 (int32, little-endian) of what the functions of transformer-lens 2.16.1 and 3.9.0 return for the
# speeches with the tokenizer beside them, max_length 64, add_bos_token True; with `datasets`' caching off, which
# otherwise gives the rows of the first num_proc for every later one.
RECORDED = {
    ("tl2", 1): ((9493, 64), "eb3a5d8e1ddad4b278a05d3cdac5a1b68787e25631050e9673de5c157092187c"),
    ("tl2", 10): ((9495, 64), "8979537d8326fb714076ab11123f9a2ada467458091cd4cefda2b051a8c17d95"),
    ("tl3", 1): ((9607, 64), "84eec28680f785ecc40842dba756d9cfeec38e3f18608485bf4ad47db8d86567"),
    ("tl3", 10): ((9606, 64), "e5ea2de503599d37f272a4370478e2f189440c9a6dee95c4ffdd3e1306f4318b"),
}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(INDUCTION)


def padded_rows(records, tokenizer, settings):
    pad = compat_pad_id(tokenizer, settings.version)
    return np.array(
        [
            np.pad(r.ids, (0, settings.max_length - len(r.ids)), constant_values=pad)
            for r in records
            if isinstance(r, Sequence)
        ]
    )


@pytest.mark.parametrize(("version", "num_proc"), sorted(RECORDED))
def test_rows_of_a_real_dataset_are_the_recorded_ones(tokenizer, version, num_proc):
    corpus = open_corpus(DatasetConfig(path=str(SPEECHES)), "none", Path())
    settings = Compat(version, 64, tokenizer.bos_token_id, num_proc, corpus.source.length)

    rows = padded_rows(tokenize_and_concatenate(corpus.documents(), tokenizer, settings), tokenizer, settings)
    shape, digest = RECORDED[version, num_proc]
    assert rows.shape == shape
    assert hashlib.sha256(rows.astype("<i4").tobytes()).hexdigest() == digest


def numbered(values):
    return [SourceDocument(i, str(i), value) for i, value in enumerate(values)]


@pytest.mark.parametrize("version", ["tl2", "tl3"])
def test_a_short_batch_is_one_padded_row(version):
    tokenizer = AutoTokenizer.from_pretrained(INDUCTION)
    tokenizer.pad_token = None
    settings = Compat(version, 32, tokenizer.bos_token_id)
    records = tokenize_and_concatenate(numbered(["Hi"]), tokenizer, settings)

    (row,) = padded_rows(records, tokenizer, settings)
    ids = tokenizer("Hi")["input_ids"]
    pad = len(tokenizer) if version == "tl2" else tokenizer.eos_token_id
    assert row.tolist() == [tokenizer.bos_token_id, *ids, *[pad] * (31 - len(ids))]


def test_version_2_drops_separators_where_padding_is_eos():
    tokenizer = AutoTokenizer.from_pretrained(INDUCTION)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    texts = ["abcdef", "ghijkl", "mnopqr"]

    def ids_of(version):
        records = tokenize_and_concatenate(numbered(texts), tokenizer, Compat(version, 4, None))
        return [token for record in records if isinstance(record, Sequence) for token in record.ids.tolist()]

    assert tokenizer.eos_token_id in ids_of("tl3")
    assert tokenizer.eos_token_id not in ids_of("tl2")


def test_documents_without_text_take_their_place_and_are_named(tokenizer):
    values = ["one", None, 3, "", "two \ud800", "three"]
    settings = Compat("tl3", 8, None)
    records = list(tokenize_and_concatenate(numbered(values), tokenizer, settings))

    statuses = [record.status for record in records if isinstance(record, DocumentRow)]
    expected = ["ok", "missing", "not_text", "empty", "invalid_unicode", "ok"]
    assert [str(status) for status in statuses] == expected
    assert DocumentStatus.OK in statuses
    good = ["one", "", "three"]
    eos = tokenizer.eos_token_id
    joined = [t for text in good for t in (*tokenizer(text)["input_ids"], eos)][:-1]
    stored = [t for record in records if isinstance(record, Sequence) for t in record.ids.tolist()]
    assert stored == joined[: len(joined) // 8 * 8] or stored == joined

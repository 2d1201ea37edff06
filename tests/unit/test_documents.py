"""Every kind of dataset becomes documents; what is wrong with one is counted and never moves another."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import ClassVar

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from actpipe.schemas.recipe import DatasetConfig
from support import INDUCTION, TEXTS, make_recipe, run
from transformers import AutoTokenizer

from actpipe.errors import ActpipeError, DatasetError
from actpipe.records import DocumentStatus
from actpipe.stores.layout import RunFolder
from actpipe.stores.token_table import TokenTable
from actpipe.text.documents import open_corpus


def read(path: Path | str, keep="all", **settings):
    corpus = open_corpus(DatasetConfig(path=str(path), **settings), keep, Path())
    return corpus, list(corpus.documents())


def as_table(path: Path, kind: str) -> None:
    table = pa.table({"id": [f"doc-{i}" for i in range(len(TEXTS))], "text": TEXTS, "line": list(range(len(TEXTS)))})
    if kind == "parquet":
        pq.write_table(table, path)
    elif kind == "csv":
        table.to_pandas().to_csv(path, index=False)
    elif kind == "tsv":
        table.to_pandas().to_csv(path, index=False, sep="\t")
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    elif kind == "json":
        path.write_text(json.dumps(table.to_pylist()))
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in table.to_pylist()).encode()))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["parquet", "csv", "tsv", "jsonl", "json", "jsonl.gz"])
def test_files_of_every_format_give_the_same_documents(tmp_path, kind, streaming):
    path = tmp_path / f"corpus.{kind}"
    as_table(path, kind)

    corpus, documents = read(path, streaming=streaming)
    assert [document.value for document in documents] == TEXTS
    assert [document.id for document in documents] == [f"doc-{i}" for i in range(len(TEXTS))]
    assert [document.columns["line"] for document in documents] == list(range(len(TEXTS)))
    assert corpus.column_type == "text"


def test_several_files_come_in_the_order_of_their_names(tmp_path):
    for number, text in enumerate(TEXTS):
        (tmp_path / f"part-{number}.txt").write_text(text)

    _, documents = read(tmp_path / "part-*.txt")
    assert [document.value for document in documents] == TEXTS


def test_a_folder_of_files_and_a_saved_dataset_are_read(tmp_path):
    folder, saved = tmp_path / "folder", tmp_path / "saved"
    folder.mkdir()
    as_table(folder / "train.parquet", "parquet")
    datasets.DatasetDict({"test": datasets.Dataset.from_dict({"text": TEXTS})}).save_to_disk(saved)

    assert [document.value for document in read(folder)[1]] == TEXTS
    assert [document.value for document in read(saved, split="test")[1]] == TEXTS
    with pytest.raises(DatasetError, match="no split 'train'; it has test"):
        read(saved)


def test_a_text_file_is_lines_paragraphs_or_one_document(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_bytes(b"one\r\ntwo\n\n\nthree\n")

    assert [d.value for d in read(path)[1]] == ["one", "two", "", "", "three"]
    assert [d.value for d in read(path, text_by="paragraph")[1]] == ["one\ntwo", "three"]
    assert [d.value for d in read(path, text_by="document")[1]] == ["one\r\ntwo\n\n\nthree\n"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "line 2: not JSON"),
        ("a.jsonl", b'{"text": "x"}\n[1]\n', "line 2: a JSON object was expected, not list"),
        ("a.json", b"[1]", "entry 0: a JSON object was expected"),
        ("a.jsonl", b"", "holds no documents"),
        ("a.xyz", b"hello", "set `format`"),
        ("a.csv", b"\xff\xfe\x00", "cannot load the dataset"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_with_its_place(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)

    with pytest.raises(DatasetError, match=message):
        read(path)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(DatasetError, match="is empty"):
        read(tmp_path)


def test_columns_with_reserved_names_are_kept_under_another(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text(json.dumps({"text": "x", "status": "good", "n": 1, "tags": ["a"]}) + "\n")

    corpus, (document,) = read(path)
    assert document.columns == {"source_status": "good", "n": 1}
    assert read(path, keep="none")[0].kept == {}
    assert read(path, keep=("tags",))[1][0].columns == {"tags": ["a"]}
    assert corpus.id_column is None


class TestWhatCannotBecomeTokens:
    """Six kinds of documents that have no rows, beside three that do."""

    LINES = (
        b'{"id": "a", "text": "To be, or not to be"}',
        b'{"id": "b", "text": ""}',
        b'{"id": "c", "text": null}',
        b'{"id": "d", "text": 17}',
        b'{"id": "e", "text": "lone \\ud800 surrogate"}',
        b'{"id": "f"}',
        b'{"id": "g", "text": "that is the question"}',
        b'{"id": "h", "text": "bad \xff byte"}',
        b'{"id": "i", "text": "the end"}',
    )
    EXPECTED: ClassVar = {
        "a": "ok",
        "b": "empty",
        "c": "missing",
        "d": "not_text",
        "e": "invalid_unicode",
        "f": "missing",
        "g": "ok",
        "h": "invalid_unicode",
        "i": "ok",
    }

    @pytest.mark.parametrize("layout", ["packed", "documents"])
    def test_they_are_counted_and_named_and_move_no_rows(self, tmp_path, layout):
        path = tmp_path / "corpus.jsonl"
        path.write_bytes(b"\n".join(self.LINES))
        recipe = make_recipe(path)
        recipe["stages"][0]["layout"] = layout
        run(recipe, tmp_path / "run")

        table = TokenTable(RunFolder(tmp_path / "run"))
        rows = table.read_documents().to_pylist()
        assert {row["id"]: row["status"] for row in rows} == self.EXPECTED
        assert table.manifest.status_counts == {
            "ok": 3,
            "empty": 1,
            "missing": 2,
            "not_text": 1,
            "invalid_unicode": 2,
        }
        assert table.manifest.first_problems["missing"] == ("c", "f")

        from actpipe import open_store

        store = open_store(tmp_path / "run")
        for index, text in ((0, "To be, or not to be"), (6, "that is the question"), (8, "the end")):
            assert store.document(index).text == text
        assert store.document(4).input_ids.size == 0

    def test_invalid_text_in_parquet_is_found_too(self, tmp_path):
        raw = pa.array([b"good", b"bad \xff", None], pa.binary())
        broken = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
        pq.write_table(pa.table({"text": broken}), tmp_path / "corpus.parquet")
        run(make_recipe(tmp_path / "corpus.parquet"), tmp_path / "run")

        rows = TokenTable(RunFolder(tmp_path / "run")).read_documents(["status"]).to_pylist()
        assert [row["status"] for row in rows] == ["ok", "invalid_unicode", "missing"]

    def test_a_corpus_without_any_token_is_refused(self, write_jsonl, tmp_path):
        with pytest.raises(ActpipeError, match="has no tokens"):
            run(make_recipe(write_jsonl([{"text": ""}, {"text": None}])), tmp_path / "run")


def test_documents_outside_the_length_limits_are_left_out_and_counted(write_jsonl, tmp_path):
    path = write_jsonl([{"text": "a"}, {"text": "a b c d e f"}, {"text": "word " * 100}])
    recipe = make_recipe(path)
    recipe["stages"][0] |= {"min_document_tokens": 2, "max_document_tokens": 50}
    run(recipe, tmp_path / "run")

    rows = TokenTable(RunFolder(tmp_path / "run")).read_documents(["status"]).to_pylist()
    assert [row["status"] for row in rows] == ["too_short", "ok", "too_long"]


def test_limits_stop_where_they_say(corpus, tmp_path):
    recipe = make_recipe(corpus)
    recipe["stages"][0]["max_documents"] = 2
    run(recipe, tmp_path / "two")
    recipe = make_recipe(corpus)
    recipe["stages"][0]["max_tokens"] = 50
    run(recipe, tmp_path / "fifty")

    assert TokenTable(RunFolder(tmp_path / "two")).manifest.n_documents == 2
    fifty = TokenTable(RunFolder(tmp_path / "fifty"))
    assert fifty.manifest.n_rows == 50
    assert fifty.manifest.n_truncated > 0


def test_a_huge_document_is_tokenized_whole(write_jsonl, tmp_path):
    text = "The quick brown fox jumps over the lazy dog. " * (10 * 2**20 // 45)
    recipe = make_recipe(write_jsonl([{"text": "before"}, {"text": text}, {"text": "after"}]))
    recipe["stages"] = recipe["stages"][:1]
    recipe["stages"][0]["prepend_bos"] = False
    run(recipe, tmp_path / "run")

    table = TokenTable(RunFolder(tmp_path / "run"))
    rows = table.read_documents().to_pylist()
    assert rows[1]["n_tokens"] > 2_000_000
    assert rows[2]["row_start"] == rows[1]["row_stop"]
    assert sum(row["n_tokens"] + 1 for row in rows) == table.manifest.n_rows


CHAT = "{% for m in messages %}<|endoftext|>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


def test_chat_messages_go_through_the_template_and_bring_no_second_bos(write_jsonl, tmp_path):
    good = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    path = write_jsonl([{"messages": good}, {"messages": [{"content": "x"}]}, {"messages": []}, {"messages": None}])
    recipe = make_recipe(path)
    recipe["stages"][0] |= {
        "dataset": {"path": str(path), "column": "messages", "chat_template": CHAT},
        "layout": "documents",
        "prepend_bos": True,
    }
    run(recipe, tmp_path / "run")

    table = TokenTable(RunFolder(tmp_path / "run"))
    (sequence,) = table.read_sequences()
    tokenizer = AutoTokenizer.from_pretrained(INDUCTION)
    assert tokenizer.decode(sequence.ids) == "<|endoftext|>user: Hello\n<|endoftext|>assistant: Hi\n"
    assert table.manifest.status_counts == {"ok": 1, "invalid_messages": 1, "empty": 1, "missing": 1}


def test_columns_of_token_ids_are_taken_as_they_are(write_jsonl, tmp_path):
    path = write_jsonl([{"ids": [5, 6, 7]}, {"ids": [600]}, {"ids": [-1]}, {"ids": ["x"]}, {"ids": []}, {"ids": [8]}])
    recipe = make_recipe(path)
    recipe["stages"][0] |= {
        "dataset": {"path": str(path), "column": "ids", "column_type": "token_ids"},
        "layout": "documents",
        "prepend_bos": False,
    }
    run(recipe, tmp_path / "run")

    table = TokenTable(RunFolder(tmp_path / "run"))
    assert [sequence.ids.tolist() for sequence in table.read_sequences()] == [[5, 6, 7], [8]]
    statuses = [row["status"] for row in table.read_documents(["status"]).to_pylist()]
    assert statuses == ["ok", "invalid_ids", "invalid_ids", "invalid_ids", "empty", "ok"]


@pytest.mark.parametrize(("prepend_bos", "expected"), [(True, True), (False, False), ("model", True)])
def test_bos_stands_where_it_is_asked_for(corpus, tmp_path, prepend_bos, expected):
    recipe = make_recipe(corpus)
    recipe["stages"][0]["prepend_bos"] = prepend_bos
    run(recipe, tmp_path / "run")

    first = [int(s.ids[0]) for s in TokenTable(RunFolder(tmp_path / "run")).read_sequences()]
    assert (first[0] == 0) is expected
    assert all(token == 0 for token in first) is expected


def test_a_document_that_brings_bos_along_does_not_get_a_second(write_jsonl, tmp_path):
    recipe = make_recipe(write_jsonl([{"text": "<|endoftext|>To be"}]))
    recipe["stages"][0] |= {"layout": "documents", "prepend_bos": True}
    run(recipe, tmp_path / "run")

    (sequence,) = TokenTable(RunFolder(tmp_path / "run")).read_sequences()
    assert sequence.ids[0] == 0
    assert sequence.ids[1] != 0


def test_synthetic_documents_are_a_piece_repeated_without_special_tokens(tmp_path):
    recipe = make_recipe(tmp_path)
    recipe["stages"][0] = {
        "stage": "tokenize_text",
        "synthetic": {"n_documents": 5, "period": 8, "repeats": 3},
        "layout": "documents",
        "context_length": 32,
        "prepend_bos": False,
    }
    run(recipe, tmp_path / "run")

    sequences = list(TokenTable(RunFolder(tmp_path / "run")).read_sequences())
    assert len(sequences) == 5
    for sequence in sequences:
        assert np.array_equal(sequence.ids, np.tile(sequence.ids[:8], 3))
        assert 0 not in sequence.ids
    assert not np.array_equal(sequences[0].ids, sequences[1].ids)


def test_statuses_are_the_documented_ones():
    assert {str(status) for status in DocumentStatus} == {
        "ok",
        "empty",
        "missing",
        "not_text",
        "invalid_unicode",
        "invalid_messages",
        "invalid_ids",
        "too_short",
        "too_long",
    }

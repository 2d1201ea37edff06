"""A store of some of the tokens holds exactly those, with the values that they have among all."""

from __future__ import annotations

import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console
from support import all_bytes, make_recipe, run

import actpipe
from actpipe.describing import verify_run
from actpipe.errors import ActpipeError, IncompleteStoreError
from actpipe.repairing import recheck_run, repair_run
from actpipe.stores.layout import RunFolder
from actpipe.telemetry import Telemetry

HOOK = "blocks.0.hook_resid_post"
WORDS = ["the king", "a queen and the king's men", "who is the fool", "nothing", "the end", "KING and king"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "documents.parquet"
    texts = [f"{words}, said number {number}. " * (1 + number % 3) for number, words in enumerate(WORDS * 5)]
    spans = [json.dumps([[4, 6], [10, 12]]) if number % 2 else "[]" for number in range(len(texts))]
    table = {"id": [f"d{number}" for number in range(len(texts))], "text": texts, "spans": spans}
    pq.write_table(pa.table({**table, "play": [f"p{number % 4}" for number in range(len(texts))]}), path)
    return path


def recipe_of(corpus, layout="packed", prepend_bos=True, **extract):
    recipe = make_recipe(corpus, **extract)
    recipe["stages"][0] |= {"layout": layout, "prepend_bos": prepend_bos}
    recipe["stages"][1].pop("rows_per_part", None)
    recipe["stages"][1] |= extract
    return recipe


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """Stores of every token, by layout."""
    folder = tmp_path_factory.mktemp("whole")
    for layout in ("packed", "documents"):
        run(recipe_of(corpus, layout, metrics=["loss"]), folder / layout)
    return {layout: actpipe.open_store(folder / layout) for layout in ("packed", "documents")}


def chosen_rows(store, keep):
    """Say which rows should be kept, from what the whole store holds."""
    position, sequence = store["tokens/position"].compute(), store["tokens/sequence"].compute()
    ids = store["tokens/input_ids"].compute()
    length = np.bincount(sequence)[sequence]
    wanted = np.ones(len(ids), bool)
    if "positions" in keep:
        wanted &= np.isin(position, keep["positions"]) | np.isin(position - length, keep["positions"])
    if "every" in keep:
        wanted &= np.arange(len(ids)) % keep["every"] == 0
    if "bos" in keep.get("exclude", ()):
        wanted &= position != 0
    if "special" in keep.get("exclude", ()):
        wanted &= ids != 0
    if 5 in keep.get("exclude", ()):
        wanted &= ids != 5
    return np.flatnonzero(wanted)


@pytest.mark.parametrize("layout", ["packed", "documents"])
@pytest.mark.parametrize(
    "keep",
    [
        {"positions": [-1]},
        {"positions": [0, 3, -2]},
        {"every": 7},
        {"exclude": ["bos"]},
        {"exclude": ["special", 5], "every": 2},
    ],
    ids=str,
)
def test_it_holds_the_rows_that_were_asked_for_and_their_values(corpus, whole, tmp_path, layout, keep):
    run(recipe_of(corpus, layout, keep=keep, metrics=["loss"], rows_per_part=16), tmp_path)
    store, rows = actpipe.open_store(tmp_path), chosen_rows(whole[layout], keep)

    assert 0 < len(rows) < whole[layout].n_rows
    assert pq.read_table(tmp_path / "rows.parquet")["row"].to_pylist() == rows.tolist()
    for name in ("tokens/input_ids", "tokens/position", "tokens/sequence"):
        np.testing.assert_array_equal(store[name].compute(), whole[layout].rows(name, rows))
    for name in (HOOK, "metrics/loss"):
        np.testing.assert_allclose(store[name].compute(), whole[layout].rows(name, rows), atol=1e-4)
    assert verify_run(tmp_path)[0] == []


def test_pieces_and_a_prefix_change_no_kept_value(corpus, tmp_path):
    recipe = recipe_of(corpus, "documents", prepend_bos=False, keep={"every": 3})
    recipe["stages"][0]["prefix"] = {"text": "Once more: "}
    run(recipe, tmp_path / "one pass")
    recipe["stages"][1] |= {"chunk_tokens": 5, "rows_per_part": 10}
    run(recipe, tmp_path / "pieces")
    one, other = (actpipe.open_store(tmp_path / name) for name in ("one pass", "pieces"))

    np.testing.assert_allclose(one[HOOK].compute(), other[HOOK].compute(), atol=1e-4)
    np.testing.assert_array_equal(one["tokens/position"].compute(), other["tokens/position"].compute())


@pytest.mark.parametrize("layout", ["packed", "documents"])
@pytest.mark.parametrize("keep", [{"match": r"(?i)king|fool", "exclude": ["bos"]}, {"spans": "spans"}], ids=str)
def test_tokens_that_hold_wanted_characters_are_kept_whole(corpus, whole, tmp_path, layout, keep):
    run(recipe_of(corpus, layout, keep=keep), tmp_path)
    store, everything = actpipe.open_store(tmp_path), whole[layout]

    for number in range(everything.tokens.manifest.n_documents):
        document, kept = everything.document(number), store.document(number)
        spans = json.loads(document.columns["spans"])
        if "match" in keep:
            spans = [match.span() for match in re.finditer(keep["match"], document.text)]
        ends = [len(everything.decode(document.input_ids[:n])) for n in range(len(document.rows) + 1)]
        wanted = [
            any(start < ends[n + 1] and stop > ends[n] for start, stop in spans) for n in range(len(document.rows))
        ]
        assert kept.input_ids.tolist() == document.input_ids[wanted].tolist()
        np.testing.assert_allclose(kept[HOOK], document[HOOK][wanted], atol=1e-4)


def test_documents_are_drawn_by_their_ids_and_chosen_by_their_columns(corpus, whole, tmp_path):
    run(recipe_of(corpus, keep={"fraction": 0.4, "seed": 3}), tmp_path / "drawn")
    run(recipe_of(corpus, keep={"where": {"play": ["p1", "p2"]}}), tmp_path / "chosen")
    drawn, chosen, everything = (
        *(actpipe.open_store(tmp_path / name) for name in ("drawn", "chosen")),
        whole["packed"],
    )
    n_drawn = 0
    for number in range(everything.tokens.manifest.n_documents):
        document = everything.document(number)
        kept = drawn.document(number)
        assert len(kept.rows) in (0, len(document.rows))
        n_drawn += len(kept.rows) > 0
        wanted = len(document.rows) if document.columns["play"] in ("p1", "p2") else 0
        assert len(chosen.document(number).rows) == wanted
    assert 3 < n_drawn < 25


def test_the_feed_knows_the_documents_of_kept_rows(corpus, whole, tmp_path):
    run(recipe_of(corpus, keep={"every": 3}, rows_per_part=16), tmp_path)
    store, everything = actpipe.open_store(tmp_path), whole["packed"]
    plays = np.empty(everything.n_rows, object)
    for number in range(everything.tokens.manifest.n_documents):
        document = everything.document(number)
        plays[document.rows] = document.columns["play"]
    rows = pq.read_table(tmp_path / "rows.parquet")["row"].to_numpy()
    seen = []
    for split in ("train", "validation"):
        loader = actpipe.ActivationLoader(
            store, HOOK, batch_size=8, labels=["play"], split=split, validation_fraction=0.4, drop_last=False
        )
        for batch in loader:
            known = [plays[row] for row in rows[batch["row"].numpy()]]
            labels = [loader.classes["play"][label] for label in batch["play"].tolist()]
            assert all(mine in (None, label) for mine, label in zip(known, labels, strict=True))
            assert torch.equal(batch[HOOK], torch.from_numpy(store.rows(HOOK, batch["row"].numpy())))
            seen += batch["row"].tolist()
    assert sorted(seen) == list(range(store.n_rows))


def test_interrupted_it_ends_with_the_same_bytes(corpus, tmp_path):
    recipe = recipe_of(corpus, keep={"every": 2}, rows_per_part=16)
    run(recipe, tmp_path / "at once")
    run(recipe, tmp_path / "again")
    for part in (1, 3):
        RunFolder(tmp_path / "again").part_commit(part).unlink()
    run(recipe, tmp_path / "again")

    at_once, again = (all_bytes(tmp_path / name) for name in ("at once", "again"))
    assert at_once.pop("run.yaml")
    assert again.pop("run.yaml")
    assert at_once == again


@pytest.mark.parametrize("harm", ["flip", "remove", "record"])
def test_a_broken_row_table_is_found_and_made_again(corpus, tmp_path, harm):
    run(recipe_of(corpus, keep={"every": 2}), tmp_path)
    folder = RunFolder(tmp_path)
    before = folder.rows.read_bytes()
    if harm == "flip":
        folder.rows.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    else:
        (folder.rows if harm == "remove" else folder.rows_commit).unlink()

    assert len(verify_run(tmp_path)[0]) == 1
    assert len(repair_run(tmp_path, telemetry=Telemetry(Console(quiet=True))).mended) == 1
    assert verify_run(tmp_path)[0] == []
    assert folder.rows.read_bytes() == before
    assert recheck_run(tmp_path, telemetry=Telemetry(Console(quiet=True)))[1]


def test_other_conditions_need_another_folder(corpus, tmp_path):
    run(recipe_of(corpus, keep={"every": 2}), tmp_path)
    with pytest.raises(ActpipeError, match=r"keep.every: 2 -> 3"):
        run(recipe_of(corpus, keep={"every": 3}), tmp_path)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({}, "no condition"),
        ({"match": "("}, "not a regular expression"),
        ({"match": "zebra"}, "none of the"),
        ({"where": {"plai": "p1"}}, "did you mean 'play'"),
        ({"where": {"play": 3}}, "holds string"),
        ({"spans": "play"}, "no JSON list"),
        ({"exclude": ["comma"]}, "exclude"),
    ],
    ids=str,
)
def test_conditions_that_mean_nothing_are_refused(corpus, tmp_path, keep, message):
    with pytest.raises(ActpipeError, match=message):
        run(recipe_of(corpus, keep=keep), tmp_path)


def test_what_needs_whole_sequences_says_so(corpus, tmp_path):
    recipe = recipe_of(corpus, keep={"every": 2})
    run(recipe, tmp_path)
    with pytest.raises(IncompleteStoreError, match="keeps only some"):
        actpipe.open_store(tmp_path).require_every_token("score_heads")
    recipe["stages"][1]["hooks"] = ["blocks.*.attn.hook_pattern"]
    with pytest.raises(ActpipeError, match="whole sequences"):
        run({**recipe, "stages": [*recipe["stages"], {"stage": "score_heads"}]}, tmp_path / "other")

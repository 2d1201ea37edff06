"""Scores of heads against formulas written down a second time, in float64."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.torch import save_file
from support import make_recipe, run

from actpipe import open_results, open_store
from actpipe.compute.heads import score_heads
from actpipe.compute.patterns import (
    DUPLICATE_STRIPE,
    INDUCTION_STRIPE,
    TRANSFORMERLENS_PATTERNS,
    Attended,
    DetectionPattern,
    Queries,
)
from actpipe.errors import ActpipeError

PATTERN = "blocks.*.attn.hook_pattern"


def transformerlens_score(attention, pattern, *, exclude_bos, exclude_current_token, measure):
    """`compute_head_attention_similarity_score` of TransformerLens 2.16, cell by cell, in float64."""
    n = len(pattern)
    on_pattern = total = difference = 0.0
    for query in range(n):
        for key in range(n):
            seen, wanted = float(attention[query, key]), float(pattern[query, key])
            left_out = (exclude_bos and key == 0) or (exclude_current_token and key == query)
            on_pattern += 0.0 if left_out else seen * wanted
            total += 0.0 if left_out else seen
            difference += 0.0 if left_out else abs(seen - wanted)
    if measure == "mul":
        return on_pattern / total if total else math.nan
    return 1 - round(difference / (n * n) * n, 3)


@st.composite
def attention_and_pattern(draw):
    """Attention of one head as softmax gives it, and a lower triangular matrix, of ones and zeros or of any values."""
    n = draw(st.integers(2, 7))
    scores = draw(hnp.arrays(np.float64, (n, n), elements=st.floats(-8, 8)))
    attention = np.tril(np.exp(scores))
    attention /= attention.sum(-1, keepdims=True)
    entry = draw(st.sampled_from([st.sampled_from([0.0, 1.0]), st.floats(0, 1, width=32)]))
    pattern = np.tril(draw(hnp.arrays(np.float32, (n, n), elements=entry)))
    return attention.astype(np.float32), pattern


@given(attention_and_pattern(), st.booleans(), st.booleans())
def test_scores_are_transformerlens_for_any_pattern(both, exclude_bos, exclude_current_token):
    attention, pattern = both
    options = {"exclude_bos": exclude_bos, "exclude_current_token": exclude_current_token}
    mul, absolute, _ = score_heads(attention[:, None], pattern, **options).means[0]

    expected = transformerlens_score(attention, pattern, measure="mul", **options)
    np.testing.assert_allclose(mul, expected, rtol=1e-5, atol=1e-9, equal_nan=True)
    assert absolute == pytest.approx(transformerlens_score(attention, pattern, measure="abs", **options), abs=1.001e-3)


@given(attention_and_pattern(), st.booleans(), st.booleans())
def test_matched_is_the_attention_of_queries_that_have_a_match(both, exclude_bos, exclude_current_token):
    attention, pattern = both
    options = {"exclude_bos": exclude_bos, "exclude_current_token": exclude_current_token}
    found = score_heads(attention[:, None], pattern, **options)

    shares, even = [], []
    for query in range(len(pattern)):
        keys = [k for k in range(query + 1) if not (exclude_bos and k == 0)]
        keys = [k for k in keys if not (exclude_current_token and k == query)]
        if any(pattern[query, k] for k in keys):
            shares.append(sum(float(attention[query, k]) * float(pattern[query, k]) for k in keys))
            even.append(sum(float(pattern[query, k]) for k in keys) / len(keys))
    np.testing.assert_allclose(found.means[0, 2], np.mean(shares) if shares else math.nan, rtol=1e-5)
    np.testing.assert_allclose(found.uniform_matched, np.mean(even) if even else math.nan, rtol=1e-5)


def test_a_sequence_whose_attention_is_all_left_out_takes_no_part_in_mul():
    """TransformerLens gives NaN for such a prompt, which one short document would spread over the whole corpus."""
    away = np.array([[1, 0], [1, 0]], np.float32)[:, None]
    spread = np.array([[1, 0, 0], [0.5, 0.5, 0], [0.2, 0.6, 0.2]], np.float32)[:, None]
    previous = TRANSFORMERLENS_PATTERNS[0]
    options = {"exclude_bos": True, "exclude_current_token": True}
    short = score_heads(away, previous.of(np.arange(2)), **options)
    long = score_heads(spread, previous.of(np.arange(3)), **options)

    assert np.isnan(short.means[0, 0])
    np.testing.assert_allclose((short + long).means[0, 0], 1.0)
    np.testing.assert_allclose((short + long).means[0, 1], (short.means[0, 1] + long.means[0, 1]) / 2)


def test_attention_that_is_not_a_number_gives_a_score_that_is_none():
    attention = np.full((3, 1, 3), np.nan, np.float32)

    assert np.isnan(score_heads(attention, TRANSFORMERLENS_PATTERNS[0].of(np.arange(3))).means).all()


ids = hnp.arrays(np.int64, st.integers(1, 12), elements=st.integers(0, 3))
places = st.builds(
    Attended,
    to=st.sampled_from(["offset", "first", "same_token", "period", "tokens"]),
    offset=st.integers(-4, 0),
    tokens=st.frozensets(st.integers(0, 3), max_size=2),
    shift=st.integers(0, 3),
    which=st.sampled_from(["all", "nearest", "farthest"]),
)


def attended_keys(place: Attended, ids: list[int], query: int, period: int) -> set[int]:
    """Say one key at a time what a place means."""
    keys = []
    for key in range(query + 1):
        base = key - place.shift
        if base < 0:
            continue
        if {
            "offset": base == query + place.offset,
            "first": base == 0,
            "same_token": base < query and ids[base] == ids[query],
            "period": period > 0 and base == query - period and ids[base] == ids[query],
            "tokens": ids[base] in place.tokens,
        }[place.to]:
            keys.append(key)
    if place.which == "all" or not keys:
        return set(keys)
    return {max(keys) if place.which == "nearest" else min(keys)}


@given(ids, st.lists(places, min_size=1, max_size=3), st.integers(0, 4), st.integers(0, 5), st.data())
def test_places_are_what_they_say_alone_and_together(ids, places, period, start, data):
    stop = data.draw(st.none() | st.integers(1, 12))
    tokens = data.draw(st.none() | st.frozensets(st.integers(0, 3)))
    pattern = DetectionPattern("own", tuple(places), queries=Queries(start, stop, tokens)).of(ids, period)

    expected = np.zeros((len(ids), len(ids)))
    for query in range(len(ids)):
        meant = query >= start and (stop is None or query < stop) and (tokens is None or int(ids[query]) in tokens)
        for place in places if meant else ():
            expected[query, sorted(attended_keys(place, ids.tolist(), query, period))] = 1.0
    np.testing.assert_array_equal(pattern, expected)
    assert not np.triu(pattern, 1).any()


@pytest.mark.parametrize("n_before", [0, 1])
def test_stripes_are_diagonals_of_the_second_copy(n_before):
    """Offsets of one period and of one less, over the queries whose token stood there before."""
    piece = np.array([5, 9, 7, 8])
    ids = np.concatenate([np.zeros(n_before, np.int64), piece, piece])
    second = np.arange(n_before + 4, n_before + 8)

    for pattern, offset in ((DUPLICATE_STRIPE, 4), (INDUCTION_STRIPE, 3)):
        expected = np.zeros((len(ids), len(ids)))
        expected[second, second - offset] = 1.0
        np.testing.assert_array_equal(pattern.of(ids, 4), expected)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Documents of several lengths, with every layer's pattern."""
    texts = ["to be, or not to be: that is the question", "the end", "a\nb\nc\na\nb", "so so so so so so", "x"]
    folder = tmp_path_factory.mktemp("heads")
    corpus = folder / "corpus.jsonl"
    corpus.write_text("\n".join(f'{{"text": {text!r}}}'.replace("'", '"') for text in texts))
    recipe = make_recipe(corpus, hooks=[PATTERN])
    recipe["stages"][0] |= {"layout": "documents", "prepend_bos": True}
    run(recipe, folder / "run")
    return recipe, folder / "run"


def scored(stored, tmp_path, *patterns, **settings):
    """Score heads of the stored corpus and return the table."""
    recipe, folder = stored
    stage = {"stage": "score_heads", "patterns": list(patterns), **settings}
    run({**recipe, "stages": [stage]}, folder)
    return open_results(folder, "score_heads").table


def scores_of(table, name):
    rows = table[table["pattern"] == name].sort_values(["layer", "head"])
    return rows[["mul", "abs", "matched"]].to_numpy()


def test_patterns_in_words_and_in_files_give_the_same_scores(stored, tmp_path):
    length = 32
    save_file({"anything": torch.eye(length).roll(-2, 1).tril()}, tmp_path / "two.safetensors")
    np.save(tmp_path / "two.npy", np.eye(40, k=-2, dtype=np.int64))
    table = scored(
        stored,
        tmp_path,
        {"name": "words", "attend": {"offset": -2}},
        {"name": "npy", "file": str(tmp_path / "two.npy")},
        {"name": "safetensors", "file": str(tmp_path / "two.safetensors")},
        "previous_token_head",
        {"name": "before", "attend": {"offset": -1}},
        "induction_head",
        {"name": "after-equals", "attend": {"to": "same_token", "shift": 1}},
    )

    for one, other in (("words", "npy"), ("words", "safetensors"), ("previous_token_head", "before")):
        np.testing.assert_array_equal(scores_of(table, one), scores_of(table, other))
    np.testing.assert_array_equal(scores_of(table, "induction_head"), scores_of(table, "after-equals"))
    assert not np.array_equal(scores_of(table, "words"), scores_of(table, "before"))


def test_texts_of_tokens_are_matched_one_by_one(stored, tmp_path):
    line = {"to": "tokens", "match": "^\n$", "which": "nearest"}
    table = scored(
        stored,
        tmp_path,
        {"name": "line", "attend": line},
        {"name": "both", "attend": [line, {"to": "bos"}], "queries": {"start": 1, "match": "[abc]"}},
    )
    store = open_store(stored[1])

    shares = {"line": [], "both": []}
    for sequence in store.tokens.read_sequences():
        texts = [store.decode(np.array([token])) for token in sequence.ids]
        attention = store.array("blocks.1.attn.hook_pattern").read(sequence.first_row, sequence.row_stop)[:, 3]
        for query in range(len(texts)) if len(texts) > 1 else ():
            lines = [key for key in range(query + 1) if texts[key] == "\n"][-1:]
            if lines:
                shares["line"].append(attention[query, lines].sum(dtype=np.float64))
            if query and re.search("[abc]", texts[query]):
                shares["both"].append(attention[query, [0, *lines]].sum(dtype=np.float64))
    for name, expected in shares.items():
        assert len(expected) > 3
        row = table[(table["pattern"] == name) & (table["layer"] == 1) & (table["head"] == 3)]
        assert row["matched"].item() == pytest.approx(np.mean(expected))


def test_of_windows_only_the_stored_queries_count_with_all_their_keys(corpus, tmp_path):
    recipe = make_recipe(corpus, hooks=[PATTERN])
    recipe["stages"][0] |= {"layout": "documents", "context_length": 20, "overflow": "windows", "stride": 7}
    recipe["stages"].append({"stage": "score_heads", "patterns": ["previous_token_head", "duplicate_token_head"]})
    run(recipe, tmp_path / "run")
    store, table = open_store(tmp_path / "run"), open_results(tmp_path / "run", "score_heads").table

    shares = {"previous_token_head": [], "duplicate_token_head": []}
    for sequence in store.tokens.read_sequences():
        for row in range(sequence.first_row, sequence.row_stop):
            query = row - sequence.first_row + sequence.n_context
            attention = store.rows("blocks.0.attn.hook_pattern", [row])[0, 1].astype(np.float64)
            earlier = [key for key in range(query) if sequence.ids[key] == sequence.ids[query]]
            if query:
                shares["previous_token_head"].append(attention[query - 1])
            if earlier:
                shares["duplicate_token_head"].append(attention[earlier].sum())
    assert any(sequence.n_context for sequence in store.tokens.read_sequences())
    for name, expected in shares.items():
        row = table[(table["pattern"] == name) & (table["layer"] == 0) & (table["head"] == 1)]
        assert row["matched"].item() == pytest.approx(np.mean(expected), rel=1e-5)


def test_another_file_under_the_same_name_is_another_result(stored, tmp_path):
    file = tmp_path / "own.npy"
    found = []
    for offset in (-1, -2):
        np.save(file, np.eye(32, k=offset))
        found.append(scores_of(scored(stored, tmp_path, {"name": "own", "file": str(file)}), "own"))

    assert not np.array_equal(*found)


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (np.ones((32, 31)), r"has the shape \(32, 31\); a pattern is square"),
        (np.eye(31), "31 tokens long and the context 32; make it at least as long"),
        (np.eye(32, k=1), "query 0 attends to key 1, which comes after it; .* transpose the matrix"),
        (np.tril(np.full((32, 32), np.nan)), "not finite; put 0"),
        (np.array("text"), "cannot take .* as a detection pattern"),
        (None, "cannot take .*No such file"),
    ],
    ids=["oblong", "short", "upper", "nan", "text", "missing"],
)
def test_what_is_no_pattern_is_refused_before_anything_runs(stored, tmp_path, matrix, message):
    if matrix is not None:
        np.save(tmp_path / "own.npy", matrix)

    with pytest.raises(ActpipeError, match=message):
        scored(stored, tmp_path, {"name": "own", "file": str(tmp_path / "own.npy")})


def test_a_safetensors_file_of_two_tensors_and_other_files_are_refused(stored, tmp_path):
    save_file({"one": torch.eye(32), "two": torch.eye(32)}, tmp_path / "own.safetensors")
    (tmp_path / "own.csv").write_text("1,0\n1,1\n")

    for name, message in (("own.safetensors", "holds one, two, and a pattern is one"), ("own.csv", "ends neither in")):
        with pytest.raises(ActpipeError, match=message):
            scored(stored, tmp_path, {"name": "own", "file": str(tmp_path / name)})


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ({"attend": {"offset": 1}}, "less than or equal to 0"),
        ({"attend": {}}, "exactly one of `offset` and `to`"),
        ({"attend": {"offset": -1, "shift": 1}}, "one place already"),
        ({"attend": {"to": "first", "ids": [3]}}, "belong together"),
        ({"attend": {"to": "tokens"}}, "belong together"),
        ({"attend": {"to": "tokens", "match": "("}}, "not a regular expression"),
        ({"attend": {"to": "tokens", "match": "no such token"}}, "no token of the vocabulary matches"),
        ({"attend": {"to": "tokens", "ids": [512]}}, "token 512, outside the vocabulary of 512"),
        ({"attend": {"to": "same_token"}, "queries": {"ids": [10**6]}}, "token 1000000, outside"),
        ({"attend": {"to": "period"}}, "have no column 'period'"),
        ({}, "exactly one of `attend` and `file`"),
        ({"attend": {"to": "first"}, "file": "x.npy"}, "exactly one of `attend` and `file`"),
    ],
    ids=str,
)
def test_patterns_that_make_no_sense_are_refused(stored, tmp_path, pattern, message):
    with pytest.raises(ActpipeError, match=message):
        scored(stored, tmp_path, {"name": "own", **pattern})


def test_two_patterns_of_one_name_are_refused(stored, tmp_path):
    with pytest.raises(ActpipeError, match="two of one name"):
        scored(stored, tmp_path, "induction_head", {"name": "induction_head", "attend": {"offset": -1}})


def test_stripes_need_a_period(stored, tmp_path):
    with pytest.raises(ActpipeError, match="have no column 'period'"):
        scored(stored, tmp_path, "induction_stripe")

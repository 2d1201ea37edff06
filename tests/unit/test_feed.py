"""What a feed takes from a run, and what it refuses."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from feeding import POST, PRE, write_store
from support import INDUCTION, TEXTS, make_recipe, run
from torch.utils.data import DataLoader

from actpipe import ActivationLoader, HookedModel, LiveActivationLoader, open_store
from actpipe.errors import (
    DatasetError,
    DtypeOverflowError,
    IncompleteStoreError,
    StoreMismatchError,
    UnknownHookError,
)

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run in bfloat16 over documents with a text, a number and a number that is missing at times."""
    folder = tmp_path_factory.mktemp("feed")
    path = folder / "corpus.jsonl"
    documents = [
        {"id": f"doc-{i}", "text": TEXTS[i % 6], "speaker": "xyz"[i % 3], "line": i, "score": None if i % 4 else i / 2}
        for i in range(30)
    ]
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))
    recipe = make_recipe(path, hooks=["blocks.*.hook_resid_post", "blocks.0.attn.hook_z"], dtype="bfloat16")
    run(recipe, folder / "run")
    return folder / "run"


@pytest.fixture
def store(tmp_path):
    return write_store(tmp_path / "store", 200, 32)


def join(batches, name="row"):
    return torch.cat([batch[name] for batch in batches])


class TestRows:
    def test_batches_hold_what_the_store_holds(self, finished):
        store = open_store(finished)
        names = [HOOK, "blocks.0.attn.hook_z", "tokens/input_ids", "tokens/position"]
        for shuffle in ("rows", "blocks", None):
            for batch in ActivationLoader(finished, names, 50, shuffle):
                assert set(batch) == {*names, "row"}
                assert batch[HOOK].dtype == torch.bfloat16
                for name in names:
                    stored = store.rows(name, batch["row"].numpy())
                    assert torch.equal(batch[name].float(), torch.from_numpy(stored.astype(np.float32)))

    def test_patterns_and_short_names_are_understood(self, finished):
        batch = next(iter(ActivationLoader(finished, ["blocks.*.hook_resid_post", ("z", 0)])))

        assert set(batch) == {"blocks.0.hook_resid_post", HOOK, "blocks.0.attn.hook_z", "row"}

    def test_rows_of_a_shuffled_batch_stand_as_in_the_store(self, store):
        for batch in ActivationLoader(store, PRE, 64, "rows"):
            assert batch["row"].tolist() == sorted(batch["row"].tolist())

    def test_without_shuffling_rows_come_in_order(self, store):
        assert join(ActivationLoader(store, PRE, 64, None)).tolist() == list(range(200))

    def test_special_tokens_are_left_out_on_request(self, finished):
        store = open_store(finished)
        ids = store.array("tokens/input_ids").read(0, store.n_rows)
        special = {store.tokens.manifest.bos_id, store.tokens.manifest.separator_id} - {None}
        kept = join(ActivationLoader(finished, HOOK, drop_special=True))

        assert special & set(ids.tolist())
        assert sorted(kept.tolist()) == np.flatnonzero(~np.isin(ids, list(special))).tolist()
        named = join(ActivationLoader(store, HOOK, drop_special=[int(ids[3]), 10**6]))
        assert sorted(named.tolist()) == np.flatnonzero(ids != ids[3]).tolist()

    def test_the_last_short_batch_comes_unless_it_is_to_be_dropped(self, store):
        assert [len(batch["row"]) for batch in ActivationLoader(store, PRE, 64)] == [64, 64, 64, 8]
        assert [len(batch["row"]) for batch in ActivationLoader(store, PRE, 64, drop_last=True)] == [64, 64, 64]

    def test_an_unfinished_store_gives_its_committed_parts_on_request_only(self, store):
        (store.folder.commits / "part-00000001.json").unlink()

        with pytest.raises(IncompleteStoreError, match="has 6 of 7 parts; run its recipe again"):
            ActivationLoader(store.folder.root, PRE)
        rows = join(ActivationLoader(store, PRE, partial=True)).tolist()
        assert sorted(rows) == [*range(32), *range(64, 200)]


class TestDocuments:
    def test_the_splits_share_the_rows_and_no_document(self, finished):
        options = {"labels": ["line"], "validation_fraction": 0.3}
        train, held_out = [
            list(ActivationLoader(finished, HOOK, split=split, **options)) for split in ("train", "validation")
        ]

        assert sorted([*join(train).tolist(), *join(held_out).tolist()]) == list(range(open_store(finished).n_rows))
        assert not set(join(train, "line").tolist()) & set(join(held_out, "line").tolist())
        other = list(ActivationLoader(finished, HOOK, split="validation", split_seed=1, **options))
        assert sorted(join(other).tolist()) != sorted(join(held_out).tolist())

    def test_labels_are_those_of_the_rows_documents(self, finished):
        store = open_store(finished)
        loader = ActivationLoader(finished, HOOK, 40, labels=["speaker", "line", "score"])
        batches = list(loader)
        rows, lines = join(batches), join(batches, "line")

        assert loader.classes == {"speaker": ("x", "y", "z")}
        for number in range(30):
            own = torch.from_numpy(np.isin(rows.numpy(), store.document(number).rows))
            assert own.any()
            assert (lines[own] == number).all()
            assert (join(batches, "speaker")[own] == number % 3).all()
            scores = join(batches, "score")[own]
            assert scores.isnan().all() if number % 4 else (scores == number / 2).all()

    def test_columns_that_are_no_labels_are_refused(self, finished):
        with pytest.raises(DatasetError, match=r"no column 'speakr', only .*did you mean 'speaker'"):
            ActivationLoader(finished, HOOK, labels=["speakr"])

    def test_corpora_without_documents_have_no_splits(self, tmp_path, finished):
        copy = Path(shutil.copytree(finished, tmp_path / "run"))
        commit = copy / "commits/tokens.json"
        commit.write_text(commit.read_text().replace('"packed"', '"tl3"'))

        with pytest.raises(IncompleteStoreError, match="keeps no track of documents"):
            ActivationLoader(copy, HOOK, split="train")


class TestSeveralRuns:
    def test_all_rows_of_all_runs_come_once(self, store, tmp_path):
        other = write_store(tmp_path / "other", 90, 32, first=1000)
        batches = list(ActivationLoader([store, other.folder.root], PRE, 32, "blocks", block_rows=4))
        pairs = zip(join(batches, "source").tolist(), join(batches).tolist(), strict=True)

        assert sorted(pairs) == [(0, row) for row in range(200)] + [(1, row) for row in range(90)]
        assert torch.equal(join(batches, PRE)[:, 0], join(batches) + 1000.0 * join(batches, "source"))

    def test_weights_are_the_shares_of_the_runs(self, store, tmp_path):
        other = write_store(tmp_path / "other", 90, 32)
        batches = list(ActivationLoader([store, other], PRE, 32, weights=[1, 3]))

        assert torch.bincount(join(batches, "source")).tolist() == [30, 90]

    def test_runs_that_do_not_fit_are_refused(self, store, tmp_path):
        other = write_store(tmp_path / "other", 90, 32, dtype="float16")
        with pytest.raises(StoreMismatchError, match=r"cannot mix blocks\.0.hook_resid_pre: rows are float32"):
            ActivationLoader([store, other], PRE)
        with pytest.raises(ValueError, match="weights must be 2 numbers above zero"):
            ActivationLoader([store, store], PRE, weights=[1, 0])


class TestNormalizing:
    def test_mean_norm_makes_the_mean_norm_the_root_of_the_size(self, finished):
        loader = ActivationLoader(finished, HOOK, normalize="mean_norm")
        rows = join(loader, HOOK)

        assert rows.dtype == torch.float32
        assert rows.norm(dim=1).mean() == pytest.approx(rows.shape[1] ** 0.5, rel=1e-5)
        raw = join(ActivationLoader(finished, HOOK), HOOK).float()
        torch.testing.assert_close(loader.denormalize(HOOK, rows), raw)

    def test_standardizing_brings_each_number_to_mean_0_and_deviation_1(self, finished):
        loader = ActivationLoader(finished, [HOOK, "blocks.0.attn.hook_z"], normalize="standardize")
        for name in (HOOK, "blocks.0.attn.hook_z"):
            rows = join(loader, name)
            torch.testing.assert_close(rows.mean(0), torch.zeros(rows.shape[1:]), atol=1e-4, rtol=0)
            torch.testing.assert_close(rows.std(0, correction=0), torch.ones(rows.shape[1:]), atol=1e-4, rtol=0)

    def test_a_number_that_never_changes_is_not_scaled(self, tmp_path):
        store = write_store(tmp_path, 1, 1, first=5)
        (batch,) = ActivationLoader(store, PRE, normalize="standardize")

        assert (batch[PRE] == 0).all()

    def test_statistics_can_be_those_of_another_feed(self, finished):
        train = ActivationLoader(finished, HOOK, split="train", normalize="mean_norm")
        held_out = ActivationLoader(
            finished, HOOK, split="validation", normalize="mean_norm", statistics=train.statistics
        )

        assert torch.equal(held_out.statistics[HOOK]["scale"], train.statistics[HOOK]["scale"])
        with pytest.raises(ValueError, match=r"statistics say nothing of blocks\.0"):
            ActivationLoader(finished, "blocks.0.*", normalize="mean_norm", statistics=train.statistics)

    def test_activations_are_given_in_the_type_asked_for(self, finished):
        (batch,) = ActivationLoader(finished, [HOOK, "tokens/input_ids"], dtype="float32")

        assert (batch[HOOK].dtype, batch["tokens/input_ids"].dtype) == (torch.float32, torch.int32)

    def test_values_that_do_not_fit_the_type_are_an_error(self, tmp_path):
        store = write_store(tmp_path, 4, 4, first=10**6)
        with pytest.raises(DtypeOverflowError, match=r"16 values of blocks\.0.hook_resid_pre in one batch do not fit"):
            list(ActivationLoader(store, PRE, dtype="float16"))


class TestWorkers:
    @pytest.mark.parametrize("shuffle", ["rows", "blocks"])
    def test_workers_share_an_epoch_and_resume(self, store, shuffle):
        options = {"batch_size": 16, "shuffle": shuffle, "block_rows": 4, "buffer_rows": 64}

        def batches(loader):
            return [batch["row"].tolist() for batch in DataLoader(loader, batch_size=None, num_workers=2)]

        whole = ActivationLoader(store, PRE, **options)
        expected = batches(whole)
        assert sorted(row for rows in expected for row in rows) == list(range(200))
        if shuffle == "rows":
            assert expected == [batch["row"].tolist() for batch in ActivationLoader(store, PRE, **options)]
        resumed = ActivationLoader(store, PRE, **options)
        resumed.load_state_dict(whole.state_dict(batch=5, num_workers=2))
        assert batches(resumed) == expected[5:]
        whole.set_epoch(1)
        assert batches(whole) != expected

    def test_blocks_resume_with_as_many_workers_only(self, store):
        loader = ActivationLoader(store, PRE, 16, "blocks")
        loader.load_state_dict(loader.state_dict(batch=3, num_workers=2))

        with pytest.raises(StoreMismatchError, match="taken with 2 workers, here are 1"):
            next(iter(loader))


class TestStates:
    def test_breaking_off_begins_the_epoch_again(self, store):
        loader = ActivationLoader(store, PRE, 64)
        first = next(iter(loader))["row"]

        assert torch.equal(next(iter(loader))["row"], first)

    @pytest.mark.parametrize("shuffle", ["rows", "blocks", None])
    def test_epochs_in_one_are_the_epochs_one_by_one(self, store, shuffle):
        options = {"batch_size": 32, "shuffle": shuffle, "block_rows": 8, "buffer_rows": 64}
        one_by_one, at_once = (ActivationLoader(store, PRE, **options) for _ in range(2))
        expected = [batch["row"].tolist() for _ in range(3) for batch in one_by_one]
        seen, states = [], []
        for batch in at_once.epochs(3):
            seen.append(batch["row"].tolist())
            states.append(copy.deepcopy(at_once.state_dict()))

        assert seen == expected
        assert at_once.epoch == one_by_one.epoch == 3
        assert [state["epoch"] for state in states] == [0] * 7 + [1] * 7 + [2] * 7
        for taken in (3, 7, 9):
            resumed = ActivationLoader(store, PRE, **options)
            resumed.load_state_dict(states[taken - 1])
            left = 3 - resumed.epoch
            assert [batch["row"].tolist() for batch in resumed.epochs(left)] == expected[taken:]
            assert resumed.epoch == 3

    def test_no_epochs_are_no_batches(self, store):
        loader = ActivationLoader(store, PRE)
        assert list(loader.epochs(0)) == []
        assert loader.epoch == 0

    def test_a_state_survives_saving(self, finished, tmp_path):
        loader = ActivationLoader(finished, HOOK, 32, normalize="standardize")
        next(iter(loader))
        torch.save(loader.state_dict(), tmp_path / "state.pt")
        other = ActivationLoader(finished, HOOK, 32, normalize="standardize", statistics_rows=64)
        other.load_state_dict(torch.load(tmp_path / "state.pt"))

        assert (loader.state_dict()["epoch"], loader.state_dict()["batch"]) == (0, 1)
        assert torch.equal(other.statistics[HOOK]["mean"], loader.statistics[HOOK]["mean"])

    @pytest.mark.parametrize("change", [{"seed": 1}, {"batch_size": 8}, {"drop_special": [3]}, {"shuffle": None}])
    def test_a_state_of_another_feed_is_refused(self, store, change):
        state = ActivationLoader(store, PRE, **({"batch_size": 16} | change)).state_dict()
        # the store of the tests has no token table, and lists of ids need none
        with pytest.raises(StoreMismatchError, match="cannot resume: "):
            ActivationLoader(store, PRE, batch_size=16).load_state_dict(state)

    def test_waiting_is_measured(self, store):
        loader = ActivationLoader(store, PRE, 64)
        assert loader.wait_fraction == 0
        list(loader)

        assert loader.wait_seconds > 0
        assert 0 < loader.wait_fraction <= 1

    def test_an_error_while_reading_reaches_the_consumer(self, store):
        shutil.rmtree(store.folder.store / f"activations/{POST}/c/3")

        with pytest.raises(IncompleteStoreError, match=r"part 3 of activations/blocks\.0.hook_resid_post is not there"):
            list(ActivationLoader(store, POST, 16))


class TestArguments:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"batch_size": 0}, "batch_size must be at least 1"),
            ({"shuffle": "row"}, "shuffle must be 'rows', 'blocks' or None"),
            ({"rank": 2, "world_size": 2}, "rank 2 is not one of 2"),
            ({"rank": 0}, "give both rank and world_size"),
            ({"dtype": "float7"}, "dtype must be a floating type of torch, got 'float7'"),
            ({"normalize": "whiten"}, "normalize must be one of mean_norm, standardize"),
            ({"split": "test"}, "split must be 'train', 'validation' or None"),
            ({"split": "train", "validation_fraction": 1.0}, "between 0 and 1"),
            ({"drop_special": range(7)}, "source 0 has no rows left"),
            ({"seed": -1}, "seed must not be negative"),
            ({"read_ahead": -1}, "read_ahead must not be negative"),
        ],
    )
    def test_wrong_arguments_are_named(self, store, arguments, message):
        with pytest.raises(ValueError, match=message):
            ActivationLoader(store, PRE, **arguments)

    def test_arrays_that_are_not_there_are_named(self, store, finished):
        with pytest.raises(UnknownHookError, match=r"did you mean 'blocks\.0.hook_resid_pre'"):
            ActivationLoader(store, "blocks.0.hook_resid_pr")
        with pytest.raises(UnknownHookError, match="at least one array"):
            ActivationLoader(finished, [])


@pytest.fixture(scope="module")
def model():
    return HookedModel.from_pretrained(str(INDUCTION), dtype="float32", device="cpu")


class TestLive:
    """The same batches without a store."""

    NAMES = ("blocks.0.attn.hook_z", HOOK)

    def live(self, model, run, **options):
        return LiveActivationLoader(model, run, list(self.NAMES), 40, batch_tokens=70, **options)

    def test_it_gives_the_rows_that_a_store_has(self, model, finished):
        options = {"split": "train", "drop_special": True, "labels": ["line"]}
        live = list(self.live(model, finished, buffer_rows=100, **options))
        stored = list(ActivationLoader(finished, list(self.NAMES), 40, None, **options))
        order = join(live).argsort()

        assert join(live).tolist() != join(stored).tolist()
        assert torch.equal(join(live)[order], join(stored))
        assert torch.equal(join(live, "line")[order], join(stored, "line"))
        for name in self.NAMES:
            close = torch.isclose(join(live, name)[order], join(stored, name).float(), rtol=0.01, atol=0.01)
            assert close.all()

    def test_in_order_it_gives_rows_as_stored(self, model, finished):
        rows = join(self.live(model, finished, shuffle=False)).tolist()

        assert rows == list(range(open_store(finished).n_rows))

    @pytest.mark.parametrize("world_size", [1, 2])
    def test_it_resumes_with_the_same_batches(self, model, finished, world_size):
        everything = []
        for rank in range(world_size):
            options = {"rank": rank, "world_size": world_size, "buffer_rows": 120, "normalize": "mean_norm"}
            whole = self.live(model, finished, **options)
            batches = list(whole)
            everything += join(batches).tolist()
            whole.set_epoch(0)
            resumed = self.live(model, finished, statistics=whole.statistics, **options)
            resumed.load_state_dict(whole.state_dict(batch=4))
            rest = list(resumed)
            assert len(rest) == len(batches) - 4
            for ours, theirs in zip(rest, batches[4:], strict=True):
                assert torch.equal(ours["row"], theirs["row"])
                assert all(torch.equal(ours[name], theirs[name]) for name in self.NAMES)
        assert sorted(everything) == list(range(open_store(finished).n_rows))

    def test_windows_give_each_token_once(self, model, finished, tmp_path):
        corpus = tmp_path / "corpus.jsonl"
        corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
        recipe = make_recipe(corpus, hooks=[HOOK])
        recipe["stages"][0] |= {"layout": "documents", "overflow": "windows", "context_length": 16}
        run(recipe, tmp_path / "run")
        (live,) = LiveActivationLoader(model, tmp_path / "run", HOOK, 10**4)
        rows = live["row"].argsort()

        stored = open_store(tmp_path / "run").array(HOOK).read(0, len(rows))
        torch.testing.assert_close(live[HOOK][rows], torch.from_numpy(np.array(stored)), rtol=1e-4, atol=1e-4)

    def test_what_has_no_fixed_size_or_no_process_is_refused(self, model, finished):
        with pytest.raises(UnknownHookError, match="cannot be fed: its rows are as long as the text"):
            LiveActivationLoader(model, finished, "blocks.0.attn.hook_pattern")
        with pytest.raises(ValueError, match="leave out num_workers"):
            list(DataLoader(self.live(model, finished), batch_size=None, num_workers=1))

"""A run in an object store is the run that a disk would hold. The server speaks S3 on loopback."""

from __future__ import annotations

import functools
import http.server
import json
import os
import shutil
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import obstore
import pytest
from feeding import POST, PRE, write_store
from object_store import Proxy, flaky, in_between, objects
from obstore.store import S3Store
from rich.console import Console
from support import TEXTS, all_bytes, make_recipe, run
from torch.utils.data import DataLoader

import actpipe
from actpipe.describing import verify_run
from actpipe.errors import IncompleteStoreError, RunInUseError, StorageError, StoreMismatchError
from actpipe.jobs.blocks import even_blocks, map_and_sum
from actpipe.repairing import repair_run
from actpipe.status import read_status
from actpipe.stores import remote as remote_module
from actpipe.stores.fetching import AT_ONCE
from actpipe.stores.layout import RunFolder
from actpipe.stores.locking import Owner
from actpipe.stores.reading import ActivationStore
from actpipe.stores.remote import Remote, as_url, local_folder, remote_of
from actpipe.telemetry import Telemetry

HOOK = "blocks.0.hook_resid_post"
PATIENCE = 60
"""Seconds after which something that should have happened counts as never happening."""
QUIET = Telemetry(Console(quiet=True))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "lines.txt"
    path.write_text("\n".join(TEXTS * 3))
    return path


def forget(url):
    """Be another machine, which has never seen the run."""
    shutil.rmtree(Remote.in_front_of(url).folder)
    remote_module._marked.cache_clear()
    remote_module._OPENED.clear()


def test_it_holds_the_same_bytes_and_reads_the_same_elsewhere(bucket, corpus, tmp_path):
    url, recipe = f"s3://{bucket}/runs/one", make_recipe(corpus, metrics=["loss"])
    run(recipe, url)
    run(recipe, tmp_path / "local")
    there = {name.removeprefix("runs/one/"): data for name, data in objects(bucket).items()}
    local = all_bytes(tmp_path / "local")

    assert local.pop("run.yaml")
    assert there.pop("run.yaml")
    assert there.pop("log.jsonl")
    assert there == local
    forget(url)
    store, plain = actpipe.open_store(url), actpipe.open_store(tmp_path / "local")
    np.testing.assert_array_equal(store[HOOK].compute(), plain[HOOK].compute())
    assert store.document(2).text == plain.document(2).text
    for shuffle in ("rows", "blocks"):
        mine, theirs = (
            [batch[HOOK] for batch in actpipe.ActivationLoader(place, HOOK, 16, shuffle, seed=1)]
            for place in (url, tmp_path / "local")
        )
        assert all(bool((one == other).all()) for one, other in zip(mine, theirs, strict=True))


def test_cut_off_it_is_finished_on_another_machine(bucket, corpus, tmp_path, monkeypatch):
    url, recipe = f"s3://{bucket}/run", make_recipe(corpus)
    put, n_parts = Remote.put, 0

    def put_two_parts(remote, *paths):
        nonlocal n_parts
        n_parts += any(path.name.startswith("part-") for path in paths)
        if n_parts > 2:
            raise StorageError("cut off")
        put(remote, *paths)

    with monkeypatch.context() as patch:
        patch.setattr(Remote, "put", put_two_parts)
        with pytest.raises(StorageError, match="cut off"):
            run(recipe, url)
    assert sum("commits/part-" in name for name in objects(bucket)) == 2
    forget(url)
    with pytest.raises(IncompleteStoreError, match="2 of"):
        actpipe.open_store(url)
    run(recipe, url)

    run(recipe, tmp_path / "local")
    assert objects(bucket)["run/store.zarr/zarr.json"] == (tmp_path / "local/store.zarr/zarr.json").read_bytes()
    np.testing.assert_array_equal(
        actpipe.open_store(url)[HOOK].compute(), actpipe.open_store(tmp_path / "local")[HOOK].compute()
    )
    assert verify_run(url)[0] == []


def test_its_status_is_seen_from_elsewhere_and_nothing_is_touched(bucket, corpus, monkeypatch):
    url, recipe = f"s3://{bucket}/run", make_recipe(corpus)
    put, seen = Remote.put, []

    def put_and_look(remote, *paths):
        put(remote, *paths)
        if any(path.name == "part-00000001.json" for path in paths):
            seen.append(read_status(url))
            raise StorageError("cut off")

    with monkeypatch.context() as patch:
        patch.setattr(Remote, "put", put_and_look)
        with pytest.raises(StorageError, match="cut off"):
            run(recipe, url)
    forget(url)
    before = objects(bucket)
    (at_work,), cut_off = seen, read_status(url)

    assert (at_work.run, at_work.state, at_work.corpora[0].parts_done) == (url, "at work", 2)
    assert at_work.stages[1].state == "at work"
    assert (cut_off.state, cut_off.corpora[0].parts_done) == ("killed", 2)
    assert objects(bucket) == before
    assert not Path(os.environ["ACTPIPE_CACHE"]).exists() or not list(Path(os.environ["ACTPIPE_CACHE"]).iterdir())
    run(recipe, url)
    assert (read_status(url).state, read_status(url).attempts) == ("finished", 2)
    with pytest.raises(IncompleteStoreError, match="there is no run at"):
        read_status(f"s3://{bucket}/nothing")


@pytest.mark.parametrize("harm", ["truncated", "flipped", "missing", "foreign"])
def test_verify_looks_at_what_is_there(bucket, corpus, harm):
    url = f"s3://{bucket}/run"
    run(make_recipe(corpus), url)
    actpipe.open_store(url)[HOOK].compute()
    store, name = S3Store(bucket), f"run/store.zarr/activations/{HOOK}/c/1/0"
    data = objects(bucket)[name]
    if harm == "missing":
        obstore.delete(store, name)
    else:
        broken = {"truncated": data[:-4], "flipped": data[:-1] + bytes([data[-1] ^ 1]), "foreign": b"other"}[harm]
        obstore.put(store, name.replace("/1/0", "/77/0") if harm == "foreign" else name, broken)

    assert len(verify_run(url)[0]) == 1
    if harm != "foreign":
        assert len(repair_run(url, telemetry=QUIET).mended) == 1
        assert objects(bucket)[name] == data
        assert verify_run(url)[0] == []


def test_fetched_chunks_keep_to_their_bound(bucket, corpus, monkeypatch):
    url = f"s3://{bucket}/run"
    run(make_recipe(corpus), url)
    forget(url)
    monkeypatch.setenv("ACTPIPE_CACHE_BYTES", "100000")
    store = actpipe.open_store(url)
    folder = local_folder(url)
    whole = store[HOOK].compute()
    chunks = [path for path in (folder / "store.zarr").rglob("c/*/*") if path.is_file()]

    assert whole.nbytes > 100_000
    assert 0 < sum(path.stat().st_size for path in chunks) <= 100_000
    np.testing.assert_array_equal(store[HOOK].compute(), whole)


def test_another_run_at_work_there_is_left_alone(bucket, corpus):
    url, store = f"s3://{bucket}/run", S3Store(bucket)
    owner = {"host": "elsewhere", "pid": 7, "started": Owner.this_process().started}
    obstore.put(store, "run/.lock", json.dumps(owner).encode())
    with pytest.raises(StoreMismatchError, match="process 7 on elsewhere"):
        run(make_recipe(corpus), url)
    obstore.put(store, "run/.lock", json.dumps({**owner, "host": Owner.this_process().host, "pid": 2**22 + 1}).encode())
    run(make_recipe(corpus), url)
    assert "run/.lock" not in objects(bucket)


def test_a_run_that_lost_its_lock_removes_nothing_of_the_new_owners(bucket, corpus, monkeypatch):
    url, store, put = f"s3://{bucket}/run", S3Store(bucket), Remote.put
    theirs = {
        "run/.lock": json.dumps({"host": "elsewhere", "pid": 7, "started": "2026-01-01T00:00:00"}).encode(),
        "run/results/theirs.json": b"{}",
    }

    def put_and_lose(remote, *paths):
        put(remote, *paths)
        if any(path.name == "part-00000001.json" for path in paths):
            for name, data in theirs.items():
                obstore.put(store, name, data)

    monkeypatch.setattr(Remote, "put", put_and_lose)
    with pytest.raises(RunInUseError, match="taken over by process 7 on elsewhere"):
        run(make_recipe(corpus), url)
    found = objects(bucket)
    assert {name: found.get(name) for name in theirs} == theirs


def test_other_peoples_files_are_left_alone(bucket, corpus):
    obstore.put(S3Store(bucket), "run/thesis.tex", b"chapter 1")
    with pytest.raises(StoreMismatchError, match=r"holds other files and no run, such as thesis\.tex"):
        run(make_recipe(corpus), f"s3://{bucket}/run")
    assert set(objects(bucket)) == {"run/thesis.tex"}


class Watched(Proxy):
    """Notes which chunks are asked for, and holds all but the first back until so many have been."""

    def meet(self):
        if self.command != "GET" or "/c/" not in self.path:
            return False
        part = int(self.path.split("/c/")[1].split("/")[0])
        with self.changed:
            self.asked.append(part)
            self.changed.notify_all()
            if part and not self.changed.wait_for(lambda: len(self.asked) >= type(self).together, PATIENCE):
                self.in_vain.append(part)
        return part == self.forbidden and self.refuse(403)


@contextmanager
def watched(monkeypatch, server, *, together=0, forbidden=None):
    attributes = {"asked": [], "in_vain": [], "changed": threading.Condition(), "together": together}
    with (
        in_between(Watched, server, forbidden=forbidden, **attributes) as (address, handler),
        monkeypatch.context() as patch,
    ):
        patch.setenv("AWS_ENDPOINT", address)
        yield handler


def test_a_server_that_refuses_and_cuts_off_is_asked_again(server, bucket, corpus, tmp_path, monkeypatch):
    with flaky(server) as (address, requests):
        monkeypatch.setenv("AWS_ENDPOINT", address)
        url = f"s3://{bucket}/run"
        run(make_recipe(corpus), url)
        forget(url)
        found = actpipe.open_store(url)[HOOK].compute()
        assert verify_run(url)[0] == []
    run(make_recipe(corpus), tmp_path / "local")

    assert requests() > 28
    np.testing.assert_array_equal(found, actpipe.open_store(tmp_path / "local")[HOOK].compute())


@pytest.fixture
def far_store(bucket):
    """Twelve parts of 40 rows in the bucket, and a function that opens them as a machine that has none of them."""
    url = f"s3://{bucket}/rows"
    write_store(Remote.in_front_of(url).folder, 480, 40)

    def open_elsewhere():
        forget(url)
        return ActivationStore(RunFolder(local_folder(url)))

    return open_elsewhere


@pytest.mark.parametrize("shuffle", ["rows", "blocks", None])
def test_the_feed_fetches_each_chunk_once_and_ahead(far_store, server, monkeypatch, shuffle):
    with watched(monkeypatch, server, together=6) as there:
        loader = actpipe.ActivationLoader(far_store(), PRE, 20, shuffle, block_rows=10, buffer_rows=100)
        batches = [batch for _ in range(2) for batch in loader]

    assert there.in_vain == []
    assert sorted(there.asked) == list(range(12))
    for batch in batches:
        assert (batch[PRE] == batch["row"][:, None]).all()


def test_analyses_fetch_each_chunk_once_and_ahead(far_store, server, monkeypatch):
    with watched(monkeypatch, server, together=6) as there:
        blocks = even_blocks(far_store(), [PRE], 4 * 4 * 40)
        total = map_and_sum(lambda block: block.read(PRE).astype(np.float64).sum(), blocks)

    assert len(blocks) == 12
    assert there.in_vain == []
    assert sorted(there.asked) == list(range(12))
    assert total == 4 * sum(range(480))


def test_a_cache_that_holds_a_few_chunks_feeds_a_whole_epoch(far_store, monkeypatch):
    store, chunk_bytes = far_store(), 40 * 4 * 4
    monkeypatch.setenv("ACTPIPE_CACHE_BYTES", str(4 * chunk_bytes))
    for options in ({"shuffle": None}, {"shuffle": "blocks", "block_rows": 40, "buffer_rows": 80}, {"shuffle": "rows"}):
        batches = list(actpipe.ActivationLoader(store, [PRE, POST], 20, **options))
        kept = [path.stat().st_size for path in store.folder.store.rglob("c/*/0")]

        assert 0 < sum(kept) <= 4 * chunk_bytes
        assert sorted(row for batch in batches for row in batch["row"].tolist()) == list(range(480))
        assert all((batch[POST] == -batch["row"][:, None]).all() for batch in batches)


def test_a_chunk_that_cannot_be_fetched_stops_the_feed_where_it_is_needed(far_store, server, monkeypatch):
    with watched(monkeypatch, server, forbidden=7):
        batches = iter(actpipe.ActivationLoader(far_store(), PRE, 40, None))
        taken = [next(batches)["row"][0].item() for _ in range(7)]
        with pytest.raises(StorageError, match="lets us not in"):
            next(batches)

    assert taken == list(range(0, 280, 40))


def test_a_feed_that_is_left_begins_no_further_fetch(far_store, server, monkeypatch):
    with watched(monkeypatch, server, together=100) as there:
        batches = iter(actpipe.ActivationLoader(far_store(), PRE, 40, None, read_ahead=0))
        next(batches)
        with there.changed:
            assert there.changed.wait_for(lambda: len(there.asked) == 1 + AT_ONCE, PATIENCE)
        batches.close()
        with there.changed:
            there.together = 0
            there.changed.notify_all()
        for thread in threading.enumerate():
            if thread.name.startswith("actpipe-fetch"):
                thread.join(PATIENCE)
                assert not thread.is_alive()

    assert there.in_vain == []
    assert sorted(there.asked) == list(range(1 + AT_ONCE))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_workers_are_refused_and_new_ones_feed(far_store):
    loader = actpipe.ActivationLoader(far_store(), PRE, 40)
    with pytest.raises(StorageError, match="multiprocessing_context='spawn'"):
        list(DataLoader(loader, batch_size=None, num_workers=1, multiprocessing_context="fork"))
    batches = DataLoader(loader, batch_size=None, num_workers=1, multiprocessing_context="spawn")

    assert sorted(row for batch in batches for row in batch["row"].tolist()) == list(range(480))


def test_a_server_that_is_gone_is_said_so(bucket, corpus, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(remote_module, "RETRY_SECONDS", 1)
    with pytest.raises(StorageError, match="out of reach"):
        actpipe.open_store(f"s3://{bucket}/gone")


def test_a_web_server_is_read_and_not_written(corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("ACTPIPE_CACHE", str(tmp_path / "cache"))
    run(make_recipe(corpus), tmp_path / "served" / "run")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path / "served"))
    ) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/run"
        store, local = actpipe.open_store(url), actpipe.open_store(tmp_path / "served" / "run")
        np.testing.assert_array_equal(store[HOOK].compute(), local[HOOK].compute())
        with pytest.raises(StorageError, match="read only"):
            run(make_recipe(corpus), url)
        with pytest.raises(StorageError, match="does not say what it holds"):
            read_status(url)
        server.shutdown()


def test_urls_are_told_from_folders(tmp_path):
    assert as_url("s3://bucket/run/") == "s3://bucket/run"
    assert as_url("s3:/bucket/run") == "s3://bucket/run"
    assert as_url("runs/s3") is None
    assert local_folder(tmp_path) == tmp_path
    assert remote_of(tmp_path) is None

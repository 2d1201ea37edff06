"""A run in an object store is the run that a disk would hold. The server speaks S3 on loopback."""

from __future__ import annotations

import functools
import http.server
import json
import shutil
import threading

import numpy as np
import obstore
import pytest
from object_store import flaky, objects
from obstore.store import S3Store
from rich.console import Console
from support import TEXTS, all_bytes, make_recipe, run

import actpipe
from actpipe.describing import verify_run
from actpipe.errors import IncompleteStoreError, StorageError, StoreMismatchError
from actpipe.repairing import repair_run
from actpipe.stores import remote as remote_module
from actpipe.stores.locking import Owner
from actpipe.stores.remote import Remote, as_url, local_folder, remote_of
from actpipe.telemetry import Telemetry

HOOK = "blocks.0.hook_resid_post"
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
    remote_module._opened.cache_clear()


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


def test_other_peoples_files_are_left_alone(bucket, corpus):
    obstore.put(S3Store(bucket), "run/thesis.tex", b"chapter 1")
    with pytest.raises(StoreMismatchError, match=r"holds other files and no run, such as thesis\.tex"):
        run(make_recipe(corpus), f"s3://{bucket}/run")
    assert set(objects(bucket)) == {"run/thesis.tex"}


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
        server.shutdown()


def test_urls_are_told_from_folders(tmp_path):
    assert as_url("s3://bucket/run/") == "s3://bucket/run"
    assert as_url("s3:/bucket/run") == "s3://bucket/run"
    assert as_url("runs/s3") is None
    assert local_folder(tmp_path) == tmp_path
    assert remote_of(tmp_path) is None

"""Rows on their way to the disk: off the device, bounded, with as many open files as they need."""

from __future__ import annotations

import errno
import os
import resource
import threading

import numpy as np
import pytest
import torch
from support import all_bytes, make_recipe, run

from actpipe import open_store
from actpipe.errors import StorageError
from actpipe.extraction import worker
from actpipe.extraction.staging import Staging
from actpipe.stores.writing import PartWriter, allow_open_files


@pytest.mark.parametrize(
    "rows",
    [
        torch.arange(12, dtype=torch.float32).reshape(3, 4),
        torch.arange(24, dtype=torch.bfloat16).reshape(2, 3, 4),
        torch.arange(12, dtype=torch.int64).reshape(4, 3).T,
        torch.zeros(0, 5),
    ],
)
def test_rows_on_the_host_land_as_they_are(rows):
    landing = Staging().send(rows)

    with landing.bytes() as data:
        assert landing.n_bytes == data.nbytes
        assert data.tobytes() == rows.contiguous().flatten().view(torch.uint8).numpy().tobytes()


@pytest.mark.gpu
def test_rows_of_a_device_land_whole_in_buffers_that_are_used_again():
    staging, seen = Staging(), set()
    for seed in range(6):
        rows = torch.randn(1000, 64, generator=torch.Generator().manual_seed(seed)).to(torch.float16)
        moved = rows.cuda()
        landing = staging.send(moved * 1)
        moved.zero_()
        with landing.bytes() as data:
            seen.add(data.__array_interface__["data"][0])
            np.testing.assert_array_equal(data.view(np.float16).reshape(1000, 64), rows.numpy())
    assert len(seen) == 1


def test_no_more_parts_are_begun_than_may_be_in_flight(corpus, tmp_path, monkeypatch):
    begun, most = set(), []
    commit, lock = PartWriter.commit, threading.Lock()

    class Counted(PartWriter):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            with lock:
                begun.add(self)
                most.append(len(begun))

        def commit(self):
            commit(self)
            with lock:
                begun.remove(self)

    monkeypatch.setattr(worker, "PartWriter", Counted)
    run(make_recipe(corpus, hooks=["hook_embed"], rows_per_part=32), tmp_path / "run")
    assert len(most) == open_store(tmp_path / "run").n_parts > worker.PARTS_IN_FLIGHT
    assert max(most) <= worker.PARTS_IN_FLIGHT + 1  # one may be leaving while the next begins


@pytest.fixture
def limits(monkeypatch):
    """Limits of open files that a test sets, in the place of the process's."""
    held = {"soft": 100, "hard": 5000}
    monkeypatch.setattr(resource, "getrlimit", lambda _: (held["soft"], held["hard"]))
    monkeypatch.setattr(resource, "setrlimit", lambda _, pair: held.update(soft=pair[0], hard=pair[1]))
    return held


def test_the_limit_of_open_files_rises_as_far_as_is_needed(limits):
    allow_open_files(1000)
    raised = limits["soft"]
    allow_open_files(10)

    assert 1000 < raised == limits["soft"] <= limits["hard"] == 5000


def test_more_open_files_than_the_system_allows_are_refused(limits):
    with pytest.raises(StorageError, match=r"need 9,256 open files, and this system allows 5,000"):
        allow_open_files(9000)


@pytest.mark.parametrize("refuses", [True, False])
def test_a_file_system_that_cannot_give_room_at_once_is_written_all_the_same(corpus, tmp_path, monkeypatch, refuses):
    run(make_recipe(corpus), tmp_path / "usual")
    if refuses:
        error = OSError(errno.EOPNOTSUPP, "not supported")
        monkeypatch.setattr(os, "posix_fallocate", lambda *_: (_ for _ in ()).throw(error))
    else:
        monkeypatch.delattr(os, "posix_fallocate")

    run(make_recipe(corpus), tmp_path / "run")
    assert all_bytes(tmp_path / "run") == all_bytes(tmp_path / "usual")

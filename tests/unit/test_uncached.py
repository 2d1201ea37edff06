"""Reading past the page cache: any place, any length, what is missing is said."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest
from feeding import POST, PRE, write_store
from hypothesis import given, settings
from hypothesis import strategies as st

from actpipe import ActivationLoader
from actpipe.errors import IncompleteStoreError
from actpipe.feed import stored
from actpipe.stores import uncached
from actpipe.stores.uncached import UncachedReader, open_uncached

SIZE = 3 * 2**20 + 12_345


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("uncached") / "file"
    path.write_bytes(np.random.default_rng(0).bytes(SIZE))
    return path


def read(path, *stretches):
    memories = [bytearray(n_bytes) for _, n_bytes in stretches]
    with open_uncached(str(path)) as file, UncachedReader() as reader:
        reader.read([(file, start, memoryview(into)) for (start, _), into in zip(stretches, memories, strict=True)])
    return memories


@settings(deadline=None, max_examples=50)
@given(ends=st.lists(st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)), max_size=20))
def test_it_reads_what_the_file_holds(path, ends):
    stretches = [(min(pair), max(pair) - min(pair)) for pair in ends]
    whole = path.read_bytes()

    assert read(path, *stretches) == [whole[start : start + n_bytes] for start, n_bytes in stretches]


@pytest.mark.parametrize("start", [0, 4096, SIZE - 10, SIZE, SIZE + 5000])
def test_a_file_that_ends_too_early_is_named(path, start):
    with pytest.raises(IncompleteStoreError, match="file is cut short"):
        read(path, (0, 100), (start, SIZE - start + 1 if start < SIZE else 1))


def test_where_a_file_system_has_no_such_way_files_are_read_as_usual(path, monkeypatch):
    really = os.open

    def refuse(name, flags, *rest):
        if flags & uncached._UNCACHED:
            raise OSError(errno.EINVAL, "no direct reading here")
        return really(name, flags, *rest)

    monkeypatch.setattr(uncached.os, "open", refuse)
    assert read(path, (5, 5000)) == [path.read_bytes()[5:5005]]


def test_a_disk_that_wants_more_than_pages_is_read_as_usual(path, monkeypatch):
    really, refused = os.preadv, []

    def refuse(file, buffers, offset):
        if not refused:
            refused.append(offset)
            raise OSError(errno.EINVAL, "not aligned")
        return really(file, buffers, offset)

    monkeypatch.setattr(uncached.os, "preadv", refuse)
    assert read(path, (5, 5000)) == [path.read_bytes()[5:5005]]
    assert refused


def test_other_errors_come_out(path, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "the disk is broken")

    monkeypatch.setattr(uncached.os, "preadv", fail)
    with pytest.raises(OSError, match="the disk is broken"):
        read(path, (5, 5000))


@pytest.mark.parametrize("shuffle", ["blocks", "rows", None])
def test_a_feed_of_more_than_memory_holds_gives_the_same_batches(tmp_path, monkeypatch, shuffle):
    store = write_store(tmp_path / "store", 1000, 96)
    options = {"batch_size": 64, "shuffle": shuffle, "block_rows": 32, "buffer_rows": 256}
    expected = list(ActivationLoader(store, [PRE, POST], **options))
    n_read = []
    read_all = UncachedReader.read
    monkeypatch.setattr(UncachedReader, "read", lambda reader, runs: (n_read.append(len(runs)), read_all(reader, runs)))
    monkeypatch.setattr(stored, "room_for_files", lambda: 1)
    batches = list(ActivationLoader(store, [PRE, POST], **options))

    assert bool(n_read) == (shuffle != "rows")
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected, strict=True):
        assert batch.keys() == other.keys()
        assert all(batch[name].equal(other[name]) for name in batch)


def test_a_part_that_is_gone_is_named(tmp_path, monkeypatch):
    store = write_store(tmp_path / "store", 1000, 96)
    monkeypatch.setattr(stored, "room_for_files", lambda: 1)
    loader = ActivationLoader(store, PRE, 64, None)
    (store.folder.store / f"activations/{PRE}/c/3/0").unlink()
    with pytest.raises(IncompleteStoreError, match=r"part 3 of .* is not there"):
        list(loader)

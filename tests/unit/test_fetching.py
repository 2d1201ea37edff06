"""Chunks of object stores come side by side, once each, ahead of their use, and keep to their bound."""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actpipe.errors import StorageError
from actpipe.stores import fetching
from actpipe.stores.fetching import AT_ONCE, Chunk, ChunkCache, FetchAhead

SIZE = 100
PATIENCE = 60
"""Seconds after which something that should have happened counts as never happening."""


class Far:
    """An object store of chunks of SIZE bytes; holds requests back until it is opened."""

    def __init__(self, folder, *, is_open=True):
        self.folder, self.requests, self.most_bytes = folder, [], 0
        self.gate, self.lock, self.on_the_way = threading.Event(), threading.Lock(), 0
        self.begun = threading.Condition(self.lock)
        self.failing = {}
        self.cache = ChunkCache(folder, self.download)
        if is_open:
            self.gate.set()

    def path(self, number):
        return self.folder / f"store.zarr/a/c/{number}/0"

    def chunk(self, number):
        return Chunk(self.cache, self.path(number), SIZE)

    def download(self, path, make_room):
        number = int(path.parent.name)
        with self.begun:
            self.requests.append(number)
            self.begun.notify_all()
        assert self.gate.wait(PATIENCE)
        if number in self.failing:
            raise self.failing[number]
        make_room(SIZE)
        with self.lock:
            self.on_the_way += SIZE
            self.most_bytes = max(self.most_bytes, self.here() + self.on_the_way)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(".0.new")
        temporary.write_bytes(bytes([number % 256]) * SIZE)
        with self.lock:
            self.on_the_way -= SIZE
            temporary.replace(path)

    def here(self):
        return SIZE * sum(path.is_file() for path in self.folder.rglob("c/*/0"))

    def wait_for_requests(self, n):
        with self.begun:
            assert self.begun.wait_for(lambda: len(self.requests) >= n, PATIENCE)


@pytest.fixture
def far(tmp_path):
    return Far(tmp_path)


@pytest.fixture
def slow(tmp_path):
    far = Far(tmp_path, is_open=False)
    yield far
    far.gate.set()


class TestCache:
    def test_different_chunks_are_fetched_side_by_side(self, slow):
        with ThreadPoolExecutor(3) as pool:
            found = [pool.submit(slow.cache.fetch, slow.path(number)) for number in range(3)]
            slow.wait_for_requests(3)  # none has been answered
            slow.gate.set()

        assert [each.result() for each in found] == [True] * 3

    def test_the_same_chunk_is_fetched_once_for_all_who_ask(self, slow):
        with ThreadPoolExecutor(8) as pool:
            found = [pool.submit(slow.cache.fetch, slow.path(5)) for _ in range(8)]
            slow.wait_for_requests(1)
            slow.gate.set()
        slow.cache.fetch(slow.path(5))

        assert all(each.result() for each in found)
        assert slow.requests == [5]

    def test_what_is_not_there_is_said_and_asked_for_again(self, far):
        far.failing[1] = FileNotFoundError()
        assert not far.cache.fetch(far.path(1))
        far.failing.clear()
        assert far.cache.fetch(far.path(1))

    def test_an_error_reaches_all_who_wait_and_is_not_kept(self, slow):
        slow.failing[1] = StorageError("out of reach")
        with ThreadPoolExecutor(4) as pool:
            found = [pool.submit(slow.cache.fetch, slow.path(1)) for _ in range(4)]
            slow.wait_for_requests(1)
            slow.gate.set()
        for each in found:
            with pytest.raises(StorageError, match="out of reach"):
                each.result()
        slow.failing.clear()
        assert slow.cache.fetch(slow.path(1))

    def test_what_is_wanted_stays_until_it_is_released(self, far, monkeypatch):
        monkeypatch.setenv("ACTPIPE_CACHE_BYTES", str(4 * SIZE))
        for number in (0, 1):
            assert far.cache.want(far.path(number), SIZE)
            far.cache.fetch(far.path(number))
        for number in range(2, 9):
            far.cache.fetch(far.path(number))
        assert far.path(0).is_file()
        assert far.path(1).is_file()
        far.cache.release(far.path(0), SIZE)
        for number in range(20, 24):
            far.cache.fetch(far.path(number))

        assert not far.path(0).is_file()
        assert far.path(1).is_file()
        assert far.most_bytes <= 4 * SIZE

    def test_more_than_fits_is_not_wanted(self, far, monkeypatch):
        monkeypatch.setenv("ACTPIPE_CACHE_BYTES", str(4 * SIZE))
        assert [far.cache.want(far.path(number), SIZE) for number in range(5)] == [True] * 3 + [False] * 2
        assert far.cache.want(far.path(0), SIZE)  # again, which takes no room
        for _ in range(2):
            far.cache.release(far.path(0), SIZE)
        assert far.cache.want(far.path(4), SIZE)


class TestFetchAhead:
    def test_the_next_steps_are_fetched_while_one_is_at_work(self, far):
        with FetchAhead(range(5), lambda number: [far.chunk(number)]) as coming:
            assert next(coming) == 0
            far.wait_for_requests(5)
            assert list(coming) == [1, 2, 3, 4]

        assert sorted(far.requests) == list(range(5))

    def test_no_step_is_looked_at_ahead_on_this_machine(self):
        taken = []
        with FetchAhead((taken.append(number) or number for number in range(5)), lambda _: ()) as coming:
            for number in coming:
                assert taken == list(range(number + 1))

    def test_it_looks_only_so_far(self, far, monkeypatch):
        monkeypatch.setattr(fetching, "_AHEAD_BYTES", 3 * SIZE)
        taken = []
        steps = (taken.append(number) or number for number in range(20))
        with FetchAhead(steps, lambda number: [far.chunk(number)]) as coming:
            for number in coming:
                assert len(taken) <= number + 3

    def test_leaving_it_begins_no_further_fetch(self, slow):
        before = set(threading.enumerate())
        with FetchAhead(range(3 * AT_ONCE), lambda number: [slow.chunk(number)]) as coming:
            next(coming)
            slow.wait_for_requests(AT_ONCE)
        slow.gate.set()
        for thread in set(threading.enumerate()) - before:
            thread.join(PATIENCE)

        assert set(threading.enumerate()) <= before
        assert len(slow.requests) == AT_ONCE
        assert not slow.cache._wanted

    def test_an_error_is_met_by_who_needs_the_chunk(self, far):
        far.failing[3] = StorageError("out of reach")
        with FetchAhead(range(6), lambda number: [far.chunk(number)]) as coming:
            for number in coming:
                if number == 3:
                    with pytest.raises(StorageError, match="out of reach"):
                        far.cache.fetch(far.path(number))
                else:
                    assert far.cache.fetch(far.path(number))

    @settings(deadline=None, max_examples=60)
    @given(
        steps=st.lists(st.lists(st.integers(0, 12), max_size=6), max_size=12),
        bound=st.integers(2, 20),
    )
    def test_every_step_finds_its_chunks_and_the_bound_holds(self, tmp_path_factory, steps, bound):
        far, fetched = Far(tmp_path_factory.mktemp("far")), Counter()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("ACTPIPE_CACHE_BYTES", str((bound + AT_ONCE) * SIZE))
            with FetchAhead(steps, lambda step: [far.chunk(number) for number in step]) as coming:
                for step in coming:
                    for number in step:
                        assert far.cache.fetch(far.path(number))
                        fetched[number] += 1
        assert fetched == Counter(number for step in steps for number in step)
        assert far.most_bytes <= (bound + AT_ONCE) * SIZE
        assert not far.cache._wanted
        assert far.cache._wanted_bytes == 0

"""Every row of an epoch comes exactly once, however it is cut, shuffled and shared out."""

from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from feeding import POST, PRE, write_store
from hypothesis import given, settings
from hypothesis import strategies as st

from actpipe import ActivationLoader
from actpipe.feed.mixing import Mixture
from actpipe.feed.order import Deal
from actpipe.feed.permutation import Permutation
from actpipe.feed.selection import select_rows

SHUFFLES = st.sampled_from(["rows", "blocks", None])
PATIENT = settings(deadline=None)
QUICK = settings(PATIENT, max_examples=60)


class TestPermutation:
    @PATIENT
    @given(n=st.integers(0, 5000), key=st.integers(0, 2**40))
    def test_it_gives_every_index_once(self, n, key):
        assert sorted(Permutation(n, key)(np.arange(n))) == list(range(n))

    @PATIENT
    @given(n=st.integers(1, 2**40), key=st.integers(0, 9), data=st.data())
    def test_an_index_goes_to_one_place_whatever_stands_beside_it(self, n, key, data):
        indices = np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=20)))
        together = Permutation(n, key)(indices)

        assert ((together >= 0) & (together < n)).all()
        assert together.tolist() == [int(Permutation(n, key)(indices[i : i + 1])[0]) for i in range(len(indices))]

    def test_all_permutations_are_equally_likely(self):
        n, n_keys = 4, 1200
        counts = dict.fromkeys(itertools.permutations(range(n)), 0)
        for key in range(n_keys):
            counts[tuple(Permutation(n, key)(np.arange(n)).tolist())] += 1

        expected = n_keys / math.factorial(n)
        freedom = math.factorial(n) - 1
        chi_squared = sum((count - expected) ** 2 / expected for count in counts.values())
        assert chi_squared < freedom + 5 * math.sqrt(2 * freedom)

    def test_neighbours_go_far_apart(self):
        permuted = Permutation(10_000, 1)(np.arange(10_000))

        assert abs(np.corrcoef(np.arange(10_000), permuted)[0, 1]) < 0.05
        assert abs(np.corrcoef(permuted[:-1], permuted[1:])[0, 1]) < 0.05


class TestDeal:
    @PATIENT
    @given(
        n_rows=st.integers(0, 3000),
        batch_size=st.integers(1, 100),
        group_batches=st.integers(1, 20),
        world_size=st.integers(1, 5),
        n_workers=st.integers(1, 4),
        drop_last=st.booleans(),
    )
    def test_streams_share_the_epoch(self, n_rows, batch_size, group_batches, world_size, n_workers, drop_last):
        deal = Deal(n_rows, batch_size, group_batches, world_size, n_workers, drop_last)
        streams = {
            (rank, worker): list(deal.groups(rank, worker)) for rank in range(world_size) for worker in range(n_workers)
        }
        places = sorted(place for groups in streams.values() for g in groups for place in range(g.start, g.stop))
        batches = {key: sum(group.n_batches for group in groups) for key, groups in streams.items()}

        assert places == list(range(min(n_rows, deal.n_batches * batch_size)))
        assert all(group.n_batches <= group_batches for groups in streams.values() for group in groups)
        for rank in range(world_size):
            mine = [batches[rank, worker] for worker in range(n_workers)]
            assert sum(mine) == deal.batches_of(rank)
            assert mine == sorted(mine, reverse=True)
            assert mine[0] - mine[-1] <= 1  # so that taking them in turn never meets a worker that has ended early
        if drop_last:
            assert len({deal.batches_of(rank) for rank in range(world_size)}) == 1
            assert n_rows - len(places) < batch_size * world_size
        else:
            assert len(places) == n_rows


class TestRowSet:
    @PATIENT
    @given(wanted=st.lists(st.booleans(), max_size=200), cut=st.integers(1, 50))
    def test_it_holds_what_the_filters_want(self, wanted, cut):
        mask = np.array(wanted, np.bool_)
        ranges = [(start, min(start + cut, len(mask))) for start in range(0, len(mask), cut)]
        rows = select_rows(ranges, [lambda start, stop: mask[start:stop]])

        assert rows(np.arange(len(rows))).tolist() == np.flatnonzero(mask).tolist()

    @PATIENT
    @given(mask=st.lists(st.booleans(), min_size=1, max_size=40), cut=st.integers(1, 9))
    def test_other_rows_have_another_checksum(self, mask, cut):
        def checksum(wanted, cut):
            ranges = [(start, min(start + cut, len(wanted))) for start in range(0, len(wanted), cut)]
            return select_rows(ranges, [lambda start, stop: np.array(wanted[start:stop])]).checksum

        other = [not mask[0], *mask[1:]]
        assert checksum(mask, cut) == checksum(mask, 40)
        assert checksum(mask, cut) != checksum(other, cut)


class TestMixture:
    @PATIENT
    @given(sizes=st.lists(st.integers(1, 60), min_size=1, max_size=4), epoch=st.integers(0, 9), seed=st.integers(0, 9))
    def test_without_weights_every_row_comes_once(self, sizes, epoch, seed):
        mixture = Mixture(sizes, None, seed)
        source, within = mixture.locate(np.arange(mixture.n_rows), epoch)

        pairs = sorted(zip(source.tolist(), within.tolist(), strict=True))
        assert pairs == [(number, row) for number, size in enumerate(sizes) for row in range(size)]

    @PATIENT
    @given(sizes=st.lists(st.integers(20, 90), min_size=2, max_size=3), data=st.data(), seed=st.integers(0, 9))
    def test_shares_are_the_weights_and_epochs_go_on_where_they_stopped(self, sizes, data, seed):
        weights = data.draw(st.lists(st.integers(1, 4), min_size=len(sizes), max_size=len(sizes)))
        mixture = Mixture(sizes, weights, seed)
        counts = mixture.counts.tolist()
        unit = min(size / weight for size, weight in zip(sizes, weights, strict=True))

        assert all(abs(count - unit * weight) <= 1 for count, weight in zip(counts, weights, strict=True))
        assert any(count == size for count, size in zip(counts, sizes, strict=True))
        for number, (size, count) in enumerate(zip(sizes, counts, strict=True)):
            taken = []
            for epoch in range(size // count):
                source, within = mixture.locate(np.arange(mixture.n_rows), epoch)
                taken += within[source == number].tolist()
            assert len(set(taken)) == len(taken) == size // count * count


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Stores of some sizes in parts of some sizes."""
    sizes = [(1, 1), (2, 40), (29, 7), (64, 16), (97, 97), (150, 32)]
    return [write_store(tmp_path_factory.mktemp("feed"), *size) for size in sizes]


def rows_of(batches):
    return [row for batch in batches for row in batch["row"].tolist()]


class TestEpochs:
    @QUICK
    @given(data=st.data())
    def test_ranks_share_every_row_of_an_epoch(self, stores, data):
        store, batch_size = data.draw(st.sampled_from(stores)), data.draw(st.integers(1, 40))
        world_size, shuffle = data.draw(st.integers(1, 3)), data.draw(SHUFFLES)
        options = {"block_rows": data.draw(st.integers(1, 20)), "buffer_rows": data.draw(st.integers(1, 80))}
        epochs = []
        for rank in range(world_size):
            loader = ActivationLoader(
                store, [PRE, POST], batch_size, shuffle, rank=rank, world_size=world_size, read_ahead=0, **options
            )
            epochs.append([list(loader) for _ in range(2)])
            assert [len(batches) for batches in epochs[-1]] == [len(loader)] * 2

        for number in range(2):
            batches = [batch for epoch in epochs for batch in epoch[number]]
            assert sorted(rows_of(batches)) == list(range(store.n_rows))
            assert sorted(len(batch["row"]) for batch in batches)[1:] == [batch_size] * (len(batches) - 1)
            for batch in batches:
                assert (batch[PRE] == batch["row"][:, None]).all()
                assert (batch[POST] == -batch["row"][:, None]).all()

    @QUICK
    @given(data=st.data())
    def test_a_resumed_feed_goes_on_as_if_it_had_not_stopped(self, stores, data):
        store = data.draw(st.sampled_from(stores))
        arguments = [PRE, data.draw(st.integers(1, 30)), data.draw(SHUFFLES)]
        options = {
            "block_rows": 4,
            "buffer_rows": data.draw(st.integers(1, 80)),
            "read_ahead": data.draw(st.integers(0, 2)),
        }
        whole = ActivationLoader(store, *arguments, **options)
        batches = [batch for _ in range(2) for batch in whole]
        stop = data.draw(st.integers(0, len(batches)))

        first = ActivationLoader(store, *arguments, **options)
        taken = list(itertools.islice(itertools.chain.from_iterable(iter(lambda: iter(first), None)), stop))
        second = ActivationLoader(store, *arguments, **options)
        second.load_state_dict(first.state_dict())
        while second.epoch < 2:
            taken += list(second)
        assert [batch["row"].tolist() for batch in taken] == [batch["row"].tolist() for batch in batches]


@pytest.fixture(scope="module")
def packed_and_bare(tmp_path_factory):
    """The same rows twice: read where they stand, and through a buffer."""
    stores = [write_store(tmp_path_factory.mktemp("feed"), 210, 32, codec=codec) for codec in ("none", "zstd")]
    assert [store.array(PRE).is_mapped for store in stores] == [True, False]
    return stores


class TestMixing:
    def test_blocks_are_mixed_over_the_whole_buffer(self, tmp_path):
        store = write_store(tmp_path, 4096, 512)
        loader = ActivationLoader(store, PRE, 64, "blocks", block_rows=8, buffer_rows=1024)
        batches = [batch["row"].numpy() for batch in loader]

        assert all(len(np.unique(rows // 8)) > 40 for rows in batches)  # of 64 rows: from most of the 129 blocks there

    def test_rows_of_a_batch_of_blocks_stand_as_in_the_store(self, tmp_path):
        store = write_store(tmp_path, 300, 64)

        for batch in ActivationLoader(store, PRE, 32, "blocks", block_rows=4, buffer_rows=100):
            assert batch["row"].tolist() == sorted(batch["row"].tolist())

    @settings(QUICK, max_examples=20)
    @given(data=st.data())
    def test_unpacked_rows_come_in_the_same_batches_as_mapped_ones(self, packed_and_bare, data):
        options = {"block_rows": data.draw(st.integers(1, 70)), "buffer_rows": data.draw(st.integers(1, 120))}
        batch_size, stop = data.draw(st.integers(10, 60)), data.draw(st.integers(0, 12))
        epochs = []
        for store in packed_and_bare:
            loader = ActivationLoader(store, [PRE, POST], batch_size, "blocks", read_ahead=0, **options)
            loader.load_state_dict(loader.state_dict(batch=min(stop, len(loader))))
            epochs.append(list(loader) + list(loader))

        assert len(epochs[0]) == len(epochs[1])
        for mapped, unpacked in zip(*epochs, strict=True):
            assert mapped.keys() == unpacked.keys()
            assert all(torch.equal(mapped[name], unpacked[name]) for name in mapped)

    def test_buffers_are_used_again_and_stay_in_their_process(self, packed_and_bare):
        loader = ActivationLoader(packed_and_bare[1], PRE, 32, "blocks", buffer_rows=64)
        epochs = [list(loader) for _ in range(2)]
        addresses = {rows[PRE].data_ptr() for rows in loader._spare}
        epochs.append(list(loader))

        assert {rows[PRE].data_ptr() for rows in loader._spare} == addresses
        assert len(addresses) == 2
        assert copy.copy(loader)._spare == []
        for batch in itertools.chain(*epochs):
            assert (batch[PRE] == batch["row"][:, None]).all()  # no later epoch has written into it

    def test_epochs_and_seeds_have_other_orders(self, tmp_path):
        store = write_store(tmp_path, 300, 64)
        for shuffle in ("rows", "blocks"):
            orders = set()
            for seed in range(3):
                loader = ActivationLoader(store, PRE, 32, shuffle, seed, block_rows=4)
                orders |= {tuple(rows_of(loader)) for _ in range(3)}
            assert len(orders) == 9

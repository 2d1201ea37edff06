"""Parts and the attempts at them: each part is done once, whatever workers do."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from actpipe.cluster.ledger import Ledger, RetriesExhausted
from actpipe.records import Part

PARTS = [Part(number, 10 * number, 10 * number + 10) for number in range(6)]


def make(n_parts=2, *, retries=3, factor=3.0, least_seconds=1.0):
    return Ledger(PARTS[:n_parts], retries=retries, factor=factor, least_seconds=least_seconds)


def begun(ledger, worker="a", now=0.0):
    """Hand the next part over to a worker that begins it at once."""
    attempt = ledger.hand_over(ledger.next_part(), now)
    ledger.begin(attempt.key, worker, now)
    return attempt


def with_usual_seconds(seconds, n_parts=6, **options):
    """Return a ledger that has seen three parts of so many seconds."""
    ledger = make(n_parts, **options)
    for _ in range(3):
        ledger.finish(begun(ledger).key, seconds)
    return ledger


def test_parts_are_handed_over_in_order_and_done_once_all_have_finished():
    ledger = make(3)
    handed = [begun(ledger) for _ in range(3)]
    assert [attempt.part for attempt in handed] == PARTS[:3]
    assert not ledger.is_waiting
    assert ledger.n_under_way == 3
    for attempt in reversed(handed):
        assert not ledger.is_done
        assert ledger.finish(attempt.key, 1.0) == []
    assert ledger.is_done
    assert ledger.n_rows_done == 30


def test_the_first_attempt_to_finish_counts_and_the_others_are_let_go():
    ledger = make(1)
    first = begun(ledger, "a")
    second = ledger.hand_over(first.part, 1.0)
    assert ledger.finish(second.key, 2.0) == [first]
    assert ledger.is_done
    assert ledger.n_rows_done == 10
    assert ledger.finish(first.key, 3.0) == []
    assert ledger.fail(first.key, "too late") is None
    ledger.begin(first.key, "a", 4.0)
    assert ledger.n_rows_done == 10
    assert ledger.n_under_way == 0


def test_a_part_that_fails_is_tried_again_until_retries_are_used_up_and_says_why():
    ledger = make(1, retries=2)
    attempt = begun(ledger)
    for number in range(2):
        part = ledger.fail(attempt.key, f"reason {number}")
        assert part == PARTS[0]
        attempt = ledger.hand_over(part, 0.0)
        ledger.begin(attempt.key, "a", 0.0)
    with pytest.raises(RetriesExhausted) as caught:
        ledger.fail(attempt.key, "reason 2")
    assert caught.value.part == PARTS[0]
    assert caught.value.reasons == ("reason 0", "reason 1", "reason 2")


def test_a_failure_beside_another_attempt_starts_no_third():
    ledger = make(1)
    first = begun(ledger)
    second = ledger.hand_over(first.part, 0.0)
    assert ledger.fail(first.key, "reason") is None
    assert ledger.finish(second.key, 1.0) == []
    assert ledger.is_done


def test_a_part_that_is_lost_before_anyone_began_it_has_not_failed_but_not_for_ever():
    ledger = make(1, retries=0)

    def lose_again_and_again():
        attempt = ledger.hand_over(ledger.next_part(), 0.0)
        for _ in range(100):
            part = ledger.fail(attempt.key, "its worker ended")
            assert part == PARTS[0]
            attempt = ledger.hand_over(part, 0.0)

    with pytest.raises(RetriesExhausted) as caught:
        lose_again_and_again()
    assert ledger.n_under_way == 0
    assert caught.value.reasons == ("its worker ended",)


def test_workers_that_failed_at_a_part_are_avoided_for_that_part_only():
    ledger = make(2)
    one, other = begun(ledger, "a"), begun(ledger, "b")
    ledger.fail(one.key, "reason")
    assert ledger.workers_to_avoid(one.part) == {"a"}
    assert ledger.workers_to_avoid(other.part) == set()
    ledger.finish(other.key, 1.0)
    assert ledger.workers_to_avoid(other.part) == set()


def test_nothing_is_slow_before_it_is_known_what_is_usual():
    ledger = make(3)
    begun(ledger)
    ledger.finish(begun(ledger).key, 1.0)
    assert ledger.slow(1000.0) == []


@pytest.mark.parametrize(("factor", "least_seconds", "limit"), [(3.0, 1.0, 6.0), (3.0, 60.0, 60.0)])
def test_a_part_is_slow_after_a_multiple_of_the_median_and_not_before_the_least_seconds(factor, least_seconds, limit):
    ledger = with_usual_seconds(2.0, factor=factor, least_seconds=least_seconds)
    attempt = begun(ledger, "slow", now=10.0)
    assert ledger.slow(10.0 + limit) == []
    assert ledger.slow(10.1 + limit) == [attempt]
    assert ledger.slow(11.0 + limit) == [], "once is enough"
    assert ledger.workers_to_avoid(attempt.part) == {"slow"}


def test_a_part_that_no_one_begins_is_slow_after_twice_as_long_and_may_then_go_to_anyone():
    ledger = with_usual_seconds(2.0)
    attempt = begun(ledger, "a")
    ledger.fail(attempt.key, "reason")
    again = ledger.hand_over(attempt.part, 10.0)
    assert ledger.workers_to_avoid(attempt.part) == {"a"}
    assert ledger.slow(22.0) == []
    assert ledger.slow(22.1) == [again]
    assert ledger.workers_to_avoid(attempt.part) == set()


def test_what_no_one_began_can_be_taken_back_and_waits_before_all_others():
    ledger = make(3)
    first = begun(ledger)
    second = ledger.hand_over(ledger.next_part(), 0.0)
    assert ledger.unbegun() == [second]
    ledger.give_up(second.key)
    assert ledger.n_under_way == 1
    assert ledger.next_part() == second.part
    assert ledger.finish(first.key, 1.0) == []


def test_an_attempt_of_a_worker_that_is_gone_is_at_work_nowhere():
    ledger = make(3)
    attempts = [begun(ledger, worker) for worker in "ab"] + [ledger.hand_over(ledger.next_part(), 0.0)]
    assert ledger.not_at_work({"a", "b"}) == attempts[2:]
    assert ledger.not_at_work({"b", "c"}) == [attempts[0], attempts[2]]
    assert ledger.not_at_work(set()) == attempts


def test_taking_back_one_of_two_attempts_leaves_the_part_with_the_other():
    ledger = make(1)
    first = begun(ledger)
    ledger.give_up(ledger.hand_over(first.part, 0.0).key)
    assert not ledger.is_waiting
    ledger.finish(first.key, 1.0)
    assert ledger.is_done


class AnyOrder(RuleBasedStateMachine):
    """Whatever happens, in whatever order: every part waits, is under way or is done, and is done once."""

    def __init__(self):
        super().__init__()
        self.ledger = make(6, retries=10**6)
        self.under_way = {}
        self.done = []
        self.now = 0.0

    def attempt_of(self, number):
        return list(self.under_way.values())[number % len(self.under_way)]

    @precondition(lambda self: self.ledger.is_waiting)
    @rule()
    def hand_over(self):
        attempt = self.ledger.hand_over(self.ledger.next_part(), self.now)
        self.under_way[attempt.key] = attempt

    @precondition(lambda self: self.under_way)
    @rule(number=st.integers(0, 20), worker=st.sampled_from("abc"))
    def begin(self, number, worker):
        self.ledger.begin(self.attempt_of(number).key, worker, self.now)

    @precondition(lambda self: self.under_way)
    @rule(number=st.integers(0, 20), seconds=st.floats(0, 10))
    def finish(self, number, seconds):
        attempt = self.attempt_of(number)
        self.now += seconds
        others = self.ledger.finish(attempt.key, self.now)
        self.done.append(attempt.part.index)
        for gone in [attempt, *others]:
            assert gone.part == attempt.part
            del self.under_way[gone.key]

    @precondition(lambda self: any(attempt.begun is not None for attempt in self.under_way.values()))
    @rule(number=st.integers(0, 20))
    def fail(self, number):
        attempts = [attempt for attempt in self.under_way.values() if attempt.begun is not None]
        attempt = attempts[number % len(attempts)]
        del self.under_way[attempt.key]
        part = self.ledger.fail(attempt.key, "reason")
        twin = any(other.part == attempt.part for other in self.under_way.values())
        assert part == (None if twin else attempt.part)
        if part is not None:
            again = self.ledger.hand_over(part, self.now)
            self.under_way[again.key] = again

    @rule(seconds=st.floats(0, 100))
    def look_for_slow_ones(self, seconds):
        self.now += seconds
        for attempt in self.ledger.slow(self.now):
            again = self.ledger.hand_over(attempt.part, self.now)
            self.under_way[again.key] = again

    @precondition(lambda self: self.ledger.unbegun())
    @rule()
    def give_up(self):
        attempt = self.ledger.unbegun()[0]
        self.ledger.give_up(attempt.key)
        del self.under_way[attempt.key]

    @invariant()
    def each_part_is_somewhere_and_done_once(self):
        assert len(set(self.done)) == len(self.done)
        assert self.ledger.n_rows_done == 10 * len(self.done)
        assert self.ledger.n_under_way == len(self.under_way)
        assert self.ledger.is_done == (len(self.done) == len(PARTS))
        assert not {attempt.part.index for attempt in self.under_way.values()} & set(self.done)


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)

"""A request to end is heard, however it arrives."""

from __future__ import annotations

import gc
import signal

import pytest
from support import WorkerAtHand

from actpipe.interrupting import INTERRUPTION
from actpipe.jobs.engine import InProcess
from actpipe.records import Part
from actpipe.streaming import BackgroundWorker

PARTS = [Part(number, 10 * number, 10 * number + 10) for number in range(5)]


class Interrupting:
    """Loses a Ctrl-C, as callbacks of libraries do: Python only reports what is raised in `__del__`."""

    def __del__(self):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_ctrl_c_lost_in_a_callback_ends_the_run_before_the_next_part():
    done = []

    def work(part):
        done.append(part)
        if len(done) == 2:
            Interrupting()
            gc.collect()

    with INTERRUPTION.heard(), pytest.raises(KeyboardInterrupt):
        InProcess().run_parts(PARTS, WorkerAtHand(work), None, None)
    assert done == PARTS[:2]


def test_sigterm_lets_the_part_at_hand_and_all_that_was_handed_over_finish():
    done, written = [], []

    def work(part):
        if len(done) == 1:
            signal.raise_signal(signal.SIGTERM)
        done.append(part)
        worker.put(part, 1)

    with INTERRUPTION.heard(), pytest.raises(SystemExit, match="143"):
        with BackgroundWorker(written.append, 10) as worker:
            InProcess().run_parts(PARTS, WorkerAtHand(work), None, None)
    assert written == done == PARTS[:2]


def test_a_second_sigterm_ends_the_run_at_once():
    with INTERRUPTION.heard():
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(SystemExit, match="143"):
            signal.raise_signal(signal.SIGTERM)


def test_handlers_are_what_they_were_afterwards():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with INTERRUPTION.heard():
        assert signal.getsignal(signal.SIGINT) != before[0]

    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before

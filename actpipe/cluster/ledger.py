"""Which parts are to be done, under way and done, and which are far slower than the others; arithmetic only."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Container, Iterable
from dataclasses import dataclass, field

from actpipe.records import Part

_MEDIAN_OF = 101
"""How many of the last parts tell what is usual."""
_FEWEST = 3
"""Parts that must be done before any other counts as slow."""
_MOST_LOST = 8
"""How often a part may be lost with a worker that had not begun it, before that counts as a failure of its own."""


@dataclass
class Attempt:
    """One try at a part."""

    key: str
    part: Part
    submitted: float
    """Time at which it was handed over, in seconds of a clock that never jumps."""
    worker: str | None = None
    """Who does it, once someone does."""
    begun: float | None = None
    repeated: bool = False
    """Whether the part was started again elsewhere because of this one."""


@dataclass
class _State:
    part: Part
    attempts: dict[str, Attempt] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    n_lost: int = 0
    """How often it went with a worker that had not begun it."""
    workers: set[str] = field(default_factory=set)
    """Those that failed at it, or are slow with it."""


class Ledger:
    """Keeps count of parts and of the attempts at them.

    Args:
        parts: What is to be done.
        retries: How often a part that failed is tried again.
        factor: A part counts as slow after so many times the median duration.
        least_seconds: And not before so many seconds.
    """

    def __init__(self, parts: Iterable[Part], *, retries: int, factor: float, least_seconds: float) -> None:
        self._waiting = deque(parts)
        self._states: dict[int, _State] = {}
        self._attempts: dict[str, _State] = {}
        self._retries = retries
        self._factor = factor
        self._least_seconds = least_seconds
        self._durations: deque[float] = deque(maxlen=_MEDIAN_OF)
        self._n_keys = 0
        self.n_rows_done = 0

    @property
    def is_done(self) -> bool:
        """Whether every part is done."""
        return not self._waiting and not self._states

    @property
    def is_waiting(self) -> bool:
        """Whether there are parts that no one was given yet."""
        return bool(self._waiting)

    @property
    def n_under_way(self) -> int:
        """Attempts that were handed over and have not ended."""
        return len(self._attempts)

    def next_part(self) -> Part:
        """Take the next part that is to be done."""
        return self._waiting.popleft()

    def hand_over(self, part: Part, now: float) -> Attempt:
        """Note a new attempt at a part."""
        self._n_keys += 1
        attempt = Attempt(f"part-{part.index}-{self._n_keys}", part, now)
        state = self._states.setdefault(part.index, _State(part))
        state.attempts[attempt.key] = attempt
        self._attempts[attempt.key] = state
        return attempt

    def begin(self, key: str, worker: str, now: float) -> None:
        """Note that a worker has taken an attempt up; one that has ended already is no news."""
        state = self._attempts.get(key)
        if state is not None:
            attempt = state.attempts[key]
            attempt.worker, attempt.begun = worker, now

    def finish(self, key: str, now: float) -> list[Attempt]:
        """Note that an attempt has succeeded: the part is done.

        Returns:
            The other attempts at it, which are not needed any more; none where another was first.
        """
        state = self._attempts.pop(key, None)
        if state is None:
            return []
        attempt = state.attempts.pop(key)
        if attempt.begun is not None:
            self._durations.append(now - attempt.begun)
        self.n_rows_done += state.part.n_rows
        del self._states[state.part.index]
        for other in state.attempts:
            del self._attempts[other]
        return list(state.attempts.values())

    def fail(self, key: str, reason: str) -> Part | None:
        """Note that an attempt has failed, by no fault of the recipe.

        One that no worker had begun was lost with a worker that ended, which says nothing against the part.

        Returns:
            The part, where it is to be tried again; None where another attempt at it is under way.

        Raises:
            RetriesExhausted: It has failed too often.
        """
        state = self._attempts.pop(key, None)
        if state is None:
            return None
        attempt = state.attempts.pop(key)
        state.n_lost += attempt.begun is None
        if attempt.begun is not None or state.n_lost > _MOST_LOST:
            state.failures.append(reason)
        if attempt.worker is not None:
            state.workers.add(attempt.worker)
        if len(state.failures) > self._retries:
            raise RetriesExhausted(state.part, tuple(state.failures))
        return None if state.attempts else state.part

    def give_up(self, key: str) -> None:
        """Take an attempt back that was never begun; its part waits again, before all others."""
        state = self._attempts.pop(key)
        del state.attempts[key]
        if not state.attempts:
            del self._states[state.part.index]
            self._waiting.appendleft(state.part)

    def unbegun(self) -> list[Attempt]:
        """Return the attempts that no worker has taken up."""
        attempts = (state.attempts[key] for key, state in self._attempts.items())
        return [attempt for attempt in attempts if attempt.begun is None]

    def not_at_work(self, workers: Container[str]) -> list[Attempt]:
        """Return the attempts that none of these workers has taken up."""
        attempts = (state.attempts[key] for key, state in self._attempts.items())
        return [attempt for attempt in attempts if attempt.begun is None or attempt.worker not in workers]

    def workers_to_avoid(self, part: Part) -> set[str]:
        """Return the workers that failed at a part, or are slow with it."""
        state = self._states.get(part.index)
        return set() if state is None else set(state.workers)

    def slow(self, now: float) -> list[Attempt]:
        """Return the attempts that take far longer than is usual, each once.

        One that was never begun waits for a worker that does not answer, whichever that is: no worker counts
        as one to avoid any more, since the only other one may be the one that it waits for.
        """
        if len(self._durations) < _FEWEST:
            return []
        limit = max(self._least_seconds, self._factor * statistics.median(self._durations))
        found = []
        for key, state in self._attempts.items():
            attempt = state.attempts[key]
            waited = now - (attempt.submitted + limit if attempt.begun is None else attempt.begun)
            if waited > limit and not attempt.repeated:
                attempt.repeated = True
                if attempt.worker is not None:
                    state.workers.add(attempt.worker)
                else:
                    state.workers.clear()
                found.append(attempt)
        return found


class RetriesExhausted(Exception):  # noqa: N818 - it is no error until someone says so
    """A part has failed too often."""

    def __init__(self, part: Part, reasons: tuple[str, ...]) -> None:
        super().__init__(part, reasons)
        self.part = part
        self.reasons = reasons

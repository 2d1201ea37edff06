"""Ending a run on request: Ctrl-C at once, SIGTERM after the part at hand."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from actpipe.errors import EXIT_ASKED_TO_END, ActpipeError


class Interruption:
    """Whether someone asked this process to end, and how."""

    def __init__(self) -> None:
        self._asked: int | None = None
        self.reason: ActpipeError | None = None
        """Why this process must end by itself, if it must."""

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Listen to SIGINT and SIGTERM; only possible in the main thread, elsewhere nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._hear) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self._asked = None

    @property
    def asked(self) -> bool:
        """Whether someone asked; what is under way may be finished."""
        return self._asked is not None or self.reason is not None

    def end_with(self, reason: ActpipeError) -> None:
        """Ask for the end from within: the run may not go on, and nobody could raise that where parts are done."""
        self.reason = reason

    def forget_reason(self) -> None:
        """Drop what `end_with` asked for; the run that it was meant for has ended."""
        self.reason = None

    def raise_if_asked(self) -> None:
        """End here, if someone asked: whoever does parts calls this between two of them.

        Raises:
            KeyboardInterrupt: After Ctrl-C, also where the first one was lost in a callback of some library.
            SystemExit: After SIGTERM, with 143, the exit code of a process that ended because of it.
            ActpipeError: What `end_with` was given.
        """
        if self.reason is not None:
            raise self.reason
        if self._asked == signal.SIGINT:
            raise KeyboardInterrupt
        if self._asked == signal.SIGTERM:
            raise SystemExit(EXIT_ASKED_TO_END)

    def _hear(self, number: int, _frame: FrameType | None) -> None:
        again, self._asked = self._asked is not None, number
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        if again:
            raise SystemExit(EXIT_ASKED_TO_END)


INTERRUPTION = Interruption()
"""That of this process: signals are its own, whatever thread or stage is at work."""

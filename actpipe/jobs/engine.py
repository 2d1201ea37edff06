"""Who does the parts: this process, one after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from actpipe.interrupting import INTERRUPTION
from actpipe.records import Part


class InProcess:
    """Do parts one after another, in order."""

    def run_parts(self, parts: Sequence[Part], worker: Callable[[Part], None]) -> None:
        """Do every part once; asked to end, do not begin another."""
        for part in parts:
            INTERRUPTION.raise_if_asked()
            worker(part)
        INTERRUPTION.raise_if_asked()

"""Who does the parts: this process, one after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from actpipe.records import Part


class InProcess:
    """Do parts one after another, in order."""

    def run_parts(self, parts: Sequence[Part], worker: Callable[[Part], None]) -> None:
        """Do every part once."""
        for part in parts:
            worker(part)

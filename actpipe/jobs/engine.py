"""Who does the parts: this process, one after another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from actpipe.interrupting import INTERRUPTION
from actpipe.records import Part
from actpipe.telemetry import Meter

if TYPE_CHECKING:
    from actpipe.stage import DoesParts, MapsItems, RunContext


class InProcess:
    """Do parts one after another, in order."""

    is_here = True

    def run_parts(self, parts: Sequence[Part], work: DoesParts, context: RunContext, meter: Meter) -> None:
        """Do every part once; asked to end, do not begin another."""
        with work.open_worker(context, meter) as worker:
            for part in parts:
                INTERRUPTION.raise_if_asked()
                worker(part)
            INTERRUPTION.raise_if_asked()

    def map_items(self, items: Iterable[Any], work: MapsItems, context: RunContext) -> Iterator[Any]:
        """Yield what becomes of each item, in order."""
        return map(work.mapped(context), items)

    def analysing(self, context: RunContext) -> AbstractContextManager[None]:
        """Within, graphs are computed by the threads of this process."""
        del context
        return nullcontext()

    def close(self) -> None:
        """Nothing is held."""

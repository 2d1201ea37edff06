"""Results -> report.html."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from actpipe.schemas.recipe import WriteReportConfig

from actpipe.report.page import write_report
from actpipe.stage import RunContext


@dataclass(frozen=True)
class WriteReport:
    """Put every result of the run into one page that stands alone."""

    config: WriteReportConfig
    needs: ClassVar[tuple[str, ...]] = ()
    gives: ClassVar[str] = "report"

    def check(self, context: RunContext) -> None:
        """There is nothing to refuse: a run without results has a short report."""

    def run(self, context: RunContext) -> None:
        """Write the page; it is made anew each time, from what is on disk."""
        write_report(context.folder, self.config.title or context.recipe.name or context.folder.root.resolve().name)

"""What surrounds a run that others watch: its log and metrics, how it is told, and what the process exits with."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Literal

from actpipe.errors import EXIT_ASKED_TO_END, EXIT_INTERRUPTED, exit_code_of
from actpipe.metrics import Sample, sample_of
from actpipe.planning import count_parts
from actpipe.stores.layout import RunFolder
from actpipe.stores.remote import publish, remote_of
from actpipe.stores.verifying import corpora
from actpipe.stores.writing import committed_parts, read_manifest
from actpipe.telemetry import Telemetry

LogFormat = Literal["text", "json"]


def told_of(folder: RunFolder, telemetry: Telemetry) -> AbstractContextManager[None]:
    """Return the telemetry of a run at work: its log goes where the run goes, parts are counted from their records."""
    remote = remote_of(folder.root)

    def keep() -> None:
        if remote is not None and folder.log.is_file():
            publish([folder.log])

    place = str(folder.root.resolve()) if remote is None else remote.url
    return telemetry.attempt(folder.log, place, keep=keep, source=lambda: _count_parts(folder))


def _count_parts(folder: RunFolder) -> Iterable[Sample]:
    for name, corpus in corpora(folder).items():
        if corpus.has_store:
            manifest = read_manifest(corpus)
            yield sample_of("parts", len(committed_parts(corpus)), corpus=name)
            yield sample_of("parts_planned", count_parts(manifest.n_rows, manifest.rows_per_part), corpus=name)


@contextmanager
def told_as(
    log_format: LogFormat, *, metrics_port: int | None = None, metrics_host: str = "127.0.0.1"
) -> Iterator[Telemetry]:
    """Give the telemetry that a command asks for, and end the process in order whatever ends the run.

    With `json` every word on the standard error stream is a JSON line, errors included.

    Raises:
        SystemExit: With 130 after Ctrl-C, 143 after SIGTERM, and with `json` with the error's code after any error.
        MetricsError: The metrics cannot be served.
    """
    telemetry = Telemetry(lines=sys.stderr) if log_format == "json" else Telemetry()
    with ExitStack() as stack:
        try:
            if metrics_port is not None:
                from actpipe.metrics_server import serving

                address = stack.enter_context(serving(telemetry.metrics, metrics_host, metrics_port))
                telemetry.say(f"metrics: {address}")
            yield telemetry
        except KeyboardInterrupt:
            telemetry.say("interrupted; the same command continues where this one stopped")
            sys.exit(EXIT_INTERRUPTED)
        except SystemExit as stop:
            if stop.code == EXIT_ASKED_TO_END:
                telemetry.say("asked to end: the part at hand is finished; the same command continues")
            raise
        except Exception as error:
            if log_format == "text":
                raise
            telemetry.tell_failure(error)
            sys.exit(exit_code_of(error))

"""The log of a run: one JSON line per event, whole whoever appends; where it cannot be written, the run goes on."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_LOOKS = 5
_LOOK_SECONDS = 0.01


@dataclass
class EventLog:
    """Appends lines to a file, each with one write, so that those of several processes do not mix.

    On network file systems without atomic appends only one process should write: the owner of the run's lock.
    """

    path: Path
    n_lost: int = 0
    """Lines that could not be written."""
    _ends_whole: bool | None = None
    """Whether the file ends with a whole line; None where nobody has looked."""
    _writing: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def append(self, line: str) -> OSError | None:
        """Append a line, with a line break; return what kept it from being written, if anything did."""
        with self._writing:
            try:
                self._write(line)
            except OSError as error:
                self.n_lost += 1
                return error
        return None

    def _write(self, line: str) -> None:
        descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            if self._ends_whole is None:
                self._ends_whole = _ends_whole(descriptor)
            data = ("" if self._ends_whole else "\n").encode() + line.encode() + b"\n"
            self._ends_whole = None
            if os.write(descriptor, data) == len(data):
                self._ends_whole = True
            else:
                raise OSError(f"only a piece of a line fitted into {self.path}")
        finally:
            os.close(descriptor)


def _ends_whole(descriptor: int) -> bool:
    """Return whether a file ends with a whole line; one that another process is writing has a moment to end."""
    for look in range(_LOOKS):
        if look:
            time.sleep(_LOOK_SECONDS)
        size = os.fstat(descriptor).st_size
        if size == 0 or os.pread(descriptor, 1, size - 1) == b"\n":
            return True
    return False


def read_events(data: bytes) -> Iterator[dict[str, Any]]:
    """Yield the events of a log; a line that was cut off is left out."""
    for line in data.splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict):
            yield event

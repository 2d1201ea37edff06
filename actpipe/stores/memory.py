"""How much memory files may take that are to stay in it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_GROUPS = Path("/sys/fs/cgroup")


def room_for_files() -> int:
    """Return about how many bytes of files the operating system can keep in memory for this process.

    The least of what the system has available and what each control group of the process leaves, pages of files
    that it could let go included; 0 where the system does not say.
    """
    return max(0, min(_left(), default=0))


def _left() -> Iterator[int]:
    with suppress(OSError):
        found = re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())
        if found:
            yield 1024 * int(found[1])
    for group in _memory_groups():
        for limit, counts in (("memory.max", "anon "), ("memory.limit_in_bytes", "total_rss ")):
            with suppress(OSError, ValueError):  # no limit reads `max`
                most = int((group / limit).read_text())
                used = re.search(rf"^{counts}(\d+)$", (group / "memory.stat").read_text(), re.MULTILINE)
                yield most - (int(used[1]) if used else 0)


def _memory_groups() -> Iterator[Path]:
    """Yield the control groups of this process that may bound its memory, the innermost first; of both versions."""
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, kinds, path = line.split(":", 2)
            if not kinds or "memory" in kinds.split(","):
                top = _GROUPS / "memory" if kinds else _GROUPS
                inner = top / path.strip("/")
                yield from (inner, *(folder for folder in inner.parents if folder.is_relative_to(top)))

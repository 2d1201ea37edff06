"""How much memory files may take that are to stay in it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_LIMITS = {"memory.max": "anon", "memory.limit_in_bytes": "total_rss"}
"""Files that say how many bytes a control group may take, of both versions, each with what it cannot let go."""


def room_for_files(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Return about how many bytes of files the operating system can keep in memory for this process.

    The least of what the system has available and what each control group of the process leaves, pages of files
    that it could let go included; 0 where the system does not say.
    """
    try:
        available = re.search(r"MemAvailable:\s*(\d+) kB", (proc / "meminfo").read_text())
    except OSError:
        return 0
    if available is None:
        return 0
    return max(0, min([1024 * int(available[1]), *_left(proc, groups)]))


def _left(proc: Path, groups: Path) -> Iterator[int]:
    """Yield what each control group of this process leaves."""
    for group in _memory_groups(proc, groups):
        for limit, kept in _LIMITS.items():
            with suppress(OSError, ValueError):  # no limit reads `max`
                most = int((group / limit).read_text())
                used = re.search(rf"^{kept} (\d+)$", (group / "memory.stat").read_text(), re.MULTILINE)
                yield most - (int(used[1]) if used else 0)


def _memory_groups(proc: Path, groups: Path) -> Iterator[Path]:
    """Yield the control groups of this process that may bound its memory, the innermost first; of both versions."""
    with suppress(OSError):
        for line in (proc / "self/cgroup").read_text().splitlines():
            _, kinds, path = line.split(":", 2)
            if not kinds or "memory" in kinds.split(","):
                top = groups / "memory" if kinds else groups
                inner = top / path.strip("/")
                yield from (inner, *(folder for folder in inner.parents if folder.is_relative_to(top)))

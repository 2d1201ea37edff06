"""Files mapped into memory: only what is touched of them is read."""

from __future__ import annotations

import resource
from functools import lru_cache

import numpy as np
import numpy.typing as npt

MAPPED_FILES = max(64, min(16_384, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2))
"""Files that stay mapped; each takes one of the open files that the system allows (`ulimit -n`)."""


@lru_cache(maxsize=MAPPED_FILES)
def map_file(path: str, version: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """Map one version of a file: one that was written anew is mapped anew."""
    del version
    return np.asarray(np.memmap(path, mode="r", dtype=np.uint8))


def forget_maps() -> None:
    """Let go of every map that nobody reads: a file that was removed keeps its room on the disk while it is mapped."""
    map_file.cache_clear()

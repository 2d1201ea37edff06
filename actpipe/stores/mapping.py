"""Files mapped into memory: only what is touched of them is read."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

_MAPPED_FILES = 512


@lru_cache(maxsize=_MAPPED_FILES)
def map_file(path: Path, version: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """Map one version of a file: one that was written anew is mapped anew."""
    del version
    return np.asarray(np.memmap(path, mode="r", dtype=np.uint8))


def forget_maps() -> None:
    """Let go of every map that nobody reads: a file that was removed keeps its room on the disk while it is mapped."""
    map_file.cache_clear()

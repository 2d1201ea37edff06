"""Reads a store within less memory than the store takes, on request; started by `feed.py`.

    python feed_bounded.py RUN HOOK BATCH MAX_BYTES

Moves itself into a memory control group of MAX_BYTES, in which what the process allocates and the file pages that it
reads count together; the first answer says whether the system allows that. For each line that comes in (`feed` or
`sequential`) it drops the store from the page cache, goes through it once and answers with rows per second, and with
the seconds of all its threads together.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from actpipe import ActivationLoader
from actpipe.stores.layout import RunFolder
from actpipe.stores.mapping import forget_maps
from actpipe.stores.reading import ActivationStore

GROUPS = Path("/sys/fs/cgroup")


@contextmanager
def bounded(max_bytes: int) -> Iterator[bool]:
    """Move this process into a control group of its own, and back at the end; say whether that is allowed here."""
    lines = (line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines())
    paths = {kinds: path for _, kinds, path in lines}
    if "memory" in paths:
        home, limit = GROUPS / "memory" / paths["memory"].strip("/"), "memory.limit_in_bytes"
        group = home / f"actpipe-{os.getpid()}"
    else:
        home, limit = GROUPS / paths.get("", "").strip("/"), "memory.max"
        group = home.parent / f"actpipe-{os.getpid()}"
    try:
        group.mkdir()
    except OSError:
        yield False
        return
    try:
        try:
            (group / limit).write_text(str(max_bytes))
            (group / "cgroup.procs").write_text(str(os.getpid()))
        except OSError:
            yield False
        else:
            yield True
            (home / "cgroup.procs").write_text(str(os.getpid()))
    finally:
        group.rmdir()


def chunk_files(store: ActivationStore, hook: str) -> list[Path]:
    """Return the chunk files of an array in order."""
    return [store.folder.store / f"activations/{hook}/c/{part}/0" for part in range(store.n_parts)]


def drop_cache(files: list[Path]) -> None:
    """Write files back and drop them from the page cache."""
    forget_maps()  # pages that are mapped stay
    gc.collect()
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_through(files: list[Path]) -> None:
    """Read files from beginning to end, 8 MiB at a time."""
    buffer = bytearray(2**23)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def main() -> None:
    folder, hook, batch, max_bytes = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    store = ActivationStore(RunFolder(folder))
    files = chunk_files(store, hook)
    loader = ActivationLoader(store, hook, batch, "blocks")
    sides: dict[str, Callable[[], object]] = {
        "feed": lambda: [None for _ in loader],
        "sequential": lambda: read_through(files),
    }
    drop_cache(files)
    with bounded(max_bytes) as is_bounded:
        print(json.dumps({"bounded": is_bounded}), flush=True)
        for line in sys.stdin:
            drop_cache(files)
            started, used = time.perf_counter(), time.process_time()
            sides[line.strip()]()
            seconds = {"seconds": time.perf_counter() - started, "processor_seconds": time.process_time() - used}
            print(json.dumps(seconds | {"rows_per_second": store.n_rows / seconds["seconds"]}), flush=True)


if __name__ == "__main__":
    main()

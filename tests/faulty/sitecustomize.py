"""On the path of a worker, makes it fail and wait where a test says so: in the folder `$FAULTS`.

`fail/*`: as many times as there are files, a part finds the file server away. `hog/*`: as many times, a part takes
so many bytes of memory as the file says. `gate`: a number and a folder; no
part is begun while so many commit records are there.
"""

import errno
import os
import time
from pathlib import Path

hogged = []
take_room, faults = os.posix_fallocate, Path(os.environ["FAULTS"])


def is_shut():
    try:
        number, commits = (faults / "gate").read_text().split(maxsplit=1)
    except FileNotFoundError:
        return False
    return len(list(Path(commits).glob("part-*.json"))) >= int(number)


def faulty(*arguments):
    while is_shut():
        time.sleep(0.02)
    for left in sorted((faults / "fail").glob("*")):
        left.unlink()
        raise OSError(errno.ESTALE, "the file server is away")
    for left in sorted((faults / "hog").glob("*")):
        n_bytes = int(left.read_text())
        left.unlink()
        time.sleep(0.3)  # what the worker has said of this part is on its way
        hogged.append(b"x" * n_bytes)
    return take_room(*arguments)


os.posix_fallocate = faulty

"""Folders of workers in front of an object store: each process has its own, and those of dead processes go."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

from actpipe.stores.layout import user_cache
from actpipe.stores.locking import is_running
from actpipe.stores.remote import Remote, as_url


def front_of_worker(run: str) -> Path:
    """Return the folder in front of a run for this process alone; a folder on this machine is itself.

    It holds nothing before `fetch_all`.
    """
    url = as_url(run)
    if url is None:
        return Path(run)
    _clear_dead()
    return Remote.in_front_of(url, _all_here() / str(os.getpid())).folder


def forget_front(run: str) -> None:
    """Remove this process' folder in front of a run; what is committed is in the object store."""
    url = as_url(run)
    if url is not None:
        shutil.rmtree(Remote.in_front_of(url, _all_here() / str(os.getpid())).folder, ignore_errors=True)


def _all_here() -> Path:
    return user_cache() / "workers" / socket.gethostname()


def _clear_dead() -> None:
    folders = _all_here().iterdir() if _all_here().is_dir() else ()
    for folder in folders:
        if folder.name.isdigit() and not is_running(int(folder.name)):
            shutil.rmtree(folder, ignore_errors=True)

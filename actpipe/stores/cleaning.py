"""Find and remove what killed runs left half done; nothing that counts, and nothing that is not ours."""

from __future__ import annotations

import re
import shutil
from contextlib import suppress
from pathlib import Path

from actpipe.stores.claims import CLAIMS
from actpipe.stores.layout import HALF_WRITTEN, RunFolder
from actpipe.stores.verifying import corpora

_ON_ITS_WAY = re.compile(r".+-[0-9a-f]{12}")
"""What `RunFolder.new_partial` calls a folder."""


def abandoned(run: RunFolder) -> list[Path]:
    """Return the temporary files and folders of a run and its corpora, in order; no run may be at work there."""
    found: list[Path] = []
    for folder in corpora(run).values():
        found += [path for path in _children(folder.partial) if _ON_ITS_WAY.fullmatch(path.name) or path.name == CLAIMS]
        for place in (folder.root, folder.commits, folder.results):
            found += [path for path in _children(place) if HALF_WRITTEN.fullmatch(path.name) and path.is_file()]
    return found


def clear_abandoned(run: RunFolder) -> None:
    """Remove the temporary files of a run and its corpora."""
    for path in abandoned(run):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    for folder in corpora(run).values():
        with suppress(OSError):  # not there, or someone else's files are in it
            folder.partial.rmdir()


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of all files below a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _children(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []

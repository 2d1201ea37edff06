"""A folder that appears under its name once it is whole."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from actpipe.errors import ActpipeError, InterchangeError, StorageError
from actpipe.stores.layout import move, sync_tree


@contextmanager
def made_aside(target: Path) -> Iterator[Path]:
    """Give a hidden folder beside the target, which takes the target's name at the end, and is removed on errors.

    Raises:
        InterchangeError: The target exists and is not an empty folder.
        StorageError: The disk does not take it; nothing is left.
    """
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise InterchangeError(f"{target} is not empty; choose another folder, or remove it first")
    partial = target.with_name(f".{target.name}.partial-{uuid.uuid4().hex[:12]}")
    try:
        partial.mkdir(parents=True)
        yield partial
        sync_tree(partial)
        move(partial, target)
    except OSError as error:
        if isinstance(error, ActpipeError):
            raise
        raise StorageError(f"cannot make {target}: {error}; nothing of it is left there") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)

"""What trouble with an object store means, in one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from actpipe.errors import StorageError, StorageRefusedError


@contextmanager
def trouble_explained(url: str) -> Iterator[None]:
    """Turn trouble with an object store into an error that says what it means.

    What is not there stays a FileNotFoundError, and a condition that does not hold stays what obstore raises.

    Raises:
        StorageError: It is out of reach.
        StorageRefusedError: It lets us not in, or the library for it is not installed.
    """
    try:
        import obstore
    except ImportError as error:
        raise StorageRefusedError(f"{url} needs `pip install 'actpipe[remote]'`") from error
    try:
        yield
    except (obstore.exceptions.AlreadyExistsError, obstore.exceptions.PreconditionError, FileNotFoundError):
        raise
    except obstore.exceptions.BaseError as error:
        _explain(url, error)


def _explain(url: str, error: Exception) -> NoReturn:
    import obstore

    lines = str(error).strip().splitlines()
    reason = lines[0] if lines else type(error).__name__
    if isinstance(error, obstore.exceptions.PermissionDeniedError | obstore.exceptions.UnauthenticatedError):
        raise StorageRefusedError(
            f"{url} lets us not in ({reason}); what is committed stays valid, give the same command again with "
            "credentials that may read and write there"
        ) from error
    raise StorageError(
        f"{url} is out of reach ({reason}); what is committed stays valid, give the same command again once it is back"
    ) from error

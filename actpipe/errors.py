"""Every error that actpipe raises on purpose.

Each message is one sentence: what failed, the values involved, the way out.
"""

from __future__ import annotations

import difflib
import signal
from collections.abc import Iterable, Iterator
from typing import ClassVar

EXIT_ERROR = 1
"""The same command would fail again."""
EXIT_STOPPED = 3
"""Of `actpipe status`: the run was begun, is not finished, and nobody is at work."""
EXIT_TRY_AGAIN = 75
"""The same command may succeed later: `EX_TEMPFAIL` of sysexits.h."""
EXIT_INTERRUPTED = 128 + signal.SIGINT
"""Ctrl-C; what is committed stays valid."""
EXIT_ASKED_TO_END = 128 + signal.SIGTERM
"""SIGTERM; the part at hand was finished first."""


class ActpipeError(Exception):
    """Base of all errors raised on purpose; catching it catches nothing else."""

    exit_code: ClassVar[int] = EXIT_ERROR
    """What a command that ends with this error exits with."""


class RecipeError(ActpipeError, ValueError):
    """A recipe cannot run as it is written."""


class UnknownHookError(ActpipeError, LookupError):
    """A hook name or pattern means nothing for this model."""


class ModelLoadError(ActpipeError, OSError):
    """A model, its configuration or its tokenizer could not be loaded."""


class UnsupportedModelError(ActpipeError, NotImplementedError):
    """No entry says where the parts of this architecture are."""


class IdentityError(ActpipeError, ArithmeticError):
    """A captured value contradicts the model's own arithmetic."""


class DatasetError(ActpipeError, ValueError):
    """A dataset cannot be read as the recipe says."""


class StoreMismatchError(ActpipeError, ValueError):
    """What is on disk was written under other settings than this run."""


class RunInUseError(StoreMismatchError):
    """Another process is at work in the run folder; once it has ended, or is known to be dead, this one can begin."""

    exit_code = EXIT_TRY_AGAIN


class IncompleteStoreError(ActpipeError, RuntimeError):
    """A store lacks parts, or an array, that the operation needs."""


class InterchangeError(ActpipeError, ValueError):
    """What should be exported or imported cannot be, in the format that was asked for."""


class StorageError(ActpipeError, OSError):
    """The disk is full or out of reach; what is committed stays valid."""

    exit_code = EXIT_TRY_AGAIN


class StorageRefusedError(StorageError):
    """The place lets nothing be written or read, and will not until someone changes that."""

    exit_code = EXIT_ERROR


class MetricsError(ActpipeError, OSError):
    """The metrics of a run cannot be served as the command asks."""


class ClusterError(ActpipeError, RuntimeError):
    """A cluster cannot be reached or started, or its workers fail at a part again and again."""

    exit_code = EXIT_TRY_AGAIN


class ClusterSetupError(ClusterError):
    """What a cluster needs is not there: a package, a certificate, a folder."""

    exit_code = EXIT_ERROR


class DeviceMemoryError(ActpipeError, MemoryError):
    """A device's memory does not suffice, however little is run at once."""


class DtypeOverflowError(ActpipeError, OverflowError):
    """Finite activations do not fit the element type they are stored in."""


def did_you_mean(wrong: str, candidates: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the candidate nearest to `wrong`, or an empty string."""
    near = difflib.get_close_matches(wrong, list(candidates), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


_OUT_OF_REACH = {"ConnectionError", "TimeoutError", "Timeout", "TransportError", "LocalEntryNotFoundError"}
"""Classes by which Python, requests, httpx and the hub's client tell that a server was not reached."""
_KEPT_OFFLINE = "OfflineModeIsEnabled"


def exit_code_of(error: BaseException) -> int:
    """Return what a command that ends with an error exits with.

    A model or dataset that could not be had because its server was not reached may be there later.
    """
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else EXIT_ERROR
    if isinstance(error, ModelLoadError | DatasetError):
        kinds = {kind.__name__ for cause in _causes(error) for kind in type(cause).__mro__}
        return EXIT_TRY_AGAIN if kinds & _OUT_OF_REACH and _KEPT_OFFLINE not in kinds else EXIT_ERROR
    return error.exit_code if isinstance(error, ActpipeError) else EXIT_ERROR


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and what led to it."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__

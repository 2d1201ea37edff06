"""Every error that actpipe raises on purpose.

Each message is one sentence: what failed, the values involved, the way out.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ActpipeError(Exception):
    """Base of all errors raised on purpose; catching it catches nothing else."""


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


class IncompleteStoreError(ActpipeError, RuntimeError):
    """A store lacks parts, or an array, that the operation needs."""


class InterchangeError(ActpipeError, ValueError):
    """What should be exported or imported cannot be, in the format that was asked for."""


class StorageError(ActpipeError, OSError):
    """The disk is full, read-only or out of reach; what is committed stays valid."""


class DeviceMemoryError(ActpipeError, MemoryError):
    """A device's memory does not suffice, however little is run at once."""


class DtypeOverflowError(ActpipeError, OverflowError):
    """Finite activations do not fit the element type they are stored in."""


def did_you_mean(wrong: str, candidates: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the candidate nearest to `wrong`, or an empty string."""
    near = difflib.get_close_matches(wrong, list(candidates), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""

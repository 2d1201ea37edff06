"""A model and a corpus in, a store of activations to compute on out.

The public names are loaded when they are first used: importing the package loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from actpipe.models.hooked_model import HookedModel as HookedModel

__version__ = "0.1.0"

_PUBLIC = {
    "HookedModel": "actpipe.models.hooked_model",
}

__all__ = ["HookedModel", "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'actpipe' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)

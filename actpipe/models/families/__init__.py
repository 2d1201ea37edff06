"""One file per family of architectures; a new file here is all that a new family needs."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from typing import Any

from actpipe.models.families.entry import Family

_NOT_ENTRIES = {"entry", "fused"}


@functools.cache
def all_families() -> dict[str, Family]:
    """Return every entry by the `model_type` it is for."""
    found: dict[str, Family] = {}
    for module in pkgutil.iter_modules(__path__):
        if module.name in _NOT_ENTRIES:
            continue
        for family in importlib.import_module(f"{__name__}.{module.name}").FAMILIES:
            found.update(dict.fromkeys(family.model_types, family))
    return found


def entry_for(config: Any) -> Family | None:
    """Return the entry for a configuration, if there is one.

    An encoder's configuration that asks for a decoder is another architecture, which its entry is not for.
    """
    family = all_families().get(config.model_type)
    decoder = family is not None and family.task == "masked" and getattr(config, "is_decoder", False)
    return None if decoder else family

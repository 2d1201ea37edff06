"""One file per family of architectures; a new file here is all that a new family needs."""

from __future__ import annotations

import functools
import importlib
import pkgutil

from actpipe.errors import UnsupportedModelError, did_you_mean
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


def family_of(model_type: str) -> Family:
    """Return the entry for a configuration's `model_type`.

    Raises:
        UnsupportedModelError: There is none; names those that there are.
    """
    families = all_families()
    if model_type not in families:
        raise UnsupportedModelError(
            f"no entry says where the parts of a {model_type!r} model are; there are entries for "
            f"{', '.join(sorted(families))}{did_you_mean(model_type, families)}"
        )
    return families[model_type]

"""Find out where the parts of an architecture are that nobody wrote an entry for.

A small twin of the model is run once, and every part is found by what passes through it; then every
identity is checked on the twin. What no identity proves is not offered.
"""

from __future__ import annotations

from typing import Any

from actpipe.models.families import entry_for
from actpipe.models.families.entry import Family

_recognised: dict[str, Family] = {}


def family_for(config: Any, *, trust_remote_code: bool = False) -> Family:
    """Return the entry for a configuration, or what can be found out about it by structure.

    Raises:
        UnsupportedModelError: There is no entry, and structure does not tell either; says why.
    """
    entry = entry_for(config)
    if entry is not None:
        return entry
    key = config.to_json_string()
    if key not in _recognised:
        from actpipe.models.recognition.recognising import recognise  # it runs hooked models: imported last

        _recognised[key] = recognise(config, trust_remote_code=trust_remote_code)
    return _recognised[key]

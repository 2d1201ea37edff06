"""Random samples that a key alone decides."""

from __future__ import annotations

import hashlib


def is_drawn(key: str, fraction: float) -> bool:
    """Say whether something is in a random sample: its key alone decides, whatever else there is.

    The first eight bytes of BLAKE2b over the key, as a share of all that they can be, are below `fraction`.
    """
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64

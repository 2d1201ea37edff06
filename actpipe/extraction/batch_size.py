"""The size of the batches of a stage: what its recipe says, or what was found by trial and left beside its parts."""

from __future__ import annotations

import json
from pathlib import Path

from actpipe.planning import DEFAULT_BATCH_TOKENS
from actpipe.schemas.recipe import ExtractActivationsConfig
from actpipe.schemas.reducing import ReduceActivationsConfig
from actpipe.stores.layout import RunFolder


def batch_tokens_of(config: ExtractActivationsConfig | ReduceActivationsConfig, folder: RunFolder) -> int:
    """Return the most tokens of a batch; of `auto`, the number that `settle_batch_tokens` has left in a folder."""
    if config.batch_tokens != "auto":
        return config.batch_tokens
    found = read_number(folder.batch_tokens)
    return DEFAULT_BATCH_TOKENS if found is None else found


def read_number(path: Path) -> int | None:
    """Return the number of tokens that a file holds; None where there is none that could be read."""
    try:
        found = json.loads(path.read_bytes())["batch_tokens"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, int) and found > 0 else None

"""Token ids back to text, with the tokenizer that a run keeps."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from tokenizers import Tokenizer

from actpipe.errors import IncompleteStoreError


@lru_cache(maxsize=8)
def _load(definition: Path) -> Tokenizer:
    return Tokenizer.from_file(str(definition))


def decode_ids(folder: Path, ids: Sequence[int]) -> str:
    """Return the text of token ids, special tokens included and no spaces tidied.

    Args:
        folder: A saved tokenizer with a `tokenizer.json`.
        ids: Token ids.

    Raises:
        IncompleteStoreError: The folder has no `tokenizer.json`.
    """
    definition = folder / "tokenizer.json"
    if not definition.is_file():
        raise IncompleteStoreError(f"{folder} has no tokenizer.json, so ids cannot be turned into text")
    return str(_load(definition).decode(list(ids), skip_special_tokens=False))

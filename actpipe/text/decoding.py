"""Token ids back to text, with the tokenizer that a run keeps."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

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
    return str(_kept_tokenizer(folder).decode(list(ids), skip_special_tokens=False))


def token_spans(folder: Path, ids: Sequence[int]) -> tuple[str, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the text of token ids, and the characters `[start, stop)` that each token holds some of.

    A character of several tokens, such as one of four bytes, is in the span of each.

    Args:
        folder: A saved tokenizer with a `tokenizer.json`.
        ids: Token ids.

    Raises:
        IncompleteStoreError: The folder has no `tokenizer.json`.
    """
    tokenizer, stream = _kept_tokenizer(folder), DecodeStream(skip_special_tokens=False)
    pieces, starts, stops = list[str](), np.zeros(len(ids), np.int64), np.zeros(len(ids), np.int64)
    length = waiting = 0
    for number, token in enumerate(ids):
        starts[number] = length
        if (piece := stream.step(tokenizer, token)) is None:  # the character is not whole yet
            continue
        pieces.append(piece)
        length += len(piece)
        stops[waiting : number + 1] = length
        waiting = number + 1
    stops[waiting:] = length
    return "".join(pieces), starts, stops


def _kept_tokenizer(folder: Path) -> Tokenizer:
    definition = folder / "tokenizer.json"
    if not definition.is_file():
        raise IncompleteStoreError(f"{folder} has no tokenizer.json, so ids cannot be turned into text")
    return _load(definition)

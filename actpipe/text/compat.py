"""TransformerLens' `tokenize_and_concatenate`, to the id, with everything that it loses.

Both versions work on batches of 1,000 documents on their own (the batches of `Dataset.map`), and
drop what does not fill a row at the end of each. Version 2 cuts the joined text into 20 pieces
wherever that falls, tokenizes those with special tokens, and drops every id that equals the
padding id, the separators included where the two are one. Version 3 tokenizes each document.

Source: TransformerLens 2.16 `utils.tokenize_and_concatenate`; 3.9 `utilities.tokenize_and_concatenate`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from actpipe.errors import DatasetError
from actpipe.records import DocumentRow, DocumentStatus, Sequence, SourceDocument, TokenIds
from actpipe.text.packing import one_or_none
from actpipe.text.tokenizing import encode, text_of

_MAP_BATCH = 1_000
_PIECES = 20


@dataclass(frozen=True)
class Compat:
    """The call to reproduce."""

    version: str
    """`tl2` or `tl3`."""
    max_length: int
    bos_id: int | None
    """Stands at the start of every row (`add_bos_token`), or None."""
    num_proc: int = 1
    n_documents: int | None = None
    """Length of the dataset, needed where `num_proc` is above 1."""


def compat_pad_id(tokenizer: Any, version: str) -> int:
    """Return the id that pads a short row: the tokenizer's, or the one that the call makes up."""
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id)
    return int(tokenizer.eos_token_id) if version == "tl3" else len(tokenizer)


def tokenize_and_concatenate(
    documents: Iterable[SourceDocument], tokenizer: Any, settings: Compat
) -> Iterator[DocumentRow | Sequence]:
    """Yield the rows that TransformerLens makes; which document a token is from is not known.

    Documents without text (missing, not text, not Unicode), on which the original fails, take their
    place in a batch and are left out of it. A short row keeps its real tokens only; the original
    pads it with `compat_pad_id` (and a row of nothing but padding is not stored).
    """
    if tokenizer.eos_token is None:
        raise DatasetError("`compat` joins documents by EOS, and this tokenizer has none")
    rows_of: Callable[[list[str], Any, int], list[TokenIds]] = _rows_tl2 if settings.version == "tl2" else _rows_tl3
    tokenizer = _with_padding(tokenizer)
    bos = one_or_none(settings.bos_id)
    length = settings.max_length - len(bos)
    n_sequences, first_row = 0, 0
    for batch in _map_batches(documents, settings):
        texts = []
        for document in batch:
            text = text_of(document.value)
            status = text if isinstance(text, DocumentStatus) else DocumentStatus.OK
            if status in (DocumentStatus.OK, DocumentStatus.EMPTY):
                texts.append("" if isinstance(text, DocumentStatus) else text)
            yield DocumentRow(document.index, document.id, status, 0, 0, None, None, document.columns)
        for ids in (np.concatenate([bos, row]) for row in rows_of(texts, tokenizer, length)):
            if len(ids) == 0:
                continue
            yield Sequence(n_sequences, -1, 0, 0, first_row, ids)
            n_sequences, first_row = n_sequences + 1, first_row + len(ids)


def _with_padding(tokenizer: Any) -> Any:
    """Return a tokenizer that can pad, as the original makes one, leaving the caller's as it is."""
    if tokenizer.pad_token is not None:
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<PAD>"})
    return tokenizer


def _map_batches(documents: Iterable[SourceDocument], settings: Compat) -> Iterator[list[SourceDocument]]:
    """Cut the dataset as `Dataset.map` does: shards of `num_proc`, then batches of 1,000."""
    stream = iter(documents)
    if settings.num_proc == 1:
        while batch := list(islice(stream, _MAP_BATCH)):
            yield batch
        return
    if settings.n_documents is None:
        raise DatasetError("`compat_num_proc` above 1 needs a dataset of known length, so not a streaming one")
    n_shards = min(settings.num_proc, settings.n_documents)
    for shard in range(n_shards):
        size = settings.n_documents // n_shards + (shard < settings.n_documents % n_shards)
        for start in range(0, size, _MAP_BATCH):
            yield list(islice(stream, min(_MAP_BATCH, size - start)))


def _rows_tl2(texts: list[str], tokenizer: Any, length: int) -> list[TokenIds]:
    joined = tokenizer.eos_token.join(texts)
    if not joined.strip():
        return []
    size = (len(joined) - 1) // _PIECES + 1
    pieces = [joined[i * size : (i + 1) * size] for i in range(_PIECES)]
    padded = tokenizer(pieces, return_tensors="np", padding=True, verbose=False)["input_ids"].flatten()
    return _cut(padded[padded != tokenizer.pad_token_id].astype(np.int32), length)


def _rows_tl3(texts: list[str], tokenizer: Any, length: int) -> list[TokenIds]:
    if not texts:
        return []
    separator = one_or_none(tokenizer.eos_token_id)
    joined = [piece for ids in encode(tokenizer, texts) for piece in (ids, separator)]
    return _cut(np.concatenate(joined[:-1]), length)


def _cut(ids: TokenIds, length: int) -> list[TokenIds]:
    """Cut into rows of exactly `length` and drop the rest; too few ids for one row make a short one."""
    if len(ids) < length:
        return [ids]
    return list(ids[: len(ids) // length * length].reshape(-1, length))

"""From documents to token ids; what cannot become ids is marked, never dropped and never fatal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from actpipe.errors import DatasetError
from actpipe.records import DocumentStatus, SourceDocument, TokenIds, TokenizedDocument
from actpipe.text.documents import ColumnType

_BATCH_DOCUMENTS = 256
_BATCH_CHARACTERS = 2_000_000
_NO_IDS: TokenIds = np.empty(0, np.int32)


@dataclass(frozen=True)
class Tokenizing:
    """How documents become ids."""

    column_type: ColumnType
    d_vocab: int
    """Ids must be below this."""
    own_bos_id: int | None = None
    """A BOS that a document may bring along and then loses, as BOS is set when sequences are made."""
    own_closing_id: int | None = None
    """The same for an id that stands at the end of every sequence."""
    chat_template: str | None = None
    min_tokens: int = 0
    max_tokens: int | None = None


def check_template(tokenizer: Any, chat_template: str | None) -> None:
    """Refuse chat messages that nothing turns into text.

    Raises:
        DatasetError: Neither the tokenizer nor the recipe has a template.
    """
    if not (chat_template or tokenizer.chat_template):
        raise DatasetError(
            "the documents are chat messages, but the tokenizer has no chat template; set `dataset.chat_template`"
        )


def tokenize(batch: list[SourceDocument], tokenizer: Any, settings: Tokenizing) -> list[TokenizedDocument]:
    """Return every document in order, as ids or with the reason why it has none.

    Texts are tokenized on their own and without special tokens: BOS and separators are set
    when documents become sequences.

    Raises:
        DatasetError: An id is beyond the model's vocabulary.
    """
    if settings.column_type == "token_ids":
        return [_finish(document, _checked_ids(document.value, settings), settings) for document in batch]
    return list(_tokenize_batch(batch, tokenizer, settings))


def in_batches(documents: Iterable[SourceDocument]) -> Iterator[list[SourceDocument]]:
    """Group documents by number and length, so that a batch of huge ones stays small."""
    batch: list[SourceDocument] = []
    length = 0
    for document in documents:
        batch.append(document)
        length += len(document.value) if isinstance(document.value, str | bytes) else 1_000
        if len(batch) == _BATCH_DOCUMENTS or length >= _BATCH_CHARACTERS:
            yield batch
            batch, length = [], 0
    if batch:
        yield batch


def _tokenize_batch(batch: list[SourceDocument], tokenizer: Any, settings: Tokenizing) -> Iterator[TokenizedDocument]:
    is_chat = settings.column_type == "messages"
    texts = [_render(document.value, tokenizer, settings) if is_chat else text_of(document.value) for document in batch]
    ids = iter(encode(tokenizer, [text for text in texts if not isinstance(text, DocumentStatus)]))
    for document, text in zip(batch, texts, strict=True):
        yield _finish(document, text if isinstance(text, DocumentStatus) else next(ids), settings)


def encode(tokenizer: Any, texts: list[str]) -> list[TokenIds]:
    """Return the ids of each text, without special tokens."""
    if not texts:
        return []
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        padding=False,
        truncation=False,
        verbose=False,
    )
    return [np.asarray(ids, np.int32) for ids in encoded["input_ids"]]


def frame_of(tokenizer: Any) -> tuple[int | None, int | None]:
    """Return what a tokenizer puts before and after every text, such as [CLS] and [SEP], or None.

    Raises:
        DatasetError: It puts more than one token there.
    """
    around = list(tokenizer("")["input_ids"])
    if len(around) == 1:
        return (None, around[0]) if around[0] in (tokenizer.eos_token_id, tokenizer.sep_token_id) else (around[0], None)
    if len(around) > 2:
        raise DatasetError(
            f"this tokenizer puts {len(around)} tokens around every text, and at most one before and one after are "
            "placed; set `prepend_bos: false` and bring them in the texts"
        )
    return (around[0], around[1]) if around else (None, None)


def text_of(value: Any) -> str | DocumentStatus:
    """Return the text of a document, or why there is none (a status is a `str` too: ask for it first)."""
    if value is None:
        return DocumentStatus.MISSING
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError:
            return DocumentStatus.INVALID_UNICODE
    if not isinstance(value, str):
        return DocumentStatus.NOT_TEXT
    try:
        value.encode()
    except UnicodeEncodeError:
        return DocumentStatus.INVALID_UNICODE
    return value or DocumentStatus.EMPTY


def _render(messages: Any, tokenizer: Any, settings: Tokenizing) -> str | DocumentStatus:
    """Turn chat messages into text by the template."""
    from jinja2 import TemplateError

    if messages is None:
        return DocumentStatus.MISSING
    if not isinstance(messages, list) or not all(isinstance(m, dict) and m.get("role") for m in messages):
        return DocumentStatus.INVALID_MESSAGES
    if not messages:
        return DocumentStatus.EMPTY
    try:
        text = tokenizer.apply_chat_template(messages, chat_template=settings.chat_template, tokenize=False)
    except (TemplateError, KeyError, TypeError, ValueError):
        return DocumentStatus.INVALID_MESSAGES
    return text_of(text)


def _checked_ids(value: Any, settings: Tokenizing) -> TokenIds | DocumentStatus:
    if value is None:
        return DocumentStatus.MISSING
    try:
        ids = np.asarray(value)
    except ValueError:
        return DocumentStatus.INVALID_IDS
    if ids.size == 0:
        return DocumentStatus.EMPTY
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= settings.d_vocab:
        return DocumentStatus.INVALID_IDS
    return ids.astype(np.int32)


def _finish(document: SourceDocument, ids: TokenIds | DocumentStatus, settings: Tokenizing) -> TokenizedDocument:
    """Settle a document's status and ids."""
    if isinstance(ids, DocumentStatus):
        return TokenizedDocument(document.index, document.id, ids, _NO_IDS, document.columns)
    if len(ids) and ids.max() >= settings.d_vocab:
        raise DatasetError(
            f"document {document.id!r} has token id {ids.max()}, but the model's vocabulary ends at "
            f"{settings.d_vocab - 1}: tokenizer and model do not belong together"
        )
    if settings.own_bos_id is not None and len(ids) and ids[0] == settings.own_bos_id:
        ids = ids[1:]
    if settings.own_closing_id is not None and len(ids) and ids[-1] == settings.own_closing_id:
        ids = ids[:-1]
    status = DocumentStatus.OK
    if len(ids) == 0:
        status = DocumentStatus.EMPTY
    elif len(ids) < settings.min_tokens:
        status = DocumentStatus.TOO_SHORT
    elif settings.max_tokens is not None and len(ids) > settings.max_tokens:
        status = DocumentStatus.TOO_LONG
    kept = ids if status is DocumentStatus.OK else _NO_IDS
    return TokenizedDocument(document.index, document.id, status, kept, document.columns)


def repeated_tokens(
    *, n_documents: int, period: int, repeats: int, seed: int, allowed: TokenIds
) -> Iterator[TokenizedDocument]:
    """Yield documents of random tokens repeated: what induction heads are found on.

    Args:
        n_documents: How many.
        period: Length of the random piece.
        repeats: How often it stands in the document.
        seed: Seed of numpy's PCG64 generator.
        allowed: Ids to draw from, uniformly.
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    for index in range(n_documents):
        piece = allowed[generator.integers(0, len(allowed), period)]
        columns = {"period": period}
        yield TokenizedDocument(index, str(index), DocumentStatus.OK, np.tile(piece, repeats), columns)


def ordinary_ids(tokenizer: Any, d_vocab: int) -> TokenIds:
    """Return every id of the vocabulary that is no special token."""
    special = set(tokenizer.all_special_ids)
    return np.asarray([i for i in range(min(d_vocab, len(tokenizer))) if i not in special], np.int32)

"""Values that pass between the pieces: documents, sequences, parts, batches, findings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt

TokenIds = npt.NDArray[np.int32]


class DocumentStatus(StrEnum):
    """What became of a document; only `OK` documents have rows."""

    OK = "ok"
    EMPTY = "empty"
    MISSING = "missing"
    NOT_TEXT = "not_text"
    INVALID_UNICODE = "invalid_unicode"
    INVALID_MESSAGES = "invalid_messages"
    INVALID_IDS = "invalid_ids"
    TOO_SHORT = "too_short"
    TOO_LONG = "too_long"


@dataclass(frozen=True, slots=True)
class SourceDocument:
    """One row of the dataset, before anything is known of it."""

    index: int
    id: str
    value: Any
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TokenizedDocument:
    """One document as token ids, or with the reason why it has none."""

    index: int
    id: str
    status: DocumentStatus
    ids: TokenIds
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class DocumentRow:
    """One row of `documents.parquet`."""

    document: int
    id: str
    status: DocumentStatus
    n_tokens: int
    n_truncated: int
    row_start: int | None
    row_stop: int | None
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Sequence:
    """One model input.

    `ids` is everything the model sees; its first `n_context` tokens are there only as
    context (another sequence stores them) and have no rows here.
    """

    sequence: int
    document: int
    start: int
    n_context: int
    first_row: int
    ids: TokenIds
    n_prompt: int | None = None
    """Tokens before those that the model itself added; None where it added none."""

    @property
    def n_tokens(self) -> int:
        """Number of rows that this sequence stores."""
        return len(self.ids) - self.n_context

    @property
    def row_stop(self) -> int:
        """One past the last row of this sequence."""
        return self.first_row + self.n_tokens


@dataclass(frozen=True, slots=True)
class Part:
    """Rows `[row_start, row_stop)`: one chunk of every array, and the unit of commit."""

    index: int
    row_start: int
    row_stop: int

    @property
    def n_rows(self) -> int:
        """Number of rows of this part."""
        return self.row_stop - self.row_start


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences run together, right-padded to the longest of them."""

    sequences: tuple[Sequence, ...]

    @property
    def width(self) -> int:
        """Length of the longest sequence."""
        return max(len(sequence.ids) for sequence in self.sequences)

    @property
    def n_tokens(self) -> int:
        """Real tokens in the batch, context included and padding not."""
        return sum(len(sequence.ids) for sequence in self.sequences)


@dataclass(frozen=True, slots=True)
class Finding:
    """A small table that answers a question; printed at the end of a run and shown in the report."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

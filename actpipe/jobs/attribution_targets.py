"""Whose logit is shared out at each row of a store, and into which groups rows fall."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from actpipe.compute.attribution import FoldedUnembedding, logits_room, most_probable, next_tokens
from actpipe.compute.residual import residual_hook
from actpipe.jobs.blocks import Done, RowBlock, even_blocks, map_and_sum, require_arrays
from actpipe.jobs.groups import Groups
from actpipe.stores.reading import ActivationStore

SCALE = "ln_final.hook_scale"
LOGITS_AT_ONCE = 2**23
"""Most logits computed together to find the largest: 32 MiB of float32."""
_IDS, _SEQUENCE = "tokens/input_ids", "tokens/sequence"

Numbers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
GroupsOf = Callable[[RowBlock, Numbers], Numbers]
"""From a block, and the token of each row and rank, to the number of each one's group, `(row, 1 or rank)`."""


@dataclass(frozen=True, eq=False)
class Target:
    """Whose logit is shared out."""

    token: int | Literal["next", "top"] | Numbers = "next"
    """The token that comes next, those that the model holds most probable, one id for all rows, or one for each of the
    documents with rows, -1 where it has none."""
    minus: int | Numbers | None = None
    """The token whose logit is subtracted: one for all rows, or one for each of the documents with rows."""
    n_ranks: int = 1
    """How many of the most probable tokens."""
    last_only: bool = False
    """Whether only the last row of each document counts."""

    @property
    def is_models(self) -> bool:
        """Whether the model's own logit of it may be among the stored metrics."""
        return isinstance(self.token, str) and self.token == "next" and self.minus is None

    @property
    def follows(self) -> bool:
        """Whether it is the token of the next row, so that every token must have one."""
        return isinstance(self.token, str) and self.token == "next"

    @property
    def is_top(self) -> bool:
        """Whether the model's predictions are looked at."""
        return isinstance(self.token, str) and self.token == "top"

    @property
    def arrays(self) -> list[str]:
        """Names of the arrays of tokens that it reads."""
        return [_IDS, _SEQUENCE] if self.follows else []


NEXT = Target()
"""The token that comes next."""


@dataclass(frozen=True)
class TokensOfRows:
    """Gives the tokens of each row of a block."""

    store: ActivationStore
    target: Target
    unembedding: FoldedUnembedding

    def __post_init__(self) -> None:
        """Refuse a store that does not have the row after each."""
        if self.target.follows:
            self.store.require_every_token("attribute_logits")

    def __call__(self, block: RowBlock) -> Numbers:
        """Return whose logit is shared out, `(row, rank)`; -1 where a row has no token, or none to subtract."""
        tokens = self._tokens(block)
        if not isinstance(self.target.minus, int | None):
            tokens = np.where(self._of_documents(block, self.target.minus)[:, None] < 0, -1, tokens)
        if self.target.last_only:
            tokens = np.where(self._last(block)[:, None], tokens, -1)
        return tokens

    def minus(self, block: RowBlock) -> Numbers | None:
        """Return the token that is subtracted at each row, `(row,)`."""
        minus = self.target.minus
        if minus is None:
            return None
        return np.full(block.n_rows, minus) if isinstance(minus, int) else self._of_documents(block, minus)

    def _tokens(self, block: RowBlock) -> Numbers:
        token = self.target.token
        if isinstance(token, int):
            return np.full((block.n_rows, 1), token)
        if not isinstance(token, str):
            return self._of_documents(block, token)[:, None]
        if token == "next":
            ids, sequence = (block.read_integers(name, beyond=1) for name in (_IDS, _SEQUENCE))
            return next_tokens(ids, sequence, block.n_rows)[:, None]
        stream, scale = block.read(residual_hook(self.store.shape.n_layers)), block.read(SCALE)
        at_once = max(1, LOGITS_AT_ONCE // logits_room(self.unembedding.directions.shape, self.target.n_ranks))
        pieces = [slice(start, start + at_once) for start in range(0, block.n_rows, at_once)]
        return np.concatenate(
            [most_probable(stream[rows], scale[rows], self.unembedding, self.target.n_ranks) for rows in pieces]
        )

    def _of_documents(self, block: RowBlock, by_document: Numbers) -> Numbers:
        return by_document[self.store.documents.of_rows(np.arange(block.start, block.stop))]

    def _last(self, block: RowBlock) -> npt.NDArray[np.bool_]:
        """Tell the last row of each document that has any."""
        stops = self.store.documents.row_stops
        rows = np.arange(block.start, block.stop)
        return stops[np.minimum(np.searchsorted(stops, rows, side="right"), len(stops) - 1)] == rows + 1

    @property
    def arrays(self) -> list[str]:
        """Names of the arrays that it reads."""
        return [*self.target.arrays, *([residual_hook(self.store.shape.n_layers), SCALE] if self.target.is_top else [])]

    @property
    def row_bytes(self) -> int:
        """Room that finding the tokens of a row takes, in bytes, beside what is read."""
        return 16 * self.target.n_ranks


def by_rows(groups: Groups) -> GroupsOf:
    """Group all ranks of a row alike."""
    return lambda block, _tokens: groups(block)[:, None]


def count_tokens(tokens: TokensOfRows, which: Literal["token", "target"], *, block_bytes: int, done: Done) -> Numbers:
    """Count how many rows each token id has, as the row's own (`token`) or as that whose logit it is (`target`).

    Rows without a target do not count; `target` counts every rank. Takes 8 bytes per id of the vocabulary and block.
    """
    store = tokens.store
    require_arrays(store, tokens.arrays, "attribute_logits")
    names, d_vocab = [*tokens.arrays, _IDS], store.shape.d_vocab

    def count(block: RowBlock) -> Numbers:
        targets = tokens(block)
        ids = targets if which == "target" else np.broadcast_to(block.read_integers(_IDS)[:, None], targets.shape)
        counted = ids[targets >= 0] if which == "target" else ids[:, 0][(targets >= 0).any(-1)]
        return np.bincount(counted, minlength=d_vocab).astype(np.int64)

    return map_and_sum(count, even_blocks(store, names * 2, block_bytes, more_row_bytes=tokens.row_bytes), done)


def most_frequent(counts: Numbers, n_tokens: int) -> Numbers:
    """Return the ids that occur most often, in the order of their numbers of rows; of equal ones the smaller first."""
    there = np.flatnonzero(counts)
    return there[np.argsort(-counts[there], kind="stable")][:n_tokens].astype(np.int64)


def by_tokens(which: Literal["token", "target"], chosen: Numbers, d_vocab: int) -> GroupsOf:
    """Group rows by their own token, or by that whose logit it is; tokens that are not chosen are the last group."""
    place = np.full(d_vocab, len(chosen), np.int64)
    place[chosen] = np.arange(len(chosen))

    def groups(block: RowBlock, targets: Numbers) -> Numbers:
        return place[np.maximum(targets, 0) if which == "target" else block.read_integers(_IDS)[:, None]]

    return groups

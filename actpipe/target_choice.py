"""From a recipe to the tokens whose logits are attributed, and to the groups that means are taken of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from actpipe.analysis import result_name
from actpipe.errors import DatasetError, RecipeError
from actpipe.excerpts import texts_of_ids
from actpipe.jobs.attribution_targets import (
    GroupsOf,
    Numbers,
    Target,
    TokensOfRows,
    by_rows,
    by_tokens,
    count_tokens,
    most_frequent,
)
from actpipe.jobs.blocks import Done
from actpipe.jobs.groups import by_column, by_document
from actpipe.label_choice import require_labels
from actpipe.schemas.attribution_analyses import AttributeLogitsConfig, FromColumn, TopTokens
from actpipe.stage import RunContext
from actpipe.stores.documents import RowDocuments
from actpipe.stores.results import labels
from actpipe.stores.token_table import TokenTable

_NAMED = ("token", "target", "document")
"""Groups that are no column."""


def check_targets(context: RunContext, config: AttributeLogitsConfig) -> None:
    """Refuse tokens that are not one token of the vocabulary, and columns that are not there.

    Raises:
        RecipeError: Says which.
        DatasetError: A document's token is none.
    """
    columns = [one.column for one in (config.target, config.minus) if isinstance(one, FromColumn)]
    by = [config.by.column if isinstance(config.by, FromColumn) else config.by] if config.by is not None else []
    labelled = [*columns, *(name for name in by if name not in _NAMED or isinstance(config.by, FromColumn))]
    if labelled or config.rows == "last" or config.by == "document":
        require_labels(context, config, labelled, "`by`, `rows` and columns of tokens")
    if isinstance(config.target, TopTokens) and config.target.top > context.spec.shape.d_vocab:
        raise RecipeError(
            f"{result_name(config)}: `top: {config.target.top}` are more tokens than the vocabulary's "
            f"{context.spec.shape.d_vocab}"
        )
    folder = context.corpus(config)
    choose_target(context, config, RowDocuments(TokenTable(folder)) if columns and TokenTable.exists(folder) else None)


def choose_target(context: RunContext, config: AttributeLogitsConfig, documents: RowDocuments | None) -> Target:
    """Return whose logit is meant.

    Args:
        context: The run.
        config: The settings.
        documents: Those with rows; without them tokens in columns are not looked up.

    Raises:
        RecipeError: A text is not one token, or an id is outside the vocabulary.
        DatasetError: The same of a document.
    """
    minus: int | Numbers | None = None
    if isinstance(config.minus, FromColumn):
        minus = None if documents is None else _tokens_of_documents(context, config, config.minus.column, documents)
    elif config.minus is not None:
        minus = token_id(context, config, config.minus)
    last_only, wanted = config.rows == "last", config.target
    if isinstance(wanted, TopTokens):
        return Target("top", minus, wanted.top, last_only)
    if isinstance(wanted, FromColumn):
        found = None if documents is None else _tokens_of_documents(context, config, wanted.column, documents)
        return Target(np.empty(0, np.int64) if found is None else found, minus, 1, last_only)
    if wanted in ("next", "top"):
        return Target("next" if wanted == "next" else "top", minus, 1, last_only)
    return Target(token_id(context, config, wanted), minus, 1, last_only)


def token_id(context: RunContext, config: AttributeLogitsConfig, token: int | str) -> int:
    """Return the id of a token that is given by its text or its id.

    Raises:
        RecipeError: A text is not one token, or an id is outside the vocabulary.
    """
    name, d_vocab = result_name(config), context.spec.shape.d_vocab
    if isinstance(token, str):
        ids = context.spec.tokenizer(token, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            spaced = context.spec.tokenizer(f" {token}", add_special_tokens=False)["input_ids"]
            hint = f" (with a space before it, {f' {token}'!r}, it is one)" if len(spaced) == 1 else ""
            raise RecipeError(f"{name}: {token!r} is {len(ids)} tokens ({ids}), name one token, by text or id{hint}")
        return int(ids[0])
    if not 0 <= token < d_vocab:
        raise RecipeError(f"{name}: token {token} is outside the vocabulary of {d_vocab}")
    return token


def _tokens_of_documents(
    context: RunContext, config: AttributeLogitsConfig, column: str, documents: RowDocuments
) -> Numbers:
    """Return the token that a column names for each document with rows, -1 where it names none."""
    values = documents.column(column)
    kind = values.type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_integer(kind)):
        raise DatasetError(f"{result_name(config)}: column {column!r} holds {kind}; tokens are texts or ids")
    encoded = values.combine_chunks().dictionary_encode()
    ids = [-1]
    for value in encoded.dictionary.to_pylist():
        try:
            ids.append(token_id(context, config, value))
        except RecipeError as error:
            first = documents.column("id")[values.index(pa.scalar(value, kind)).as_py()]
            raise DatasetError(f"{error}; column {column!r} says so of the document {first.as_py()!r}") from error
    if len(ids) == 1:
        raise DatasetError(f"{result_name(config)}: column {column!r} names no token for any document with rows")
    place = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    return np.array(ids, np.int64)[place + 1]


@dataclass(frozen=True)
class Grouping:
    """Into which groups rows fall, and what these are called."""

    name: str
    """`value`, `document`, `token` or `target`: the axis of the result."""
    groups: GroupsOf
    n_groups: int
    coords: Mapping[str, Any]
    """Labelled arrays along the axis; the axis' own under its name."""


def choose_grouping(
    config: AttributeLogitsConfig, tokens: TokensOfRows, *, done: Done = lambda _: None
) -> Grouping | None:
    """Return the groups that `by` asks for; tokens are counted in a pass over the store beforehand."""
    wanted, store = config.by, tokens.store
    if wanted is None:
        return None
    if isinstance(wanted, FromColumn) or wanted not in _NAMED:
        groups, values = by_column(store, wanted.column if isinstance(wanted, FromColumn) else wanted)
        return Grouping("value", by_rows(groups), len(values), {"value": labels(values)})
    if wanted == "document":
        documents = store.documents
        coords = {
            "document": documents.column("document").to_numpy(),
            "document_id": labels([str(one) for one in documents.column("id").to_pylist()]),
        }
        return Grouping("document", by_rows(by_document(store)), len(documents), coords)
    which: Literal["token", "target"] = "token" if wanted == "token" else "target"
    counts = count_tokens(tokens, which, block_bytes=config.block_bytes, done=done)
    chosen = most_frequent(counts, config.tokens)
    there = np.append(chosen, -1) if counts.astype(bool).sum() > len(chosen) else chosen
    texts = np.append(texts_of_ids(store, chosen), ["(others)"])[: len(there)]
    coords = {which: there, f"{which}_text": labels(texts.tolist())}
    return Grouping(which, by_tokens(which, chosen, store.shape.d_vocab), len(there), coords)

"""Whether the documents of a corpus have, or will have, some labels."""

from __future__ import annotations

from collections.abc import Iterable

from actpipe.analysis import result_name
from actpipe.errors import RecipeError, did_you_mean
from actpipe.schemas.base import AnalysisConfig
from actpipe.schemas.recipe import TokenizeTextConfig
from actpipe.stage import RunContext
from actpipe.stores.layout import RunFolder
from actpipe.stores.token_table import TokenTable


def require_labels(context: RunContext, config: AnalysisConfig, columns: Iterable[str], keys: str) -> None:
    """Refuse labels that documents.parquet does not have, or will not have by this recipe.

    Args:
        context: The run.
        config: The analysis.
        columns: The labels; without any, only whether the corpus keeps track of documents is looked at.
        keys: What of the analysis asks for them, for errors.

    Raises:
        RecipeError: Says which columns there are, or why there is none.
    """
    name, tokenizing = result_name(config), context.settings_of(TokenizeTextConfig, config.corpus)
    folder = context.corpus(config)
    table = _readable_table(folder)
    planned = "none" if tokenizing is None else tokenizing.compat
    if {"tl2", "tl3"} & {planned, "none" if table is None else table.manifest.layout}:
        raise RecipeError(
            f"{name}: the corpus {config.corpus!r} is tokenized as TransformerLens does, which keeps no track of "
            f"documents; leave out {keys}, or `compat`"
        )
    known: tuple[str, ...] | None = None
    if table is not None:
        known = table.document_columns
    elif tokenizing is not None and tokenizing.keep_columns != "all":
        known = () if tokenizing.keep_columns == "none" else tokenizing.keep_columns
    for column in columns:
        if known is not None and column not in known:
            raise RecipeError(
                f"{name}: the documents of the corpus {config.corpus!r} have no column {column!r}, only "
                f"{', '.join(known) or 'none'}{did_you_mean(column, known)}"
            )


def _readable_table(folder: RunFolder) -> TokenTable | None:
    """Return the corpus' token table; none where there is none yet, or a broken one that a repair makes again."""
    try:
        return TokenTable(folder) if TokenTable.exists(folder) else None
    except ValueError:
        return None

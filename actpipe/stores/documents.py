"""From rows to their documents."""

from __future__ import annotations

from itertools import chain

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from actpipe.compute.choosing import is_drawn
from actpipe.errors import DatasetError, IncompleteStoreError, did_you_mean
from actpipe.stores.kept_rows import KeptRows
from actpipe.stores.token_table import TokenTable

Indices = npt.NDArray[np.int64]


class RowDocuments:
    """The documents that have rows, in the order of their rows.

    A row belongs to the first document that ends after it: its own, or, for a BOS between two documents,
    the one it stands before.

    Args:
        tokens: The token table.
        kept: The rows of a store that keeps only some; without it rows are those of the token table.

    Raises:
        IncompleteStoreError: The corpus keeps no track of documents.
    """

    def __init__(self, tokens: TokenTable, kept: KeptRows | None = None) -> None:
        if tokens.manifest.layout in ("tl2", "tl3"):
            raise IncompleteStoreError(
                f"{tokens.folder.root} was tokenized as TransformerLens does, which keeps no track of documents; "
                "labels, splits and choosing by document need `compat: none`"
            )
        self.tokens = tokens
        stops = tokens.read_documents(["row_stop"])["row_stop"]
        self._have_rows = pc.is_valid(stops)
        row_stops: Indices = stops.filter(self._have_rows).to_numpy().astype(np.int64)
        self._row_stops = row_stops if kept is None else kept.count_before(row_stops)

    def __len__(self) -> int:
        return len(self._row_stops)

    @property
    def row_stops(self) -> Indices:
        """One past the last row of each document."""
        return self._row_stops

    def of_rows(self, rows: Indices) -> Indices:
        """Return, for each row, which of the documents with rows it belongs to."""
        return np.searchsorted(self._row_stops, rows, side="right")

    def held_out(self, fraction: float, seed: int) -> npt.NDArray[np.bool_]:
        """Return, for each of the documents with rows, whether it is kept for judging what others were used for.

        Its id alone decides (see `choosing.is_drawn`), whatever else is in the corpus: documents of one id are always
        on the same side, in other runs too.
        """
        ids = chain.from_iterable(chunk.to_pylist() for chunk in self.column("id").chunks)
        return np.fromiter((is_drawn(f"{seed}:{document}", fraction) for document in ids), np.bool_, len(self))

    def column(self, name: str) -> pa.ChunkedArray:
        """Return a column of documents.parquet, for documents with rows only.

        Raises:
            DatasetError: There is no such column.
        """
        known = self.tokens.document_columns
        if name not in known:
            raise DatasetError(
                f"documents.parquet of {self.tokens.folder.root} has no column {name!r}, "
                f"only {', '.join(known)}{did_you_mean(name, known)}"
            )
        return self.tokens.read_documents([name])[name].filter(self._have_rows)

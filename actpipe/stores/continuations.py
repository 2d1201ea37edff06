"""What a model added to prompts, piece by piece, until the token table that is made of it is there."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from actpipe.records import Part, TokenIds
from actpipe.stores.layout import RunFolder, take_away, write_whole
from actpipe.stores.remote import publish


@dataclass(frozen=True)
class Continuations:
    """Finished pieces in a corpus' folder; each is there whole or not at all.

    A worker that is late with a piece finds the folder gone, and does not make it again.
    """

    folder: RunFolder

    @property
    def _root(self) -> Path:
        return self.folder.root / "continuations"

    def _path(self, part: Part) -> Path:
        return self._root / f"part-{part.index:08d}.parquet"

    def begin(self) -> None:
        """Make the folder."""
        self._root.mkdir(parents=True, exist_ok=True)

    def missing(self, parts: Iterable[Part]) -> list[Part]:
        """Return the pieces that are not there yet."""
        return [part for part in parts if not self._path(part).is_file()]

    def write(self, part: Part, new: Mapping[int, TokenIds]) -> None:
        """Keep the new ids of each prompt of a piece, by the number of its sequence."""
        table = pa.table({"sequence": pa.array(new, pa.int64()), "ids": pa.array(new.values(), pa.list_(pa.int32()))})
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd")
        write_whole(self._path(part), buffer.getvalue(), parents=False)
        publish([self._path(part)])

    def read(self, parts: Iterable[Part]) -> Iterator[tuple[int, TokenIds]]:
        """Yield the new ids of every prompt, in the order of the sequences."""
        for part in parts:
            table = pq.read_table(self._path(part))
            for sequence, ids in zip(table["sequence"].to_pylist(), table["ids"].to_pylist(), strict=True):
                yield sequence, np.array(ids, np.int32)

    def remove(self) -> None:
        """Remove all pieces, once the token table holds what they held."""
        take_away(self._root, self.folder)

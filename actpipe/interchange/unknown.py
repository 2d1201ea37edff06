"""What a store says where a source knows neither its model nor its documents: as little as can be, and marked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from actpipe.errors import InterchangeError
from actpipe.interchange.formats import IDS, Reader, Values, cut
from actpipe.planning import rows_per_part_for
from actpipe.records import DocumentRow, DocumentStatus, Sequence
from actpipe.schemas.manifest import (
    ArrayManifest,
    BlockRecord,
    ModelIdentity,
    ShapeRecord,
    StoreManifest,
    TokenTableManifest,
)
from actpipe.stores.layout import RunFolder
from actpipe.stores.token_table import TokenTableWriter

UNKNOWN = "unknown"
NO_ID = -1
"""In the token table, where a source has no ids."""
_SEQUENCE_ROWS = 1024
"""Rows of a sequence of the token table where the source has no sequences."""
_KEPT_DTYPES = {"bool", "int32", "int64", "float16", "bfloat16", "float32"}
_D_MODEL = ("hook_embed", "hook_pos_embed", "hook_normalized", "_out")


def check_foreign(reader: Reader, source: Path) -> None:
    """Refuse what stores do not hold.

    Raises:
        InterchangeError: An array has such an element type, or ids are not one number for each row.
    """
    for path, column in reader.columns.items():
        if path == IDS:
            if column.row_shape or np.dtype(column.dtype).kind not in "iu":
                raise InterchangeError(f"the token ids of {source} are {column.dtype} {column.row_shape} for each row")
        elif column.dtype not in _KEPT_DTYPES:
            raise InterchangeError(
                f"{path} of {source} is {column.dtype}, which stores do not hold; write it as float32, float16 or int32"
            )
        elif 0 in column.row_shape:
            raise InterchangeError(f"{path} of {source} has rows without a value: {column.row_shape}")


def write_unknown_tokens(run: RunFolder, reader: Reader, name: str) -> int:
    """Write a token table of one document, with the ids that there are.

    Returns:
        One more than the largest id; 1 where there are none.
    """
    writer = TokenTableWriter(run, {})
    document = DocumentRow(0, "(imported)", DocumentStatus.OK, reader.n_rows, 0, 0, reader.n_rows)
    writer.add(document)
    length, largest = _length(reader), 0
    for start, ids in _ids(reader, length):
        largest = max(largest, int(ids.max()))
        for first in range(0, len(ids), length):
            row = start + first
            writer.add(Sequence(row // length, 0, row, 0, row, ids[first : first + length]))
    tokens = "" if IDS in reader.columns else ", tokens unknown"
    manifest = TokenTableManifest(
        layout="documents" if reader.context_length is None else "packed",
        context_length=length,
        n_documents=1,
        n_sequences=writer.n_sequences,
        n_rows=reader.n_rows,
        n_truncated=0,
        status_counts={"ok": 1},
        first_problems={},
        bos_id=None,
        separator_id=None,
        pad_id=None,
        dataset=f"{name} (imported, documents unknown{tokens})",
        dataset_fingerprint=None,
        tokenizer_sha256=None,
        checksums={},
    )
    writer.commit(manifest)
    return largest + 1


def _length(reader: Reader) -> int:
    return reader.context_length or min(reader.n_rows, _SEQUENCE_ROWS)


def _ids(reader: Reader, length: int) -> Iterator[tuple[int, Values]]:
    """Yield blocks of whole sequences of ids, with the number of their first row."""
    for start, stop in cut(0, reader.n_rows, row_bytes=8, multiple_of=length):
        if IDS not in reader.columns:
            yield start, np.full(stop - start, NO_ID, np.int32)
            continue
        ids = reader.read(IDS, start, stop)
        if ids.min() < 0 or ids.max() > np.iinfo(np.int32).max:
            raise InterchangeError(f"token ids must lie between 0 and 2^31 - 1, not {ids.min()} and {ids.max()}")
        yield start, ids.astype(np.int32)


def plan_unknown(reader: Reader, d_vocab: int) -> StoreManifest:
    """Return the manifest of a store whose model is unknown: of its shape, only what the arrays show."""
    arrays = []
    for path, column in reader.columns.items():
        dtype = "int32" if path == IDS else column.dtype
        arrays.append(
            ArrayManifest(path=path, dtype=dtype, row_shape=column.row_shape, axes=_axes(path, column.row_shape))
        )
    arrays.sort(key=lambda array: not array.path.startswith("tokens/"))
    length = _length(reader)
    floats = [array for array in arrays if array.path.startswith("activations/")] or arrays
    return StoreManifest(
        corpus="main",
        n_rows=reader.n_rows,
        rows_per_part=rows_per_part_for(reader.n_rows, multiple_of=length if reader.context_length else 1),
        context_length=length,
        model=ModelIdentity(name=UNKNOWN, revision=None, family=UNKNOWN, fingerprint="0" * 64, dtype=floats[0].dtype),
        shape=_shape(floats, d_vocab, length),
        arrays=tuple(arrays),
    )


def _axes(path: str, row_shape: tuple[int, ...]) -> tuple[str, ...]:
    hook = path.rsplit(".", 1)[-1].rsplit("/", 1)[-1]
    if len(row_shape) == 1 and ("hook_resid" in hook or hook.endswith(_D_MODEL)):
        return ("row", "d_model")
    return ("row", *(f"value_{axis}" for axis in range(len(row_shape))))


def _shape(arrays: list[ArrayManifest], d_vocab: int, length: int) -> ShapeRecord:
    """Return the least that a shape can be: as many opaque blocks as names speak of."""
    widths = [array.row_shape[-1] for array in arrays if "d_model" in array.axes]
    numbers = [name[1] for array in arrays if len(name := array.path.split(".")) > 2 and name[1].isdecimal()]
    block = BlockRecord(
        n_heads=1,
        n_kv_heads=1,
        d_head=1,
        d_qk=1,
        d_mlp=0,
        mlp="opaque",
        n_experts=0,
        n_experts_per_token=0,
        projections=False,
        rotary=False,
        parallel=False,
        ln1=False,
        ln2=False,
        ln1_post=False,
        ln2_post=False,
        qk_norm="none",
        attention=False,
        z=False,
        gated_z=False,
        branches=(),
        others=(),
    )
    return ShapeRecord(
        d_model=widths[0] if widths else 1,
        d_vocab=d_vocab,
        n_ctx=length,
        norm="LN",
        learned_positions=False,
        blocks=(block,) * (max(map(int, numbers), default=0) + 1),
        embed_norm=False,
        logit_softcap=None,
        withheld=(),
        final_norm=False,
    )

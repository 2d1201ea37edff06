"""A run folder of activations that others have stored, or that were exported."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from actpipe.errors import InterchangeError
from actpipe.interchange.aside import made_aside
from actpipe.interchange.formats import Reader, Values, cut, find_format, from_written
from actpipe.interchange.sidecar import copy_tokens, read_sidecar
from actpipe.interchange.unknown import check_foreign, plan_unknown, write_unknown_tokens
from actpipe.planning import plan_parts
from actpipe.records import Part
from actpipe.schemas.interchange import ExportRecord
from actpipe.schemas.manifest import ArrayManifest, StoreManifest
from actpipe.stores.layout import RunFolder
from actpipe.stores.token_table import TokenTable
from actpipe.stores.writing import PartWriter, allow_open_files, create_store
from actpipe.telemetry import Telemetry

_PLACES = {"tokens/position": "int32", "tokens/sequence": "int64"}
"""What a token table says of rows, where a format has no room for it."""


def import_run(
    source: str | Path,
    out: str | Path,
    *,
    format: str,  # noqa: A002 - the name of the flag
    telemetry: Telemetry | None = None,
) -> Path:
    """Make a run folder of activations in another format, block by block.

    An export comes back as it was: values to the bit, token table, tokenizer, identity of the model. Of what another
    program wrote, model and documents are unknown, and say so: the model is `unknown`, and one document holds all
    rows. Where there are no token ids, the token table has -1 in their place and the store no `tokens/input_ids`.

    Args:
        source: Folder of the data; for `safetensors` and `npy` also one file.
        out: Run folder to make; new or empty. It appears when it is whole.
        format: `sae_lens`, `safetensors`, `datasets` or `npy`; rows `(n_rows, ...)`, of `sae_lens` sequences.
        telemetry: Where progress shows.

    Returns:
        `out`.

    Raises:
        InterchangeError: Unknown format, empty or unreadable source, an element type that stores do not have, or
            `out` is not empty.
        StorageError: The disk does not take it.
    """
    how, source, out = find_format(format), Path(source), Path(out)
    if not source.exists():
        raise InterchangeError(f"there is nothing at {source}")
    sidecar = read_sidecar(source)
    if sidecar is not None and sidecar[0].layout != format:
        raise InterchangeError(f"{source} was exported as {sidecar[0].layout}, not as {format}; say that format")
    reader = how.open_reader(source)
    if not reader.n_rows:
        raise InterchangeError(f"{source} holds no rows")
    with made_aside(out) as folder:
        run = RunFolder(folder)
        manifest = _prepare_foreign(run, reader, source) if sidecar is None else _prepare_export(run, reader, *sidecar)
        _fill(run, reader, manifest, telemetry or Telemetry())
        shutil.rmtree(run.partial, ignore_errors=True)
    return out


def _prepare_foreign(run: RunFolder, reader: Reader, source: Path) -> StoreManifest:
    check_foreign(reader, source)
    n_ids = write_unknown_tokens(run, reader, source.name)
    return plan_unknown(reader, n_ids)


def _prepare_export(run: RunFolder, reader: Reader, record: ExportRecord, kept: RunFolder) -> StoreManifest:
    """Check the files against their record, and give the run its token table.

    Raises:
        InterchangeError: Files are missing, or are not of this record.
    """
    manifest = record.store
    missing = sorted(record.written.keys() - reader.columns.keys())
    if missing or reader.n_rows != manifest.n_rows:
        raise InterchangeError(
            f"the export beside {kept.root} is not whole: it has {reader.n_rows} of {manifest.n_rows} rows"
            + (f" and lacks {', '.join(missing)}" if missing else "")
        )
    for path, dtype in record.written.items():
        if reader.columns[path].dtype != dtype:
            raise InterchangeError(f"{path} is {reader.columns[path].dtype}, and was exported as {dtype}")
    if not TokenTable.exists(kept):
        write_unknown_tokens(run, reader, manifest.model.name)
        return manifest
    copy_tokens(kept, run)
    there = {array.path for array in manifest.arrays}
    places = [
        ArrayManifest(path=path, dtype=dtype, row_shape=(), axes=("row",))
        for path, dtype in _PLACES.items()
        if path not in there
    ]
    return manifest.model_copy(update={"arrays": (*places, *manifest.arrays)})


def _fill(run: RunFolder, reader: Reader, manifest: StoreManifest, telemetry: Telemetry) -> None:
    create_store(run, manifest)
    allow_open_files(len(manifest.arrays))
    with telemetry.progress("import", manifest.n_rows, "rows") as meter:
        for part in plan_parts(manifest.n_rows, manifest.rows_per_part):
            writer = PartWriter(run, manifest, part, fsync="none")
            try:
                for array in manifest.arrays:
                    _fill_array(run, writer, reader, array, part)
                writer.commit()
            finally:
                writer.abandon()
            meter.advance(part.n_rows)


def _fill_array(run: RunFolder, writer: PartWriter, reader: Reader, array: ArrayManifest, part: Part) -> None:
    if array.path not in reader.columns:
        writer.write(array.path, part.row_start, _places(run, array, part))
        return
    row_bytes = reader.columns[array.path].row_bytes
    for start, stop in cut(part.row_start, part.row_stop, row_bytes=row_bytes):
        writer.write(array.path, start, _rows(reader, array, start, stop))


def _places(run: RunFolder, array: ArrayManifest, part: Part) -> Values:
    """Return where in the model inputs a part's rows stand, from the token table."""
    pieces = []
    for sequence in TokenTable(run).read_sequences(part.row_start, part.row_stop):
        rows = np.arange(max(part.row_start, sequence.first_row), min(part.row_stop, sequence.row_stop))
        if array.path == "tokens/sequence":
            pieces.append(np.full(len(rows), sequence.sequence))
        else:
            pieces.append(rows - sequence.first_row + sequence.n_context)
    return np.concatenate(pieces).astype(array.dtype)


def _rows(reader: Reader, array: ArrayManifest, start: int, stop: int) -> Values:
    values = reader.read(array.path, start, stop)
    return from_written(values, array.dtype).reshape(stop - start, *array.row_shape)

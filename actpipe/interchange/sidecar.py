"""What an export keeps for its own return: the record, the token table, the rows kept, the tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path

from pydantic import ValidationError

from actpipe.errors import InterchangeError
from actpipe.interchange.formats import SIDECAR
from actpipe.schemas.interchange import ExportRecord
from actpipe.stores.layout import RunFolder, crc32c_of
from actpipe.stores.token_table import TokenTable


def write_sidecar(folder: Path, record: ExportRecord, source: RunFolder) -> None:
    """Write the record, and copy the token table where all of its rows are exported."""
    kept = RunFolder(folder / SIDECAR)
    kept.root.mkdir()
    (kept.root / "record.json").write_text(record.to_json(), encoding="utf-8")
    if TokenTable.exists(source):
        n_rows = TokenTable(source).manifest.n_rows
        if record.store.kept_rows is not None or n_rows == record.store.n_rows:
            copy_tokens(source, kept)


def read_sidecar(source: Path) -> tuple[ExportRecord, RunFolder] | None:
    """Return the record of an export and the folder of its token table; None where another program wrote it.

    Raises:
        InterchangeError: The record cannot be read.
    """
    path = source / SIDECAR / "record.json"
    if not path.is_file():
        return None
    try:
        return ExportRecord.from_json(path.read_bytes()), RunFolder(path.parent)
    except ValidationError as error:
        raise InterchangeError(f"{path} is no record of an export ({str(error).splitlines()[0]})") from error


def copy_tokens(source: RunFolder, target: RunFolder) -> None:
    """Copy a token table with its record, the rows kept and the tokenizer, as far as there are any.

    Raises:
        InterchangeError: A file is not the one that was committed.
    """
    for name, expected in TokenTable(source).manifest.checksums.items():
        if not (source.root / name).is_file() or crc32c_of(source.root / name) != expected:
            raise InterchangeError(f"{source.root / name} is not the file that was committed; export the run again")
    target.commits.mkdir(parents=True, exist_ok=True)
    pairs = (
        (source.documents, target.documents),
        (source.sequences, target.sequences),
        (source.rows, target.rows),
        (source.rows_commit, target.rows_commit),
        (source.token_commit, target.token_commit),
    )
    for file, place in pairs:
        if file.is_file():
            shutil.copyfile(file, place)
    if source.tokenizer.is_dir():
        shutil.copytree(source.tokenizer, target.tokenizer)

"""Where documents come from: Hugging Face datasets, and local files read line by line.

Line files (JSON lines, plain text) are read here and not through `datasets`, because one
document that is not valid Unicode must not end the run there.
"""

from __future__ import annotations

import glob
import hashlib
import json
import lzma
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from actpipe.errors import DatasetError, did_you_mean
from actpipe.schemas.recipe import DatasetConfig

Batch = dict[str, list[Any]]

_BATCH_DOCUMENTS = 256
_BATCH_BYTES = 8 * 2**20
_ENDINGS = {
    ".parquet": "parquet",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "text",
    ".md": "text",
    ".arrow": "arrow",
}
_COMPRESSED = {".gz", ".bz2", ".xz", ".zst"}


class Source(Protocol):
    """Anything that gives batches of columns."""

    @property
    def title(self) -> str:
        """What it is, for people."""

    @property
    def fingerprint(self) -> str | None:
        """Changes when the content does, where that is known without reading all of it."""

    @property
    def schema(self) -> pa.Schema | None:
        """Columns and types, where they are known before reading."""

    @property
    def length(self) -> int | None:
        """Number of documents, where it is known before reading."""

    def guess_length(self) -> int | None:
        """Return about how many documents there are, where that is cheap to say."""

    def batches(self) -> Iterator[Batch]:
        """Yield columns of some documents at a time, in order, a few MiB of text at most."""

    def among(self, documents: range) -> Source | None:
        """Return the source of some documents alone, where it does not take reading those before them."""


def open_source(config: DatasetConfig, base: Path) -> Source:
    """Open what a recipe's `dataset` names; relative paths start from `base`.

    Raises:
        DatasetError: There is no such file, folder or dataset, or it holds nothing.
    """
    path = config.path if "://" in config.path else str(base / Path(config.path).expanduser())
    if "://" not in path and Path(path).is_dir():
        return _open_folder(config, Path(path))
    files = [path] if "://" in path else sorted(glob.glob(path, recursive=True))  # noqa: PTH207 - absolute patterns
    if files:
        return _open_files(config, files)
    _refuse_missing_file(config, path)
    return _load(config, config.path, config.path, data_files=None)


def _refuse_missing_file(config: DatasetConfig, path: str) -> None:
    is_pattern = any(letter in config.path for letter in "*?[")
    looks_local = config.path.startswith((".", "/", "~")) or Path(path).suffix in {*_ENDINGS, *_COMPRESSED}
    if not (looks_local or is_pattern):
        return
    folder = Path(path).parent
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    what = "no file matches" if is_pattern else "there is no file or folder"
    raise DatasetError(f"{what} {path}{did_you_mean(Path(path).name, names)}")


def _open_folder(config: DatasetConfig, folder: Path) -> Source:
    if not any(folder.iterdir()):
        raise DatasetError(f"{folder} is empty: no dataset, no data files")
    if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
        import datasets

        saved = datasets.load_from_disk(str(folder))
        if isinstance(saved, dict):
            if config.split not in saved:
                raise DatasetError(f"{folder} has no split {config.split!r}; it has {', '.join(saved)}")
            saved = saved[config.split]
        return DatasetSource(saved, folder.name)
    return _load(config, str(folder), folder.name, data_files=None)


def _open_files(config: DatasetConfig, files: list[str]) -> Source:
    kind = _format_of(config, files[0])
    title = Path(files[0]).name if len(files) == 1 else f"{config.path} ({len(files)} files)"
    if kind in ("json", "text"):
        if config.split != "train":
            raise DatasetError(
                f"{title} has one split, `train`, and {config.split!r} was asked for; "
                "`max_documents` takes the first documents"
            )
        reader = _read_json if kind == "json" else _TEXT_READERS[config.text_by]
        return FileSource(tuple(files), title, reader)
    if kind == "parquet":
        _refuse_broken_parquet(files)
    return _load(config, kind, title, data_files=files)


def _refuse_broken_parquet(files: list[str]) -> None:
    """Read the footer of each file on this machine, so that a broken shard is named before anything is read."""
    for file in files:
        if "://" not in file:
            try:
                pq.read_metadata(file)
            except (pa.ArrowException, OSError) as error:
                raise DatasetError(
                    f"{file} is no whole Parquet file: {_first_line(error).rstrip('.')}; fetch it again"
                ) from error


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@contextmanager
def _broken_data_named(title: str) -> Iterator[None]:
    """Within, data that cannot be read is a DatasetError."""
    try:
        yield
    except DatasetError:
        raise
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, pa.ArrowException) as error:
        raise DatasetError(f"cannot read {title}: {_first_line(error)}") from error


def _format_of(config: DatasetConfig, path: str) -> str:
    if config.format != "auto":
        return config.format
    suffixes = [suffix for suffix in Path(path).suffixes if suffix not in _COMPRESSED]
    ending = suffixes[-1].lower() if suffixes else ""
    if ending not in _ENDINGS:
        raise DatasetError(
            f"cannot tell the format of {path} by its ending; set `format` to parquet, json, csv, text or arrow"
        )
    return _ENDINGS[ending]


def _load(config: DatasetConfig, location: str, title: str, *, data_files: list[str] | None) -> Source:
    """Let `datasets` load a hub name, a folder, or files of a format."""
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    options: dict[str, Any] = {"delimiter": "\t"} if data_files and data_files[0].endswith(".tsv") else {}
    try:
        loaded = datasets.load_dataset(
            location,
            name=config.config,
            data_files=data_files,
            split=config.split,
            revision=config.revision,
            streaming=config.streaming,
            **options,
        )
    except (OSError, ValueError, datasets.exceptions.DatasetsError, pa.ArrowException) as error:
        reason = _first_line(error.__cause__ or error)
        raise DatasetError(f"cannot load the dataset {title!r}: {reason}") from error
    return DatasetSource(loaded, title)


class DatasetSource:
    """A dataset of `datasets`, whether it streams or not."""

    def __init__(self, dataset: Any, title: str) -> None:
        self._dataset = dataset
        self.title = title
        self.fingerprint: str | None = getattr(dataset, "_fingerprint", None)
        self.length: int | None = len(dataset) if hasattr(dataset, "__len__") else None

    def guess_length(self) -> int | None:
        """Return the length, which is exact where it is known."""
        return self.length

    @property
    def schema(self) -> pa.Schema | None:
        """Columns and types, from the dataset's features."""
        features = self._dataset.features
        return None if features is None else features.arrow_schema

    def among(self, documents: range) -> Source | None:
        """Return the source of some documents alone; a dataset that streams is read from its beginning only."""
        return None if self.length is None else DatasetSource(self._dataset.select(documents), self.title)

    def batches(self) -> Iterator[Batch]:
        """Yield columns of some documents at a time."""
        features = self._dataset.features or {}
        json_columns = [name for name, feature in features.items() if type(feature).__name__ == "Json"]
        for table in self._tables():
            for piece in _pieces(table):
                batch = {name: _to_list(piece[name]) for name in piece.column_names}
                for name in json_columns:
                    batch[name] = [None if value is None else json.loads(value) for value in batch[name]]
                yield batch

    def _tables(self) -> Iterator[pa.Table]:
        tables = iter(self._dataset.with_format("arrow").iter(batch_size=_BATCH_DOCUMENTS))
        while True:
            with _broken_data_named(f"the dataset {self.title!r}"):
                table = next(tables, None)
            if table is None:
                return
            yield table


def _pieces(table: pa.Table) -> Iterator[pa.Table]:
    """Halve a table until each piece is small, so that huge documents are not held together."""
    if table.nbytes <= _BATCH_BYTES or table.num_rows <= 1:
        yield table
        return
    half = table.num_rows // 2
    yield from _pieces(table.slice(0, half))
    yield from _pieces(table.slice(half))


def _to_list(column: pa.ChunkedArray) -> list[Any]:
    """Return Python values; text that is not valid UTF-8 keeps its bytes as lone surrogates."""
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        raw = column.cast(pa.large_binary()).to_pylist()
        return [None if value is None else value.decode("utf-8", "surrogateescape") for value in raw]


Row = Mapping[str, Any]
Reader = Callable[[str], Iterable[tuple[Row, int]]]
"""From a file's path to its rows, each with its size in bytes."""


@dataclass(frozen=True)
class FileSource:
    """Line files, one after another."""

    files: tuple[str, ...]
    title: str
    reader: Reader
    schema: pa.Schema | None = None
    length: int | None = None

    @property
    def fingerprint(self) -> str | None:
        """SHA-256 of names and sizes; none for remote files."""
        if any("://" in file for file in self.files):
            return None
        parts = (f"{Path(file).name}:{Path(file).stat().st_size}" for file in self.files)
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def guess_length(self) -> int | None:
        """Guess from the size of the files and that of the first documents; none for remote or packed files."""
        if any("://" in file or Path(file).suffix in _COMPRESSED for file in self.files):
            return None
        sizes = [size for _, size in islice(self.reader(self.files[0]), _BATCH_DOCUMENTS)]
        total = sum(Path(file).stat().st_size for file in self.files)
        return max(len(sizes), round(total * len(sizes) / max(1, sum(sizes)))) if sizes else 0

    def among(self, documents: range) -> Source | None:
        """Return None: where a line begins is only known after those before it."""
        del documents
        return None

    def batches(self) -> Iterator[Batch]:
        """Yield columns of some documents at a time."""
        pending: list[Row] = []
        n_bytes = 0
        for file in self.files:
            for row, size in self.reader(file):
                pending.append(row)
                n_bytes += size
                if len(pending) == _BATCH_DOCUMENTS or n_bytes >= _BATCH_BYTES:
                    yield _columns(pending)
                    pending, n_bytes = [], 0
        if pending:
            yield _columns(pending)


def _columns(rows: list[Row]) -> Batch:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _lines(path: str) -> Iterator[bytes]:
    with fsspec.open(path, "rb", compression="infer") as file:
        lines = iter(file)
        while True:
            with _broken_data_named(path):
                line = next(lines, None)
            if line is None:
                return
            yield line


def _text(line: bytes) -> str:
    return line.decode("utf-8", "surrogateescape")


def _read_json(path: str) -> Iterator[tuple[Row, int]]:
    """Read JSON lines, or one JSON array of objects."""
    for number, line in enumerate(_lines(path), start=1):
        if number == 1 and line.lstrip().startswith(b"["):
            yield from _read_json_array(path)
            return
        if not line.strip():
            continue
        try:
            row = json.loads(_text(line))
        except json.JSONDecodeError as error:
            raise DatasetError(f"{path}, line {number}: not JSON: {error.msg} at column {error.colno}") from error
        if not isinstance(row, dict):
            raise DatasetError(f"{path}, line {number}: a JSON object was expected, not {type(row).__name__}")
        yield row, len(line)


def _read_json_array(path: str) -> Iterator[tuple[Row, int]]:
    text = "".join(map(_text, _lines(path)))
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise DatasetError(f"{path}: not JSON: {error}") from error
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DatasetError(f"{path}, entry {number}: a JSON object was expected, not {type(row).__name__}")
        yield row, len(text) // max(1, len(rows))


def _read_text_lines(path: str) -> Iterator[tuple[Row, int]]:
    for line in _lines(path):
        yield {"text": _text(line).rstrip("\r\n")}, len(line)


def _read_text_paragraphs(path: str) -> Iterator[tuple[Row, int]]:
    """Read runs of lines that are not blank."""
    paragraph: list[str] = []
    for line in _lines(path):
        text = _text(line).rstrip("\r\n")
        if text.strip():
            paragraph.append(text)
        elif paragraph:
            yield _paragraph(paragraph)
            paragraph = []
    if paragraph:
        yield _paragraph(paragraph)


def _paragraph(lines: list[str]) -> tuple[Row, int]:
    text = "\n".join(lines)
    return {"text": text}, len(text)


def _read_text_document(path: str) -> Iterator[tuple[Row, int]]:
    text = "".join(map(_text, _lines(path)))
    yield {"text": text}, len(text)


_TEXT_READERS: dict[str, Reader] = {
    "line": _read_text_lines,
    "paragraph": _read_text_paragraphs,
    "document": _read_text_document,
}

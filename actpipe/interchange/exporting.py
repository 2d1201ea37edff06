"""A finished store in a format that others read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actpipe.describing import open_run
from actpipe.errors import InterchangeError
from actpipe.interchange.aside import made_aside
from actpipe.interchange.formats import IDS, Column, Format, cut, find_format, to_written
from actpipe.interchange.sidecar import write_sidecar
from actpipe.schemas.interchange import ExportRecord
from actpipe.stores.layout import MAIN_CORPUS
from actpipe.stores.reading import ActivationStore
from actpipe.stores.token_table import TokenTable
from actpipe.telemetry import Telemetry


def export_run(
    run: str | Path,
    out: str | Path,
    *,
    format: str,  # noqa: A002 - the name of the flag
    hooks: Iterable[str] = (),
    corpus: str = MAIN_CORPUS,
    bfloat16: str = "float32",
    telemetry: Telemetry | None = None,
) -> Path:
    """Write a finished store in a format that others read, block by block.

    Quantised arrays are written as they are read, in float32. bfloat16 stays bfloat16 in safetensors and is widened
    to float32, which loses nothing, elsewhere. `out` appears when it is whole.

    Args:
        run: The run folder.
        out: Folder to write; new or empty.
        format: `sae_lens` (dataset with a column `(context_length, d_in)` per hook, and `token_ids`), `safetensors`
            (shards of rows), `datasets` (Arrow, a row per token), `npy` (a file `(n_rows, ...)` per array).
        hooks: Arrays to write beside those of tokens; by default all.
        corpus: Which corpus of the run.
        bfloat16: For `npy`: `float32` widens, `bits` keeps the bits as uint16.
        telemetry: Where progress shows.

    Returns:
        `out`.

    Raises:
        UnknownHookError: The store has no such array.
        IncompleteStoreError: There is no finished store.
        InterchangeError: Unknown format, `out` is not empty, or the format cannot hold this store.
        StorageError: The disk does not take it.
    """
    how, out = find_format(format), Path(out)
    _check_bfloat16(format, bfloat16)
    store = ActivationStore(open_run(Path(run)).corpus(corpus))
    store.require_complete()
    plan = _Plan.of(store, how, paths=_choose(store, tuple(hooks), how), bits=bfloat16 == "bits")
    record = plan.record(format)
    with made_aside(out) as folder:
        writer = how.open_writer(folder, plan.columns, record)
        _write(store, plan, writer, telemetry or Telemetry())
        writer.close()
        write_sidecar(folder, record, store.folder)
    return out


def _check_bfloat16(format: str, bfloat16: str) -> None:  # noqa: A002
    if bfloat16 not in ("float32", "bits"):
        raise InterchangeError(f"bfloat16 is written as float32 or as bits, not as {bfloat16!r}")
    if bfloat16 == "bits" and format != "npy":
        raise InterchangeError(f"only npy holds bfloat16 as bits; leave that out for {format}")


def _choose(store: ActivationStore, hooks: tuple[str, ...], how: Format) -> tuple[str, ...]:
    """Return the paths of the arrays to write, those of tokens first."""
    wanted = {store.array(hook).manifest.path for hook in hooks} or set(store.array_names)
    paths = [path for path in store.array_names if path in wanted or path.startswith("tokens/")]
    if how.whole_sequences:
        paths = [path for path in paths if path == IDS or path.startswith("activations/")]
    if not any(not path.startswith("tokens/") for path in paths):
        raise InterchangeError(f"{store.folder.store} has no activations that could be exported in this format")
    return tuple(paths)


@dataclass(frozen=True)
class _Plan:
    """What is written, and of how many rows."""

    store: ActivationStore
    columns: dict[str, Column]
    n_rows: int
    multiple_of: int

    @classmethod
    def of(cls, store: ActivationStore, how: Format, *, paths: tuple[str, ...], bits: bool) -> _Plan:
        bfloat16 = "bfloat16" if how.has_bfloat16 else "uint16" if bits else "float32"
        columns = {}
        for path in paths:
            array = store.array(path).manifest
            dtype = bfloat16 if array.dtype == "bfloat16" else array.dtype
            columns[path] = Column(dtype, tuple(array.row_shape))
        n_rows = _rows_of_whole_sequences(store) if how.whole_sequences else store.n_rows
        return cls(store, columns, n_rows, store.manifest.context_length if how.whole_sequences else 1)

    def record(self, layout: Any) -> ExportRecord:
        """Return what the export says of itself."""
        manifest = self.store.manifest
        arrays = tuple(
            array.model_copy(update={"quantisation": None}) for array in manifest.arrays if array.path in self.columns
        )
        derived = manifest.kept_rows is not None or any(array.derived is not None for array in arrays)
        changes = {"schema_version": 3 if derived else 1, "codec": "none", "n_rows": self.n_rows, "arrays": arrays}
        written = {path: column.dtype for path, column in self.columns.items()}
        return ExportRecord(layout=layout, store=manifest.model_copy(update=changes), written=written)


def _rows_of_whole_sequences(store: ActivationStore) -> int:
    """Return the rows of all sequences of the full length, if the only other one is the last.

    Raises:
        InterchangeError: Sequences differ in length, or not all of their tokens are stored.
    """
    length = store.manifest.context_length
    table = TokenTable(store.folder).manifest
    whole, rest = divmod(store.n_rows, length)
    if store.manifest.kept_rows is not None or whole + (rest > 0) != table.n_sequences or not whole:
        raise InterchangeError(
            f"this format takes sequences of exactly {length} tokens, and {store.folder.store} has others or keeps "
            "only some tokens; use `layout: packed` without prefix and `keep`, or another format"
        )
    return whole * length


def _write(store: ActivationStore, plan: _Plan, writer: Any, telemetry: Telemetry) -> None:
    row_bytes = sum(column.row_bytes for column in plan.columns.values())
    arrays = {path: store.array(path) for path in plan.columns}
    if plan.n_rows < store.n_rows:
        left = store.n_rows - plan.n_rows
        telemetry.say(f"the last sequence is shorter than {plan.multiple_of}: its {left} tokens are left out")
    with telemetry.progress("export", plan.n_rows, "rows") as meter:
        for start, stop in cut(0, plan.n_rows, row_bytes=row_bytes, multiple_of=plan.multiple_of):
            writer.write({p: to_written(a.read(start, stop), plan.columns[p].dtype) for p, a in arrays.items()})
            meter.advance(stop - start, (stop - start) * row_bytes)

"""Read a store: Dask arrays, single rows, whole documents."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from actpipe.errors import IncompleteStoreError, UnknownHookError, did_you_mean
from actpipe.hooks import BlockShape, ModelShape
from actpipe.planning import count_parts, plan_parts
from actpipe.schemas.manifest import StoreManifest
from actpipe.stores.arrays import StoredArray
from actpipe.stores.documents import RowDocuments
from actpipe.stores.fidelity import FidelitySummary, read_fidelity
from actpipe.stores.kept_rows import KeptRows
from actpipe.stores.layout import RunFolder
from actpipe.stores.token_table import TokenTable
from actpipe.stores.views import to_cache_dict, to_xarray
from actpipe.stores.writing import missing_parts, read_manifest

if TYPE_CHECKING:
    import torch
    import xarray


@dataclass(frozen=True)
class StoredDocument:
    """One document: its tokens, its text, and its rows of every array."""

    index: int
    columns: Mapping[str, Any]
    """Its row of documents.parquet."""
    rows: npt.NDArray[np.int64]
    """Row numbers of its tokens, in order; empty where it was left out."""
    store: ActivationStore = field(repr=False)

    @property
    def id(self) -> str:
        """The document's own name in the dataset."""
        return str(self.columns["id"])

    @cached_property
    def input_ids(self) -> npt.NDArray[np.int32]:
        """Its token ids."""
        return self.store.array("tokens/input_ids").take(self.rows)

    @property
    def text(self) -> str:
        """Its tokens as text, decoded with the tokenizer kept in the run folder."""
        return self.store.decode(self.input_ids)

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        """Return the document's rows of one array."""
        return self.store.array(name).take(self.rows)

    def to_cache_dict(self, names: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
        """Return its activations as TransformerLens' `ActivationCache` takes them; see `views.to_cache_dict`."""
        return to_cache_dict(self, names)


def is_complete(folder: RunFolder) -> bool:
    """Whether a corpus has a store with every part committed."""
    if not folder.has_store:
        return False
    try:
        manifest = read_manifest(folder)
    except IncompleteStoreError:
        return False
    return not missing_parts(folder, plan_parts(manifest.n_rows, manifest.rows_per_part))


class ActivationStore:
    """An activation store, open for reading.

    `store["blocks.3.hook_resid_post"]` is a Dask array `(n_rows, d_model)`; the names `tokens/input_ids`,
    `tokens/position`, `tokens/sequence` and `metrics/loss` work in the same way.
    """

    def __init__(self, folder: RunFolder, decode: Callable[[RunFolder, npt.NDArray[Any]], str] | None = None) -> None:
        if not folder.has_store:
            raise IncompleteStoreError(f"{folder.root} holds no activation store; it has no store.zarr")
        self.folder = folder
        self.manifest: StoreManifest = read_manifest(folder)
        self._decode = decode
        self._by_name = {array.path: array for array in self.manifest.arrays}
        self._by_name |= {array.path.removeprefix("activations/"): array for array in self.manifest.arrays}

    def require_complete(self) -> None:
        """Refuse to go on where parts are missing.

        Raises:
            IncompleteStoreError: Says how many, and what to do.
        """
        missing = missing_parts(self.folder, plan_parts(self.n_rows, self.manifest.rows_per_part))
        if missing:
            raise IncompleteStoreError(
                f"{self.folder.store} has {self.n_parts - len(missing)} of {self.n_parts} parts; "
                "run its recipe again to finish it, or open it with partial=True and read committed rows only"
            )

    @property
    def shape(self) -> ModelShape:
        """Sizes of the model that it came from."""
        recorded = self.manifest.shape.model_dump()
        blocks = tuple(BlockShape(**block) for block in recorded.pop("blocks"))
        return ModelShape(**recorded, blocks=blocks)

    @property
    def n_rows(self) -> int:
        """Tokens stored."""
        return self.manifest.n_rows

    @property
    def n_parts(self) -> int:
        """Parts that hold them."""
        return count_parts(self.manifest.n_rows, self.manifest.rows_per_part)

    @property
    def hook_names(self) -> tuple[str, ...]:
        """The stored activations, in firing order."""
        prefix = "activations/"
        return tuple(a.path.removeprefix(prefix) for a in self.manifest.arrays if a.path.startswith(prefix))

    @property
    def array_names(self) -> tuple[str, ...]:
        """Every array, by its path in the Zarr group."""
        return tuple(array.path for array in self.manifest.arrays)

    @cached_property
    def fidelity(self) -> dict[str, FidelitySummary]:
        """What quantising did to the values, by array; empty where nothing is quantised."""
        return read_fidelity(self.folder)

    @cached_property
    def tokens(self) -> TokenTable:
        """The token table that the store was made from."""
        return TokenTable(self.folder)

    @cached_property
    def kept_rows(self) -> KeptRows | None:
        """Which tokens have rows, where these are not all."""
        return None if self.manifest.kept_rows is None else KeptRows(self.folder)

    @cached_property
    def documents(self) -> RowDocuments:
        """Which document each row is of.

        Raises:
            IncompleteStoreError: The corpus keeps no track of documents.
        """
        return RowDocuments(self.tokens, self.kept_rows)

    def require_every_token(self, what: str) -> None:
        """Refuse what looks at neighbouring tokens, or at whole sequences, where not every token has a row.

        Raises:
            IncompleteStoreError: Says what needs them, and what to do.
        """
        if self.manifest.kept_rows is not None:
            raise IncompleteStoreError(
                f"{what} looks at whole sequences, and {self.folder.store} keeps only some of their tokens; extract "
                "without `keep`"
            )

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def __iter__(self) -> Iterator[str]:
        return iter(self.array_names)

    def array(self, name: str) -> StoredArray:
        """Return one array, lazily, with numpy's indexing.

        Raises:
            UnknownHookError: The store has no such array.
        """
        if name not in self._by_name:
            raise UnknownHookError(
                f"{self.folder.store} has no array {name!r} among its {len(self.array_names)}, which "
                f"`actpipe info {self.folder.root}` lists{did_you_mean(name, self._by_name)}"
            )
        manifest = self._by_name[name]
        rows_per_part, codec = self.manifest.rows_per_part, self.manifest.codec
        return StoredArray(self.folder.store.resolve(), manifest, self.n_rows, rows_per_part, codec)

    def __getitem__(self, name: str) -> Any:
        """Return one array as a Dask array whose blocks are the parts, mapped from disk."""
        import dask.array as da
        from dask.tokenize import tokenize

        array = self.array(name)
        chunks = (self.manifest.rows_per_part, *array.manifest.row_shape)
        key = f"{array.manifest.path}-{tokenize(str(array.store), array.manifest.path, array.shape)}"
        return da.from_array(array, chunks=chunks, name=key, asarray=False, fancy=True)

    def to_xarray(self) -> xarray.Dataset:
        """Return every array under its name, lazily, with named dimensions; see `views.to_xarray`."""
        return to_xarray(self)

    def rows(self, name: str, indices: npt.ArrayLike) -> npt.NDArray[Any]:
        """Return rows of one array by number, fast and in the order asked for."""
        return self.array(name).take(indices)

    def document(self, index: int) -> StoredDocument:
        """Return one document.

        Raises:
            IndexError: There is no such document.
        """
        columns = self.tokens.read_document(index)
        return StoredDocument(index, columns, self._rows_of(columns), self)

    def _rows_of(self, columns: Mapping[str, Any]) -> npt.NDArray[np.int64]:
        if self.tokens.manifest.layout in ("tl2", "tl3"):
            raise IncompleteStoreError(
                f"{self.folder.root} was tokenized as TransformerLens does, which keeps no track of documents"
            )
        if columns["row_start"] is None:
            return np.empty(0, np.int64)
        if self.kept_rows is not None:
            return self._kept_rows_of(self.kept_rows, columns)
        rows = np.arange(columns["row_start"], columns["row_stop"], dtype=np.int64)
        table = self.tokens.manifest
        if table.bos_id is not None:
            rows = rows[self.array("tokens/position").take(rows) != 0]
        if table.separator_id is not None and len(rows) > columns["n_tokens"]:
            rows = rows[: columns["n_tokens"]]
        return rows

    def _kept_rows_of(self, kept: KeptRows, columns: Mapping[str, Any]) -> npt.NDArray[np.int64]:
        """Return the rows of a document's own tokens that were kept."""
        stop = columns["row_stop"]
        first, last = kept.count_before(np.array([columns["row_start"], stop]))
        rows = np.arange(first, last)
        table = self.tokens.manifest
        own = np.ones(len(rows), np.bool_)
        if table.bos_id is not None:
            own &= self.array("tokens/position").take(rows) != 0
        if table.separator_id is not None:
            places, _ = kept.read(int(first), int(last))
            own &= (places != stop - 1) | (self.array("tokens/input_ids").take(rows) != table.separator_id)
        return rows[own]

    def decode(self, ids: npt.NDArray[Any]) -> str:
        """Turn token ids into text with the tokenizer kept in the run folder.

        Raises:
            IncompleteStoreError: The run has no tokenizer.
        """
        if self._decode is None or not self.folder.tokenizer.is_dir():
            raise IncompleteStoreError(f"{self.folder.root} keeps no tokenizer, so ids cannot be turned into text")
        return self._decode(self.folder, ids)

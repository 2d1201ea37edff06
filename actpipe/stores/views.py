"""A store as others know it: an xarray dataset, and TransformerLens' cache of one prompt."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from actpipe.stores.bfloat16 import NATIVE as BFLOAT16

if TYPE_CHECKING:
    import torch
    import xarray

    from actpipe.stores.reading import ActivationStore, StoredDocument


def to_xarray(store: ActivationStore) -> xarray.Dataset:
    """Return every array of a store under its name, lazily, with named dimensions.

    What is known of tokens (`input_ids`, `position`, `sequence`) are coordinates of `row`. Where layers differ in
    size, a dimension's name ends with its size: `d_mlp_512`.
    """
    import xarray

    sizes: dict[str, int] = {}
    variables: dict[str, Any] = {}
    for name in (*store.array_names, *store.hook_names):
        array = store.array(name)
        dims = []
        for axis, size in zip(array.manifest.axes, array.shape, strict=True):
            dims.append(axis if sizes.setdefault(axis, size) == size else f"{axis}_{size}")
        variables[name] = (tuple(dims), store[name])
    coords = {name.removeprefix("tokens/"): variables.pop(name) for name in store.array_names if "tokens/" in name}
    manifest = store.manifest
    attributes = {"corpus": manifest.corpus, "model": manifest.model.name, "convention": manifest.convention}
    return xarray.Dataset(variables, coords=coords, attrs=attributes)


def to_cache_dict(document: StoredDocument, names: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
    """Return a document's activations as a forward pass over it alone gives them, for `ActivationCache`.

    In the layout `documents` BOS is part of that pass and comes first, though it is not of the document.

    Args:
        document: The document.
        names: Hook names; all that are stored by default.

    Returns:
        By name `(1, position, ...)`; scores and patterns `(1, head, query_position, key_position)`.

    Raises:
        ValueError: Scores or patterns of a document whose rows lie in several sequences, or not from their start.
    """
    store = document.store
    wanted = store.hook_names if names is None else tuple(names)
    rows, cache = document.rows, {}
    if store.tokens.manifest.layout == "documents" and len(rows):
        rows = np.arange(document.columns["row_start"], document.columns["row_stop"])
    for name in wanted:
        values = store.rows(name, rows)
        if store.array(name).manifest.axes[-1] == "key_position":
            _check_one_sequence(document, rows, name)
            values = np.moveaxis(values[..., : len(rows)], 0, 1)
        cache[name] = _tensor(values)[None]
    return cache


def _check_one_sequence(document: StoredDocument, rows: npt.NDArray[np.int64], name: str) -> None:
    positions = document.store.rows("tokens/position", rows)
    if not np.array_equal(positions, np.arange(len(positions))):
        raise ValueError(
            f"{name} of document {document.index} looks at keys that are not the document's: it is not one whole "
            "sequence; give `names` without scores and patterns"
        )


def _tensor(values: npt.NDArray[Any]) -> torch.Tensor:
    import torch

    if values.dtype == BFLOAT16:
        return torch.from_numpy(np.array(values).view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.array(values))

"""From singular vectors to the table and the arrays that people read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
import xarray as xr

from actpipe.compute.singular import SingularVectors, outermost_tokens
from actpipe.models.singular import OF_HEADS, SIDES

ENDS = ("highest", "lowest")
SCORES_AT_ONCE = 2**25
"""Most scores of tokens computed together: 128 MiB of float32, whatever the vocabulary."""


def token_lines(
    which: str,
    layer: int,
    heads: Sequence[int],
    vectors: SingularVectors,
    vocabulary: torch.Tensor,
    n_tokens: int,
) -> list[pd.DataFrame]:
    """Return one line for each token at either end of each singular vector, side by side of the matrix.

    Args:
        which: Name of the matrix.
        layer: Of which block.
        heads: The heads that `vectors` are of, where heads have such a matrix.
        vectors: `(head, vector, ...)`, or `(vector, ...)` of an MLP.
        vocabulary: `(d_model, d_vocab)`.
        n_tokens: How many to list at each end.
    """
    there = vectors.there if which in OF_HEADS else vectors.there[None]
    place, number = there.nonzero(as_tuple=True)
    squares = vectors.values.square()
    singular = vectors.values.reshape(len(there), -1)[place, number].numpy()
    share = (squares / squares.sum(-1, keepdim=True)).reshape(len(there), -1)[place, number].numpy()
    names = [f"L{layer}H{heads[head]} {which}" if which in OF_HEADS else f"L{layer} {which}" for head in place.tolist()]
    pieces = []
    for side, does in SIDES[which].items():
        directions = getattr(vectors, side).reshape(*there.shape, -1)[there]
        ids, scores, deviations = _outermost(directions.float(), vocabulary, n_tokens)
        one, end, rank = (axis.ravel() for axis in np.indices(ids.shape))
        labels = [f"{name} {does} {vector}" for name, vector in zip(names, number.tolist(), strict=True)]
        pieces.append(
            pd.DataFrame(
                {
                    "label": np.array(labels, dtype=object)[one],
                    "matrix": which,
                    "layer": np.full(len(one), layer),
                    "head": _heads(which, heads, place.numpy()[one]),
                    "side": does,
                    "vector": number.numpy()[one],
                    "singular_value": singular[one],
                    "share": share[one],
                    "end": np.array(ENDS, dtype=object)[end],
                    "rank": rank,
                    "token_id": ids.ravel(),
                    "value": scores.ravel(),
                    "deviations": deviations.ravel(),
                }
            )
        )
    return pieces


def _heads(which: str, heads: Sequence[int], places: npt.NDArray[np.int64]) -> Any:
    missing = np.full(len(places), which not in OF_HEADS)
    numbers = np.asarray(heads, np.int64)[places] if which in OF_HEADS else np.zeros(len(places), np.int64)
    return pd.arrays.IntegerArray(numbers, missing)


def _outermost(directions: torch.Tensor, vocabulary: torch.Tensor, n_tokens: int) -> tuple[Any, Any, Any]:
    """Return ids, scores, and how many standard deviations over the vocabulary they are off: `(vector, end, rank)`."""
    found = []
    for some in torch.split(directions, max(1, SCORES_AT_ONCE // vocabulary.shape[1])):
        scores = some @ vocabulary
        ids, values = outermost_tokens(scores, n_tokens)
        mean, spread = scores.mean(-1)[:, None, None], scores.std(-1, correction=0)[:, None, None]
        found.append((ids, values, (values - mean) / spread))
    ids, outermost, deviations = (torch.cat(arrays) for arrays in zip(*found, strict=True))
    return ids.numpy(), outermost.numpy(), deviations.numpy()


def spectra(values: Mapping[str, Sequence[torch.Tensor]], layers: Sequence[int], heads: Sequence[int]) -> xr.Dataset:
    """Return all singular values by matrix, layer and, of heads, head; NaN where a layer has fewer."""
    arrays = dict[str, Any]()
    for which, of_layers in values.items():
        largest = max(one.shape[-1] for one in of_layers)
        padded = [torch.nn.functional.pad(one, (0, largest - one.shape[-1]), value=torch.nan) for one in of_layers]
        axes = ("layer", "head") if which in OF_HEADS else ("layer",)
        arrays[f"{which}_singular_value"] = ((*axes, f"{which}_vector"), torch.stack(padded).numpy())
    return xr.Dataset(arrays, coords={"layer": list(layers), "head": list(heads)})

"""The matrices of a model whose singular vectors lie in the residual stream, read layer by layer.

Source:
    TransformerLens 2.16, `SVDInterpreter`: `OV`, and `W_in` and `W_out` as it transposes and folds them. `QK` is not
    there.
"""

from __future__ import annotations

import torch

from actpipe.compute.factored import FactoredMatrix
from actpipe.hooks import ModelShape
from actpipe.models.circuits import heads_of, plain
from actpipe.models.processing import process_weights
from actpipe.models.weights import Weights

SIDES = {
    "OV": {"left": "reads", "right": "writes"},
    "QK": {"left": "queries", "right": "keys"},
    "W_in": {"right": "reads"},
    "W_out": {"right": "writes"},
}
"""By matrix: which of its singular vectors are directions of the residual stream, and what they do there."""
OF_HEADS = frozenset({"OV", "QK"})
"""Those that every head has."""

_PARTS = {True: ("ln1.", "attn."), False: ("ln2.", "mlp.")}


def open_matrix(
    weights: Weights, shape: ModelShape, layer: int, which: str, *, processed: bool
) -> FactoredMatrix | torch.Tensor:
    """Return one of the matrices named in `SIDES`, in float32 on the CPU; only what it is made of is read.

    Args:
        weights: `model.weights` or `open_weights(...)`.
        shape: The model's shape.
        layer: Number of the block.
        which: Name of the matrix.
        processed: Fold norms and centre first, as `HookedTransformer.from_pretrained` does by default.

    Returns:
        `OV` and `QK` of every head, `(head, d_model, d_model)` as factors; `W_in`, transposed and with `ln2.w` folded
        in, and `W_out`, both `(d_mlp, d_model)`.
    """
    prefix = f"blocks.{layer}."
    parts = tuple(f"{prefix}{part}" for part in _PARTS[which in OF_HEADS])
    found = {name: weights[name] for name in weights.names() if name.startswith(parts)}
    if processed:
        found = process_weights(found, shape)
    if which in OF_HEADS:
        left, right = ("W_V", "W_O") if which == "OV" else ("W_Q", "W_K")
        B = heads_of(found, shape, layer, right)
        return FactoredMatrix(heads_of(found, shape, layer, left), B if which == "OV" else B.mT)
    matrix = plain(found[f"{prefix}mlp.{which}"])
    if which == "W_out":
        return matrix
    gain = found.get(f"{prefix}ln2.w")
    return matrix.mT if gain is None else matrix.mT * plain(gain)


def open_vocabulary(weights: Weights, shape: ModelShape, which: str, *, processed: bool) -> torch.Tensor:
    """Return what directions of the residual stream are multiplied with: `(d_model, d_vocab)`, float32 on the CPU.

    Args:
        weights: `model.weights` or `open_weights(...)`.
        shape: The model's shape.
        which: `W_U`, or `W_E` for the transposed embedding.
        processed: As for `open_matrix`; then the final norm's weight is in `W_U`.
    """
    wanted = ("unembed.W_U", "ln_final.") if which == "W_U" else ("embed.W_E",)
    found = {name: weights[name] for name in weights.names() if name.startswith(wanted)}
    if processed:
        found = process_weights(found, shape)
    return plain(found["unembed.W_U"]) if which == "W_U" else plain(found["embed.W_E"]).mT

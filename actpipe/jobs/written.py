"""What heads, neurons and biases write to the residual stream of every row, computed from what is stored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from actpipe.compute.branches import Branch, BranchNorm, behind_norm
from actpipe.errors import UnsupportedModelError
from actpipe.hooks import ModelShape
from actpipe.jobs.blocks import require_arrays
from actpipe.stores.reading import ActivationStore

WeightsByName = Mapping[str, torch.Tensor] | Any
"""What gives a weight by TransformerLens' name: `model.weights`, or `actpipe.open_weights(...)`."""
_BLOCK_BYTES = 64 * 2**20


def stored_floats(store: ActivationStore, name: str) -> Any:
    """Return an array of the store in float32, lazily."""
    return store[name].astype("float32")


def weight_array(weights: WeightsByName, name: str) -> npt.NDArray[np.float32]:
    """Return a weight in float32."""
    array: npt.NDArray[np.float32] = weights[name].detach().float().cpu().numpy()
    return array


BranchName = Literal["attn", "mlp"]
BRANCHES: dict[BranchName, tuple[str, str, str, str]] = {
    "attn": ("attn.hook_z", "attn.W_O", "attn.b_O", "ln1_post"),
    "mlp": ("mlp.hook_post", "mlp.W_out", "mlp.b_out", "ln2_post"),
}
"""What is stored of each branch, its weights, its bias, and the norm that stands behind it in some models."""


def branch_of(weights: WeightsByName, shape: ModelShape, layer: int, which: BranchName) -> Branch:
    """Return what brings a layer's heads (`attn`) or neurons (`mlp`) to the stream, in float32."""
    _, W, b, norm = (f"blocks.{layer}.{name}" for name in BRANCHES[which])
    found = None
    if getattr(shape.blocks[layer], BRANCHES[which][3]):
        bias = weight_array(weights, f"{norm}.b") if shape.norm == "LN" else None
        found = BranchNorm(weight_array(weights, f"{norm}.w"), bias)
    return Branch(weight_array(weights, W), weight_array(weights, b), found)


def branch_arrays(shape: ModelShape, layer: int, which: BranchName) -> list[str]:
    """Name what must be stored for the parts of a branch: heads or neurons, and the scale of a norm behind them."""
    stored, _, _, norm = BRANCHES[which]
    behind = [f"blocks.{layer}.{norm}.hook_scale"] if getattr(shape.blocks[layer], norm) else []
    return [f"blocks.{layer}.{stored}", *behind]


def rows_at_once(store: ActivationStore, n_components: int) -> int:
    """Return so many rows that a block of a stack takes some 64 MB."""
    return max(1, _BLOCK_BYTES // (4 * max(1, n_components) * store.shape.d_model))


def written_by_heads(store: ActivationStore, weights: WeightsByName, layer: int) -> Any:
    """Return what every head of a layer writes, `(head, row, d_model)`."""
    import dask.array as da

    z = f"blocks.{layer}.attn.hook_z"
    _require_native(store)
    require_arrays(store, [z], "stack_head_results")
    W_O = weight_array(weights, f"blocks.{layer}.attn.W_O")
    rows = stored_floats(store, z).rechunk({0: rows_at_once(store, len(W_O))})
    return _behind_norm(store, weights, da.einsum("rhe,hed->hrd", rows, W_O), layer, "ln1_post")


def written_by_neurons(
    store: ActivationStore, weights: WeightsByName, layer: int, neurons: npt.NDArray[np.int64]
) -> Any:
    """Return what some neurons of a layer write, `(neuron, row, d_model)`."""
    import dask.array as da

    post = f"blocks.{layer}.mlp.hook_post"
    _require_native(store)
    try:
        W_out = weight_array(weights, f"blocks.{layer}.mlp.W_out")[neurons]
    except KeyError as error:
        raise UnsupportedModelError("stack_neuron_results: this model's MLPs are experts, not neurons") from error
    at_once = min(len(neurons), 256) or 1
    rows = stored_floats(store, post)[:, neurons].rechunk({0: rows_at_once(store, at_once), 1: at_once})
    results = rows.T[:, :, None] * da.from_array(W_out, chunks=(at_once, -1))[:, None, :]
    return _behind_norm(store, weights, results, layer, "ln2_post")


def _behind_norm(store: ActivationStore, weights: WeightsByName, stack: Any, layer: int, norm: str) -> Any:
    """Return what a norm after attention or the MLP makes of each part, held at its recorded scale."""
    if not getattr(store.shape.blocks[layer], norm):
        return stack
    scale = f"blocks.{layer}.{norm}.hook_scale"
    require_arrays(store, [scale], "heads and neurons behind a norm")
    divisor = stored_floats(store, scale).rechunk({0: stack.chunks[1]})
    gain = weight_array(weights, f"blocks.{layer}.{norm}.w")
    return behind_norm(stack, gain, divisor[None], centered=store.shape.norm == "LN")


def written_by_biases(store: ActivationStore, weights: WeightsByName, attention: range, mlps: range) -> Any:
    """Return the sum of biases as it arrives in the stream, `(row, d_model)`."""
    import dask.array as da

    chunks = (rows_at_once(store, 1), store.shape.d_model)
    total = da.zeros((store.n_rows, store.shape.d_model), chunks=chunks, dtype="float32")
    for layers, name, norm in ((attention, "attn.b_O", "ln1_post"), (mlps, "mlp.b_out", "ln2_post")):
        for layer in layers:
            bias = np.broadcast_to(weight_array(weights, f"blocks.{layer}.{name}"), total.shape)
            rows = da.from_array(bias, chunks=chunks, asarray=False)
            total = total + _behind_norm(store, weights, rows[None], layer, norm)[0]
            if getattr(store.shape.blocks[layer], norm) and store.shape.norm == "LN":
                total = total + weight_array(weights, f"blocks.{layer}.{norm}.b")
    return total


def _require_native(store: ActivationStore) -> None:
    if store.manifest.convention != "native":
        raise UnsupportedModelError(
            f"heads and neurons are computed from native activations, and {store.folder.root} holds processed ones; "
            "extract with `model.convention: native`"
        )

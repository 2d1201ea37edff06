"""`ActivationCache`'s stacks of a residual stream's parts, for every row of a store, as lazy Dask arrays.

Arrays are `(component, row, d_model)` in float32, with labels as TransformerLens 2.16 gives them. They are computed
block by block when they are reduced or indexed; nothing of the corpus' size is ever in memory.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from actpipe.compute.residual import residual_hook
from actpipe.errors import UnsupportedModelError
from actpipe.hooks import build_catalogue
from actpipe.jobs.blocks import require_arrays
from actpipe.jobs.residual import components_of
from actpipe.jobs.written import (
    WeightsByName,
    rows_at_once,
    stored_floats,
    weight_array,
    written_by_biases,
    written_by_heads,
    written_by_neurons,
)
from actpipe.stores.reading import ActivationStore

Stack = tuple[Any, list[str]]


def decompose_resid(
    store: ActivationStore,
    layer: int | None = None,
    *,
    mlp_input: bool = False,
    mode: Literal["all", "mlp", "attn"] = "all",
    incl_embeds: bool = True,
    apply_ln: bool = False,
) -> Stack:
    """Return what was written to the residual stream entering `layer`, component by component.

    Args:
        store: A store with the embeddings, and `hook_attn_out` and `hook_mlp_out` of every layer below.
        layer: By default, and with -1, that after the last, so that the sum is the last `hook_resid_post`.
        mlp_input: Add the layer's own `hook_attn_out`, so that the sum is what its MLP reads.
        mode: All components, or those of MLPs or of attention only.
        incl_embeds: Whether the embeddings are among them.
        apply_ln: Divide by the scale of the norm that reads the stream; see `apply_ln_to_stack`.

    Returns:
        A Dask array `(component, row, d_model)` in float32, and the components' labels.

    Raises:
        IncompleteStoreError: A component is not stored.
        UnsupportedModelError: The model's stream is no sum of what attention and MLPs write.
        ValueError: There is no such layer, or no attention to add after the last.

    Source:
        TransformerLens 2.16, `ActivationCache.decompose_resid`.
    """
    adds_attention = mlp_input and mode != "mlp"
    stop = _layer(store, layer, mlp_input=adds_attention)
    if mode not in ("all", "mlp", "attn"):
        raise ValueError(f"mode {mode!r} is not one of all, mlp and attn")
    kinds = {"all": ("attn_out", "mlp_out"), "attn": ("attn_out",), "mlp": ("mlp_out",)}[mode]
    found = components_of(store, stop)
    wanted = [one for one in found if (incl_embeds if one.layer is None else one.kind in kinds)]
    names = {one.label: one.hook for one in wanted}
    if adds_attention:
        names[f"{stop}_attn_out"] = f"blocks.{stop}.hook_attn_out"
    require_arrays(store, names.values(), "decompose_resid")
    stack = _stacked(store, [stored_floats(store, name) for name in names.values()])
    into_mlp = mlp_input and stop < store.shape.n_layers
    return _finished(store, stack, list(names), stop, mlp_input=into_mlp, apply_ln=apply_ln)


def accumulated_resid(
    store: ActivationStore,
    layer: int | None = None,
    *,
    incl_mid: bool = False,
    mlp_input: bool = False,
    apply_ln: bool = False,
) -> Stack:
    """Return the residual stream at every layer up to `layer`, for a logit lens.

    Args:
        store: A store with `hook_resid_pre` of every layer (or `hook_resid_post` of the layer before it).
        layer: By default, and with -1, up to the last `hook_resid_post`.
        incl_mid: Also `hook_resid_mid` of every layer below.
        mlp_input: Also `hook_resid_mid` of `layer`; after the last layer it changes nothing, as in 2.16.
        apply_ln: Divide by the scale of the norm that reads the last of them; see `apply_ln_to_stack`.

    Returns:
        A Dask array `(component, row, d_model)` in float32, and the labels: `0_pre`, `0_mid`, ..., `final_post`.

    Raises:
        IncompleteStoreError: A stream is not stored.
        ValueError: There is no such layer.

    Source:
        TransformerLens 2.16, `ActivationCache.accumulated_resid`.
    """
    n_layers = store.shape.n_layers
    stop = _layer(store, layer)
    names = accumulated_streams(store, n_layers, stop, incl_mid=incl_mid, mlp_input=mlp_input)
    require_arrays(store, names.values(), "accumulated_resid")
    stack = _stacked(store, [stored_floats(store, name) for name in names.values()])
    into_mlp = mlp_input and stop < n_layers
    return _finished(store, stack, list(names), stop, mlp_input=into_mlp, apply_ln=apply_ln)


def accumulated_streams(
    names: Container[str], n_layers: int, stop: int, *, incl_mid: bool = False, mlp_input: bool = False
) -> dict[str, str]:
    """Return by label what holds the residual stream at every layer up to `stop`; see `accumulated_resid`.

    Args:
        names: What is stored, or will be.
        n_layers: Layers of the model.
        stop: The last layer, up to `n_layers`.
        incl_mid: Also between attention and MLP of every layer below.
        mlp_input: Also between those of the last.
    """
    found: dict[str, str] = {}
    for number in range(stop + 1):
        if number == n_layers:
            found["final_post"] = residual_hook(n_layers)
            continue
        found[f"{number}_pre"] = _entering(names, number)
        if (incl_mid and number < stop) or (mlp_input and number == stop):
            found[f"{number}_mid"] = f"blocks.{number}.hook_resid_mid"
    return found


def stack_head_results(
    store: ActivationStore,
    weights: WeightsByName,
    layer: int | None = None,
    *,
    incl_remainder: bool = False,
    apply_ln: bool = False,
) -> Stack:
    """Return what every head below `layer` writes to the residual stream, from stored `hook_z` and `W_O`.

    Where a norm stands after attention (Gemma 2, OLMo 2), a head's part is what that norm, held at its recorded scale,
    makes of it, so that heads and biases add up to `hook_attn_out`. TransformerLens 2.16 leaves that norm out.

    Args:
        store: A store with `attn.hook_z` of every layer below (and `ln1_post.hook_scale` where there is one).
        weights: The model's weights.
        layer: By default, and with -1, all heads.
        incl_remainder: Add what is left of the residual stream; at layer 0 that is all of the stream that enters it
            (2.16 takes the last layer's there).
        apply_ln: Divide by the scale of the norm that reads the stream; see `apply_ln_to_stack`.

    Returns:
        A Dask array `(component, row, d_model)` in float32, layer by layer; and labels `L0H0`, ..., `remainder`.

    Raises:
        IncompleteStoreError: An activation is not stored.
        UnsupportedModelError: The store holds processed activations.

    Source:
        TransformerLens 2.16, `ActivationCache.stack_head_results`.
    """
    stop = _layer(store, layer)
    parts, names = [], list[str]()
    for number in range(stop):
        parts.append(written_by_heads(store, weights, number))
        names += [f"L{number}H{head}" for head in range(parts[-1].shape[0])]
    return _with_remainder(store, parts, names, stop, incl_remainder=incl_remainder, apply_ln=apply_ln)


def stack_neuron_results(
    store: ActivationStore,
    weights: WeightsByName,
    layer: int | None = None,
    *,
    neurons: slice | Sequence[int] = slice(None),
    incl_remainder: bool = False,
    apply_ln: bool = False,
) -> Stack:
    """Return what neurons below `layer` write to the residual stream, from stored `mlp.hook_post` and `W_out`.

    The array has rows times neurons times d_model numbers: choose neurons, or reduce it; Dask keeps blocks only.

    Args:
        store: A store with `mlp.hook_post` of every layer below (and `ln2_post.hook_scale` where there is one).
        weights: The model's weights.
        layer: By default, and with -1, all layers.
        neurons: Which of each layer's neurons.
        incl_remainder: Add what is left of the residual stream.
        apply_ln: Divide by the scale of the norm that reads the stream.

    Returns:
        A Dask array `(component, row, d_model)` in float32, layer by layer; and labels `L0N0`, ..., `remainder`.

    Raises:
        IncompleteStoreError: An activation is not stored.
        UnsupportedModelError: The model has experts, or the store holds processed activations.

    Source:
        TransformerLens 2.16, `ActivationCache.stack_neuron_results`.
    """
    stop = _layer(store, layer)
    parts, names = [], list[str]()
    for number in range(stop):
        require_arrays(store, [f"blocks.{number}.mlp.hook_post"], "stack_neuron_results")
        chosen = np.arange(store.array(f"blocks.{number}.mlp.hook_post").manifest.row_shape[-1])[neurons]
        parts.append(written_by_neurons(store, weights, number, chosen))
        names += [f"L{number}N{neuron}" for neuron in chosen]
    return _with_remainder(store, parts, names, stop, incl_remainder=incl_remainder, apply_ln=apply_ln)


def get_full_resid_decomposition(
    store: ActivationStore,
    weights: WeightsByName,
    layer: int | None = None,
    *,
    mlp_input: bool = False,
    expand_neurons: bool = True,
    apply_ln: bool = False,
) -> Stack:
    """Return heads, neurons (or MLPs), embeddings and biases, which add up to the residual stream entering `layer`.

    Args:
        store: A store with what `stack_head_results`, `stack_neuron_results` and the embeddings need.
        weights: The model's weights.
        layer: By default, and with -1, that after the last.
        mlp_input: Up to what the layer's MLP reads.
        expand_neurons: Neuron by neuron; otherwise MLP by MLP, biases included.
        apply_ln: Divide by the scale of the norm that reads the stream.

    Returns:
        A Dask array `(component, row, d_model)` in float32, and labels: heads, neurons or `{l}_mlp_out`, `embed`,
        `pos_embed`, `bias`. The bias differs by row only behind a norm.

    Raises:
        IncompleteStoreError: An activation is not stored.
        UnsupportedModelError: The stream is no such sum, or the store holds processed activations.

    Source:
        TransformerLens 2.16, `ActivationCache.get_full_resid_decomposition`.
    """
    import dask.array as da

    stop = _layer(store, layer, mlp_input=mlp_input)
    through = stop + 1 if mlp_input else stop
    parts, names = [], list[str]()
    if through:
        heads, head_names = stack_head_results(store, weights, through)
        parts, names = [heads], head_names
    if stop and expand_neurons:
        neurons, neuron_names = stack_neuron_results(store, weights, stop)
        parts, names = [*parts, neurons], names + neuron_names
    elif stop:
        mlps, mlp_names = decompose_resid(store, stop, mode="mlp", incl_embeds=False)
        parts, names = [*parts, mlps], names + mlp_names
    embeds, embed_names = decompose_resid(store, 0)
    bias = written_by_biases(store, weights, range(through), range(stop) if expand_neurons else range(0))
    rows = embeds.chunks[1]
    stack = da.concatenate([part.rechunk({1: rows}) for part in (*parts, embeds, bias[None])])
    names = [*names, *embed_names, "bias"]
    return _finished(store, stack, names, stop, mlp_input=mlp_input, apply_ln=apply_ln)


def apply_ln_to_stack(store: ActivationStore, stack: Any, layer: int | None = None, *, mlp_input: bool = False) -> Any:
    """Divide a stack by the scale of the norm that reads the stream, so that it adds up to what is read.

    LayerNorm's centring is applied to every component; the norm's weights are not, as in 2.16: fold them into what
    reads the stream (`W_U`, `W_in`, ...), or compare with `hook_normalized` divided by them.

    Args:
        store: A store with `ln_final.hook_scale`, or with `ln1.hook_scale` (`ln2` for the MLP's input) of `layer`.
        stack: `(component, row, d_model)`, numpy or Dask.
        layer: By default, and with -1, the final norm's.
        mlp_input: The norm before the MLP in place of that before attention.

    Raises:
        IncompleteStoreError: The scale is not stored.
        UnsupportedModelError: The model has no norm there, or norms behind its blocks, as encoders do.

    Source:
        TransformerLens 2.16, `ActivationCache.apply_ln_to_stack`.
    """
    stop = _layer(store, layer, mlp_input=mlp_input)
    name = (
        "ln_final.hook_scale" if stop == store.shape.n_layers else f"blocks.{stop}.ln{2 if mlp_input else 1}.hook_scale"
    )
    if not store.shape.sums_to_logits or name not in build_catalogue(store.shape):
        raise UnsupportedModelError(
            f"apply_ln: {store.manifest.model.family} has no norm that reads the stream as {name} would; leave it out"
        )
    require_arrays(store, [name], "apply_ln")
    if store.shape.norm == "LN":
        stack = stack - stack.mean(-1, keepdims=True)
    return stack / stored_floats(store, name)[None]


def accumulated_bias(
    weights: WeightsByName, layer: int, *, mlp_input: bool = False, include_mlp_biases: bool = True
) -> npt.NDArray[np.float32]:
    """Return the sum of the biases that were added to the residual stream entering `layer`, `(d_model,)`.

    Behind a norm (Gemma 2) this is no part of the stream; `get_full_resid_decomposition` brings it through the norm.

    Args:
        weights: The model's weights.
        layer: Up to which layer, from 0 to the number of layers.
        mlp_input: Also the layer's own attention.
        include_mlp_biases: Also those of MLPs.

    Raises:
        ValueError: `layer` is below 0.
        UnknownHookError: It is beyond the last.

    Source:
        TransformerLens 2.16, `HookedTransformer.accumulated_bias`.
    """
    names = [f"blocks.{number}.attn.b_O" for number in range(layer + 1 if mlp_input else layer)]
    if include_mlp_biases:
        names += [f"blocks.{number}.mlp.b_out" for number in range(layer)]
    if layer < 0:
        raise ValueError(f"layer {layer} is below 0; give the number of layers for all biases")
    total = np.zeros(len(weights["unembed.W_U"]), np.float64)
    for name in names:
        total += weight_array(weights, name)
    return total.astype(np.float32)


def _layer(store: ActivationStore, layer: int | None, *, mlp_input: bool = False) -> int:
    n_layers = store.shape.n_layers
    stop = n_layers if layer is None or layer == -1 else layer
    if not 0 <= stop <= n_layers:
        raise ValueError(f"layer {layer} is not one of 0 to {n_layers}")
    if mlp_input and stop == n_layers:
        raise ValueError(f"mlp_input: there is no MLP after the last layer; name a layer below {n_layers}")
    return stop


def _entering(names: Container[str], layer: int) -> str:
    """Name the array that holds the stream entering a layer; the one that is not stored, if neither is."""
    before = f"blocks.{layer - 1}.hook_resid_post"
    return (
        before if f"blocks.{layer}.hook_resid_pre" not in names and before in names else residual_hook(layer + 1, layer)
    )


def _stacked(store: ActivationStore, arrays: list[Any]) -> Any:
    import dask.array as da

    if not arrays:
        return da.zeros((0, store.n_rows, store.shape.d_model), dtype="float32")
    rows = min(rows_at_once(store, len(arrays)), max(1, store.n_rows))
    return da.stack([array.rechunk({0: rows}) for array in arrays])


def _with_remainder(
    store: ActivationStore, parts: list[Any], names: list[str], stop: int, *, incl_remainder: bool, apply_ln: bool
) -> Stack:
    import dask.array as da

    stack = da.concatenate(parts) if parts else _stacked(store, [])
    if incl_remainder:
        total = residual_hook(store.shape.n_layers, stop) if stop == store.shape.n_layers else _entering(store, stop)
        require_arrays(store, [total], "the remainder")
        left = stored_floats(store, total).rechunk({0: stack.chunks[1]}) - stack.sum(0)
        stack, names = da.concatenate([stack, left[None]]), [*names, "remainder"]
    return _finished(store, stack, names, stop, mlp_input=False, apply_ln=apply_ln)


def _finished(
    store: ActivationStore, stack: Any, names: list[str], stop: int, *, mlp_input: bool, apply_ln: bool
) -> Stack:
    if apply_ln:
        stack = apply_ln_to_stack(store, stack, stop, mlp_input=mlp_input)
    return stack, names

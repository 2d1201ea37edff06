"""From a model to the lens that its residual streams are looked at through, and to the weights of attributions."""

from __future__ import annotations

import torch

from actpipe.compute.lens import FinalNorm
from actpipe.jobs.attribution_columns import AttributionWeights
from actpipe.jobs.lens import Lens
from actpipe.jobs.written import branch_of
from actpipe.models.anatomy import norm_epsilon
from actpipe.models.hooked_model import HookedModel
from actpipe.unembedding import folded_unembedding


def lens_of(model: HookedModel, *, final_scale: bool = False) -> Lens:
    """Return the final norm, computed in float32, and the unembedding as the model's head computes it.

    Raises:
        ValueError: The model has no final norm.
    """
    norm = model.anatomy.final_norm
    if norm is None:
        raise ValueError("a logit lens needs a model with a final norm")
    weights = model.weights
    final = FinalNorm(
        kind=model.shape.norm,
        weight=weights["ln_final.w"].float(),
        bias=weights["ln_final.b"].float() if model.shape.norm == "LN" else None,
        epsilon=norm_epsilon(norm),
    )
    dtype = weights.W_U.dtype

    def unembed(rows: torch.Tensor) -> torch.Tensor:
        return model.unembed(rows.to(dtype))

    return Lens(final, unembed, final.weight.device, final_scale)


def attribution_weights(model: HookedModel, *, heads: bool = True, neurons: bool = False) -> AttributionWeights:
    """Return the unembedding with the final norm folded in, and the output weights of heads and neurons.

    Args:
        model: A model with a final norm.
        heads: Whether to bring heads' weights.
        neurons: Whether to bring neurons'.
    """
    weights, shape = model.weights, model.shape
    layers = range(shape.n_layers)
    return AttributionWeights(
        folded_unembedding(model),
        tuple(branch_of(weights, shape, layer, "attn") for layer in layers) if heads else None,
        tuple(branch_of(weights, shape, layer, "mlp") for layer in layers) if neurons else None,
    )

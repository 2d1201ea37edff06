"""From a model to what its heads' outputs are turned into logits with."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from actpipe.compute.attribution import FoldedUnembedding, fold_unembedding
from actpipe.compute.copying import CopyingWeights, center_directions, covariance_of, spread_of_logits
from actpipe.jobs.copying import ModelCopying
from actpipe.models.hooked_model import HookedModel


def folded_unembedding(model: HookedModel) -> FoldedUnembedding:
    """Return a model's unembedding with its final norm folded in."""
    weights, norm = model.weights, model.shape.norm
    return fold_unembedding(
        W_U=_array(weights.W_U),
        b_U=_array(weights.b_U),
        norm_weight=_array(weights["ln_final.w"]),
        norm_bias=_array(weights["ln_final.b"]) if norm == "LN" else None,
        norm=norm,
    )


def copying_weights(model: HookedModel) -> ModelCopying:
    """Return what copying by a model's heads is computed with.

    A norm after attention is held at its recorded scale, as the final norm is: its gain, and for LayerNorm its
    centring, go into the output weights.
    """
    directions = center_directions(folded_unembedding(model).directions)
    covariance, layers = covariance_of(directions), []
    for layer, block in enumerate(model.shape.blocks):
        W_O = _array(model.weights[f"blocks.{layer}.attn.W_O"])
        if block.ln1_post:
            centred = W_O - W_O.mean(-1, keepdims=True) if model.shape.norm == "LN" else W_O
            W_O = centred * _array(model.weights[f"blocks.{layer}.ln1_post.w"])
        layers.append(CopyingWeights(W_O, spread_of_logits(W_O, covariance)))
    return ModelCopying(directions, tuple(layers))


def _array(tensor: torch.Tensor) -> npt.NDArray[np.float32]:
    array: npt.NDArray[np.float32] = tensor.detach().float().cpu().numpy()
    return array

"""Direct logit attribution: how much each component, and each head, adds to one logit.

Holding the final norm at its recorded scale makes the map from the residual stream to a logit
linear: a component's share is its dot product with that logit's direction over the scale. The
shares of all components and the constant term add up to the model's own logit.

Source:
    TransformerLens 2.16, `ActivationCache.logit_attrs` and `apply_ln_to_stack`, with the final norm's
    weights folded into the unembedding (`HookedTransformer.fold_layer_norm`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from actpipe.compute.branches import Branch


@dataclass(frozen=True)
class FoldedUnembedding:
    """The unembedding with the final norm's weights folded in."""

    directions: Float[np.ndarray, "d_vocab d_model"]
    """What a component is multiplied with, one row per token; for LayerNorm without its mean over d_model."""
    constants: Float[np.ndarray, " d_vocab"]
    """What is added to each logit whatever the residual stream: `b_U + b_final W_U`."""


def fold_unembedding(
    W_U: Float[np.ndarray, "d_model d_vocab"],
    b_U: Float[np.ndarray, " d_vocab"],
    norm_weight: Float[np.ndarray, " d_model"],
    norm_bias: Float[np.ndarray, " d_model"] | None,
    norm: Literal["LN", "RMS"],
) -> FoldedUnembedding:
    """Fold the final norm's weight and bias into the unembedding.

    Subtracting the mean over d_model from a direction does to every component what LayerNorm's own
    centring does, so components need not be centred.

    Args:
        W_U: Unembedding, `x @ W_U`.
        b_U: Its bias, zeros where there is none.
        norm_weight: The final norm's gain.
        norm_bias: Its bias; None for RMSNorm.
        norm: Which of the two it is.
    """
    directions = W_U.T * norm_weight
    if norm == "LN":
        directions = directions - directions.mean(-1, keepdims=True)
    constants = b_U if norm_bias is None else b_U + norm_bias @ W_U
    return FoldedUnembedding(np.ascontiguousarray(directions, np.float32), constants.astype(np.float32))


def attribute_components(
    components: Float[np.ndarray, "component row d_model"],
    directions: Float[np.ndarray, "row d_model"],
    scale: Float[np.ndarray, " row"],
) -> Float[np.ndarray, "row component"]:
    """Share each row's logit out over components.

    Args:
        components: What each component wrote to the residual stream.
        directions: The folded direction of each row's logit.
        scale: What the final norm divided each row by; above zero.

    Returns:
        Logits (nats).
    """
    if not (scale > 0).all():
        raise ValueError("scale must be above zero in every row")
    return np.einsum("crd,rd->rc", components, directions) / scale[:, None]


@dataclass(frozen=True)
class Seen:
    """A logit's direction as the parts of a branch, heads or neurons, are multiplied with it."""

    directions: Float[np.ndarray, "row d_model"]
    scale: Float[np.ndarray, " row"]
    """What products are divided by: the final norm's scale, and that of a norm behind the branch; above zero."""
    bias: Float[np.ndarray, " row"]
    """Logits (nats) of the branch's bias, that of its norm included."""


def seen_through(
    branch: Branch,
    directions: Float[np.ndarray, "row d_model"],
    scale: Float[np.ndarray, " row"],
    behind: Float[np.ndarray, "row 1"] | None = None,
) -> Seen:
    """Bring logits' directions to where the parts of a branch are.

    Args:
        branch: The branch's weights.
        directions: The folded direction of each row's logit.
        scale: What the final norm divided each row by; above zero.
        behind: What the norm behind the branch divided each row by; None where there is none.
    """
    seen = branch.sees(directions)
    divisor = scale if behind is None else scale * behind[:, 0]
    bias = seen @ branch.b / divisor
    if branch.norm is not None and branch.norm.bias is not None:
        bias = bias + directions @ branch.norm.bias / scale
    return Seen(seen, divisor, bias)


def attribute_heads(
    z: Float[np.ndarray, "row head d_head"], W_O: Float[np.ndarray, "head d_head d_model"], seen: Seen
) -> Float[np.ndarray, "row head"]:
    """Share each row's logit out over the heads of one layer, without forming what they write.

    Args:
        z: Values mixed by each head's pattern.
        W_O: Output weights.
        seen: The direction of each row's logit.

    Returns:
        Logits (nats). With the bias' own share they add up to that of the layer's `attn_out`.
    """
    products = seen.directions @ W_O.reshape(-1, W_O.shape[-1]).T
    return np.einsum("rhd,rhd->rh", z, products.reshape(z.shape)) / seen.scale[:, None]


def attribute_neurons(
    post: Float[np.ndarray, "row neuron"], W_out: Float[np.ndarray, "neuron d_model"], seen: Seen
) -> Float[np.ndarray, "row neuron"]:
    """Share each row's logit out over neurons, without forming what they write.

    Args:
        post: The neurons' activations.
        W_out: Output weights.
        seen: The direction of each row's logit.

    Returns:
        Logits (nats). With the bias' own share all neurons of a layer add up to that of its `mlp_out`.
    """
    found: Float[np.ndarray, "row neuron"] = seen.directions @ W_out.T
    found *= post
    found /= seen.scale[:, None]
    return found


_SPARE_TOKENS = 8
"""Tokens beside the most probable ones whose logits are computed in float64 too, so that rounding decides no rank."""


def logits_room(shape: tuple[int, ...], n_tokens: int) -> int:
    """Return how many numbers in float32 the room of one row in `most_probable` holds.

    Args:
        shape: `(d_vocab, d_model)`.
        n_tokens: How many tokens are looked for.
    """
    d_vocab, d_model = shape
    return max(d_vocab, 2 * d_model * min(d_vocab, n_tokens + _SPARE_TOKENS))


def most_probable(
    stream: Float[np.ndarray, "row d_model"],
    scale: Float[np.ndarray, "row 1"],
    unembedding: FoldedUnembedding,
    n_tokens: int,
) -> Int[np.ndarray, "row rank"]:
    """Return the tokens with the largest logits, the largest first; where logits are equal, the smaller id first.

    Logits are computed in float32, and those that may be among the largest once more in float64.

    Args:
        stream: The last residual stream.
        scale: What the final norm divided each row by.
        unembedding: From the stream to logits.
        n_tokens: How many tokens, at most all.
    """
    d_vocab = len(unembedding.constants)
    logits = stream @ unembedding.directions.T / scale + unembedding.constants
    n_near = min(d_vocab, n_tokens + _SPARE_TOKENS)
    near = np.sort(np.argpartition(-logits, n_near - 1, axis=-1)[:, :n_near], axis=-1)
    directions = unembedding.directions[near].astype(np.float64)
    exact = np.einsum("rkd,rd->rk", directions, stream.astype(np.float64)) / scale + unembedding.constants[near]
    order = np.argsort(-exact, axis=-1, kind="stable")[:, :n_tokens]
    return np.take_along_axis(near, order, -1)


def next_tokens(
    input_ids: Int[np.ndarray, " row_and_next"], sequence: Int[np.ndarray, " row_and_next"], n_rows: int
) -> Int[np.ndarray, " row"]:
    """Return the id that follows each of the first `n_rows` rows in its sequence, -1 where none does.

    Args:
        input_ids: Ids of the rows and of the row after the last, where there is one.
        sequence: Sequence numbers of the same rows.
        n_rows: How many rows to answer for.
    """
    targets = np.full(n_rows, -1, np.int64)
    n_known = min(n_rows, len(input_ids) - 1)
    same = sequence[:n_known] == sequence[1 : n_known + 1]
    targets[:n_known] = np.where(same, input_ids[1 : n_known + 1], -1)
    return targets

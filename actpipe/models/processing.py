"""Rewrite weights so that a model computes the same with fewer moving parts.

Pure functions from one set of weights to another: `model.weights.state_dict()` in, a new dict out; no
tensor is changed in place. Names and layouts are TransformerLens'.

Source: TransformerLens 2.16, `HookedTransformer.load_and_process_state_dict` and what it calls.
"""

from __future__ import annotations

import torch

from actpipe.errors import UnsupportedModelError
from actpipe.hooks import BlockShape, ModelShape

WeightSet = dict[str, torch.Tensor]


def process_weights(
    weights: WeightSet,
    shape: ModelShape,
    *,
    fold_ln: bool = True,
    center_writing_weights: bool = True,
    center_unembed: bool = True,
    fold_value_biases: bool = True,
    refactor_factored_attn_matrices: bool = False,
) -> WeightSet:
    """Process weights as `HookedTransformer.from_pretrained` does by default.

    What makes no sense for an architecture is left out, as there: centring what is written needs
    LayerNorm, folding norms needs an MLP that is not experts, centring the unembedding no soft cap.

    Args:
        weights: `Weights.state_dict()`, or some of it: all of a block's attention with the norm before it, all of its
            MLP with the norm before that, the unembedding with the final norm. What is not there is left out.
        shape: The model's shape.
        fold_ln: Fold the norms' weights and biases into what reads them.
        center_writing_weights: Take the mean over d_model from everything that writes to the stream.
        center_unembed: Take the mean over the vocabulary from the unembedding.
        fold_value_biases: Move value biases into the output bias.
        refactor_factored_attn_matrices: Make W_Q and W_K, W_V and W_O even factors of their products.

    Raises:
        UnsupportedModelError: It is an encoder or an encoder-decoder, of which TransformerLens processes no weights.
    """
    check_processable(shape)
    if fold_ln and not any(block.mlp in ("experts", "opaque") for block in shape.blocks):
        weights = fold_layer_norm(weights, shape)
    if center_writing_weights and shape.norm == "LN":
        weights = center_what_is_written(weights, shape)
    if center_unembed and shape.logit_softcap is None:
        weights = center_unembedding(weights)
    if fold_value_biases:
        weights = fold_biases_of_values(weights, shape)
    if refactor_factored_attn_matrices:
        weights = refactor_attention(weights, shape)
    return weights


def check_processable(shape: ModelShape) -> None:
    """Refuse models in which what is written to the stream does not add up to what the unembedding reads.

    Raises:
        UnsupportedModelError: It is an encoder or an encoder-decoder.
    """
    if not shape.sums_to_logits:
        raise UnsupportedModelError(
            "weights of encoders and encoder-decoders are not processed, as in TransformerLens; use them as they are, "
            "and convention='native'"
        )


def fold_layer_norm(weights: WeightSet, shape: ModelShape) -> WeightSet:
    """Fold each norm before a projection into that projection; LayerNorm's bias and centring too.

    Norms after a branch (`ln1_post`, `ln2_post`) stay: nothing linear follows them.
    """
    check_processable(shape)
    folded, centered = dict(weights), shape.norm == "LN"
    for layer, block in enumerate(shape.blocks):
        prefix = f"blocks.{layer}."
        if block.ln1:
            _fold_norm(folded, f"{prefix}ln1", [f"{prefix}attn.{name}" for name in ("Q", *_key_names(block))], centered)
        if block.ln2:
            branches = ("in", "gate") if block.mlp == "gated" else ("in",)
            _fold_norm(folded, f"{prefix}ln2", [f"{prefix}mlp.{name}" for name in branches], centered)
    _fold_norm(folded, "ln_final", ["unembed.U"], centered)
    return folded


def _key_names(block: BlockShape) -> tuple[str, str]:
    """Return the names of keys and values, which are prefixed where several queries share them."""
    return ("K", "V") if block.n_kv_heads == block.n_heads else ("_K", "_V")


def _split(path: str) -> tuple[str, str]:
    """Return the names of the weight and the bias of a projection: `blocks.0.attn._K` -> `_W_K`, `_b_K`."""
    place, _, name = path.rpartition(".")
    mark, name = ("_", name[1:]) if name.startswith("_") else ("", name)
    return f"{place}.{mark}W_{name}", f"{place}.{mark}b_{name}"


def _fold_norm(weights: WeightSet, norm: str, readers: list[str], centered: bool) -> None:
    scale, shift = weights.pop(f"{norm}.w", None), weights.pop(f"{norm}.b", None)
    if scale is None:
        return
    for path in readers:
        weight_name, bias_name = _split(path)
        weight = weights[weight_name]
        if shift is not None and bias_name in weights:
            weights[bias_name] = weights[bias_name] + torch.einsum("...mo,m->...o", weight, shift)
        weight = weight * scale.unsqueeze(-1)
        weights[weight_name] = weight - weight.mean(-2, keepdim=True) if centered else weight


def center_what_is_written(weights: WeightSet, shape: ModelShape) -> WeightSet:
    """Take the mean over d_model from all that is added to the residual stream; LayerNorm takes it anyway."""
    check_processable(shape)
    centered = dict(weights)
    names = ["embed.W_E", "pos_embed.W_pos"]
    for layer in range(shape.n_layers):
        names += [f"blocks.{layer}.{name}" for name in ("attn.W_O", "attn.b_O", "mlp.W_out", "mlp.b_out")]
    for name in names:
        if name in centered:
            centered[name] = centered[name] - centered[name].mean(-1, keepdim=True)
    return centered


def center_unembedding(weights: WeightSet) -> WeightSet:
    """Take the mean over the vocabulary from the unembedding: logits move together, probabilities stay."""
    return weights | {
        name: weights[name] - weights[name].mean(-1, keepdim=True)
        for name in ("unembed.W_U", "unembed.b_U")
        if name in weights
    }


def fold_biases_of_values(weights: WeightSet, shape: ModelShape) -> WeightSet:
    """Move each head's value bias through W_O into the output bias; patterns sum to 1, so it is constant."""
    check_processable(shape)
    folded = dict(weights)
    for layer, block in enumerate(shape.blocks):
        prefix = f"blocks.{layer}.attn."
        name = prefix + ("b_V" if block.n_kv_heads == block.n_heads else "_b_V")
        if name not in folded:
            continue
        bias = folded[name].repeat_interleave(block.n_heads // folded[name].shape[0], dim=0)
        folded[f"{prefix}b_O"] = folded[f"{prefix}b_O"] + torch.einsum("hd,hdm->m", bias, folded[f"{prefix}W_O"])
        folded[name] = torch.zeros_like(folded[name])
    return folded


def refactor_attention(weights: WeightSet, shape: ModelShape) -> WeightSet:
    """Replace W_Q, W_K and W_V, W_O by factors of the same products with orthogonal columns.

    `W_Q W_K^T` (biases as one more input) becomes `U sqrt(S)` and `V sqrt(S)`; `W_V W_O` becomes `U S`
    and a rotation. Patterns and what heads write stay; q, k, v and z change.

    Raises:
        UnsupportedModelError: Queries are rotated by position, or share keys: then there is no such product.
    """
    check_processable(shape)
    evened = dict(weights)
    for layer, block in enumerate(shape.blocks):
        if block.rotary or block.n_kv_heads != block.n_heads:
            raise UnsupportedModelError(
                "attention cannot be refactored: queries are rotated by their position or share keys, "
                "so that no single matrix says what a head looks for"
            )
        prefix = f"blocks.{layer}.attn."
        q, k = (_with_bias(evened[f"{prefix}W_{name}"], evened[f"{prefix}b_{name}"]) for name in "QK")
        left, values, right = _factors(q, k.transpose(-1, -2))
        for name, factor in (("Q", left), ("K", right)):
            even = factor * values.sqrt().unsqueeze(-2)
            evened[f"{prefix}W_{name}"], evened[f"{prefix}b_{name}"] = even[:, :-1], even[:, -1]
        bias, W_O = evened[f"{prefix}b_V"], evened[f"{prefix}W_O"]
        evened[f"{prefix}b_O"] = evened[f"{prefix}b_O"] + torch.einsum("hd,hdm->m", bias, W_O)
        left, values, right = _factors(evened[f"{prefix}W_V"], W_O)
        evened[f"{prefix}W_V"] = left * values.unsqueeze(-2)
        evened[f"{prefix}W_O"] = right.transpose(-1, -2)
        evened[f"{prefix}b_V"] = torch.zeros_like(bias)
    return evened


def _with_bias(weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return torch.cat([weight, bias.unsqueeze(-2)], dim=-2)


def _factors(left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return U, S, V of `left @ right = U S V^T` at the inner rank, without forming the product."""
    u_left, s_left, v_left = torch.linalg.svd(left, full_matrices=False)
    u_right, s_right, v_right = torch.linalg.svd(right, full_matrices=False)
    middle = s_left.unsqueeze(-1) * (v_left @ u_right) * s_right.unsqueeze(-2)
    u, s, v = torch.linalg.svd(middle, full_matrices=False)
    return u_left @ u, s, (v @ v_right).transpose(-1, -2)

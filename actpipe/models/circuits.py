"""A model's circuits, of the weights as they are or as TransformerLens processes them by default."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from actpipe.compute.circuits import MODES, all_composition_scores, copying_ranks, positive_eigenvalue_share
from actpipe.compute.circuits import token_circuit as _token_circuit
from actpipe.compute.factored import FactoredMatrix
from actpipe.hooks import ModelShape
from actpipe.models.processing import process_weights
from actpipe.models.weights import Weights


@dataclass(frozen=True)
class Circuits:
    """What every head reads and writes; `(layer, head, d_model, d_model)`, kept as factors."""

    W_E: torch.Tensor
    QK: FactoredMatrix
    OV: FactoredMatrix
    W_U: torch.Tensor


def has_circuits(shape: ModelShape) -> bool:
    """Return whether every layer has as many heads as the others, with weights of their own."""
    plain = all(block.attention and block.projections and block.z for block in shape.blocks)
    return plain and shape.causal and shape.sums_to_logits and len({block.n_heads for block in shape.blocks}) == 1


def open_circuits(weights: Weights, shape: ModelShape, *, processed: bool) -> Circuits:
    """Return a model's circuits in float32, on the CPU.

    Args:
        weights: `model.weights` or `open_weights(...)`.
        shape: The model's shape.
        processed: Fold norms and centre first, as `HookedTransformer.from_pretrained` does by default.
    """
    found = weights.state_dict()
    if processed:
        found = process_weights(found, shape)

    def stacked(name: str) -> torch.Tensor:
        return torch.stack([heads_of(found, shape, layer, name) for layer in range(shape.n_layers)])

    return Circuits(
        W_E=plain(found["embed.W_E"]),
        QK=FactoredMatrix(stacked("W_Q"), stacked("W_K").mT),
        OV=FactoredMatrix(stacked("W_V"), stacked("W_O")),
        W_U=plain(found["unembed.W_U"]),
    )


def heads_of(found: Mapping[str, torch.Tensor], shape: ModelShape, layer: int, name: str) -> torch.Tensor:
    """Return one of `W_Q`, `W_K`, `W_V`, `W_O` of every head of a layer, shared ones repeated, in float32 on the CPU.

    Args:
        found: Weights by name, as in `Weights.state_dict`.
        shape: The model's shape.
        layer: Number of the block.
        name: Which.
    """
    block, prefix = shape.blocks[layer], f"blocks.{layer}.attn."
    shared = name in ("W_K", "W_V") and block.n_kv_heads != block.n_heads
    heads = plain(found[f"{prefix}_{name}" if shared else f"{prefix}{name}"])
    return heads.repeat_interleave(block.n_heads // heads.shape[0], dim=0)


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """Return a weight in float32 on the CPU."""
    return tensor.detach().float().cpu()


def score_circuits(circuits: Circuits, *, n_tokens: int) -> dict[str, torch.Tensor]:
    """Return scores of every head, `(layer, head)`, in float64.

    Args:
        circuits: Of all layers.
        n_tokens: How many tokens, evenly spread over the vocabulary, to rank.
    """
    d_vocab = min(circuits.W_E.shape[0], circuits.W_U.shape[1])
    ids = torch.linspace(0, d_vocab - 1, min(n_tokens, d_vocab)).round().long()
    ranks = [copying_ranks(circuits.W_E[ids], circuits.OV[i], circuits.W_U, ids) for i in range(len(circuits.OV.A))]
    W_E, W_U = circuits.W_E[:d_vocab].double(), circuits.W_U[:, :d_vocab].double()
    OV, QK = (FactoredMatrix(one.A.double(), one.B.double()) for one in (circuits.OV, circuits.QK))
    return {
        "ov_copying": positive_eigenvalue_share(_token_circuit(W_E, OV, W_U)),
        "ov_copying_rank": torch.stack([mean for mean, _ in ranks]),
        "ov_copying_first": torch.stack([first for _, first in ranks]),
        "qk_matching": positive_eigenvalue_share(_token_circuit(W_E, QK, W_E.mT)),
        "ov_norm": OV.norm(),
        "qk_norm": QK.norm(),
    }


def score_compositions(circuits: Circuits) -> torch.Tensor:
    """Return all composition scores, `(mode, layer, head, later_layer, later_head)`."""
    return torch.stack([all_composition_scores(circuits.QK, circuits.OV, mode) for mode in MODES])

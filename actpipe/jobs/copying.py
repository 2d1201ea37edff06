"""Copying by heads over a whole store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from actpipe.compute.copying import CopyingSums, CopyingWeights, score_copying
from actpipe.compute.heads import counted_pairs
from actpipe.hooks import ModelShape
from actpipe.jobs.attribution_targets import SCALE
from actpipe.jobs.blocks import Done, RowBlock, require_arrays
from actpipe.jobs.sequences import sum_over_sequences
from actpipe.records import Sequence
from actpipe.stores.reading import ActivationStore


@dataclass(frozen=True)
class ModelCopying:
    """The weights of a whole model."""

    directions: npt.NDArray[np.float32]
    """Centred folded unembedding, `(d_vocab, d_model)`."""
    layers: tuple[CopyingWeights, ...]


def copying_arrays(shape: ModelShape) -> dict[int, tuple[str, ...]]:
    """Name what copying by each layer is computed from: pattern, `z`, and a norm after attention where there is one."""
    return {
        layer: (
            f"blocks.{layer}.attn.hook_pattern",
            f"blocks.{layer}.attn.hook_z",
            *([f"blocks.{layer}.ln1_post.hook_scale"] if block.ln1_post else []),
        )
        for layer, block in enumerate(shape.blocks)
    }


def score_store_copying(
    store: ActivationStore,
    weights: ModelCopying,
    *,
    exclude_bos: bool,
    exclude_current_token: bool,
    block_bytes: int,
    done: Done = lambda _: None,
) -> Mapping[int, CopyingSums]:
    """Sum how far the heads of each layer raise the logits of the tokens they attend to.

    Sequences of one token are left out.

    Returns:
        The sums by layer; empty where nothing was measured.
    """
    by_layer = copying_arrays(store.shape)
    names = [SCALE, *(name for of_layer in by_layer.values() for name in of_layer)]
    require_arrays(store, names, "score_copying")
    store.require_every_token("score_copying")

    def score(sequence: Sequence, block: RowBlock) -> dict[int, CopyingSums]:
        length, n_queries = len(sequence.ids), block.n_rows
        counted = counted_pairs(n_queries, length, exclude_bos=exclude_bos, exclude_current_token=exclude_current_token)
        directions, final = weights.directions[sequence.ids], block.read(SCALE)[:, 0]
        sums = {}
        for (layer, (pattern, z, *norm)), of_layer in zip(by_layer.items(), weights.layers, strict=True):
            attention = block.read(pattern)[:, :, :length]
            scale = final * block.read(norm[0])[:, 0] if norm else final
            sums[layer] = score_copying(attention, block.read(z), scale, directions, of_layer, counted)
        return sums

    return sum_over_sequences(store, names, score, block_bytes=block_bytes, done=done)

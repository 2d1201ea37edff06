"""What each component contributes to the residual stream."""

from __future__ import annotations

import numpy as np

from actpipe.compute.residual import (
    Component,
    ResidualSums,
    residual_components,
    residual_hook,
    sum_residual_shares,
)
from actpipe.errors import UnsupportedModelError
from actpipe.hooks import build_catalogue
from actpipe.jobs.blocks import Done, RowBlock, even_blocks, map_and_sum, require_arrays
from actpipe.stores.reading import ActivationStore


def components_of(store: ActivationStore, layer: int | None = None) -> list[Component]:
    """Name the components of the model that a store came from.

    Raises:
        UnsupportedModelError: Its residual stream is no sum of what attention and MLPs write.
    """
    shape = store.shape
    if not shape.sums_to_logits:
        raise UnsupportedModelError(
            f"the store {store.folder.root} is of {store.manifest.model.family}, whose residual stream is no sum of "
            "what attention and MLPs write to it; work with the stored activations themselves"
        )
    return residual_components(build_catalogue(shape), shape.n_layers, layer)


def measure_residual(
    store: ActivationStore, layer: int | None, *, block_bytes: int, done: Done = lambda _: None
) -> ResidualSums:
    """Measure each component's length and its share of the residual stream, over all rows."""
    components = components_of(store, layer)
    total = residual_hook(store.shape.n_layers, layer)
    names = [*(component.hook for component in components), total]
    require_arrays(store, names, "decompose_residual")

    def measure(block: RowBlock) -> ResidualSums:
        written = np.stack([block.read(component.hook) for component in components])
        return sum_residual_shares(written, block.read(total))

    return map_and_sum(measure, even_blocks(store, names * 2, block_bytes), done)

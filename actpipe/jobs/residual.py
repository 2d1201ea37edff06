"""What each component contributes to the residual stream."""

from __future__ import annotations

from collections.abc import Sequence

from actpipe.compute.residual import Component, ResidualSums, residual_components, sum_residual_shares
from actpipe.errors import UnsupportedModelError
from actpipe.hooks import build_catalogue
from actpipe.jobs.blocks import Done, RowBlock, even_blocks, map_and_sum, require_arrays
from actpipe.jobs.residual_sources import Source
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
    store: ActivationStore,
    sources: Sequence[Source],
    stream: str,
    *,
    is_whole: bool,
    block_bytes: int,
    done: Done = lambda _: None,
) -> ResidualSums:
    """Measure what each part contributes to the residual stream, over all rows.

    Args:
        store: The activations.
        sources: Where the parts come from.
        stream: What they are compared with.
        is_whole: Whether they must add up to it.
        block_bytes: Memory of one block, in bytes.
        done: Called with 1 after each block.
    """
    names = [name for source in sources for name in source.arrays]
    require_arrays(store, [*names, stream], "decompose_residual")

    def measure(block: RowBlock) -> ResidualSums:
        parts = (part for source in sources for part in source.read(block))
        return sum_residual_shares(parts, block.read(stream), is_whole=is_whole)

    d_model = store.shape.d_model
    blocks = even_blocks(store, [*names, stream], block_bytes, more_row_bytes=40 * d_model)
    return map_and_sum(measure, blocks, done, fan_in=2)

"""The residual stream as a sum of what was written to it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float


@dataclass(frozen=True)
class Component:
    """One thing that writes to the residual stream."""

    label: str
    """TransformerLens' label: `embed`, `pos_embed`, `3_attn_out`, `3_mlp_out`."""
    hook: str
    """Name of the activation that it is."""
    layer: int | None
    kind: str
    """`embed`, `pos_embed`, `attn_out` or `mlp_out`."""


def residual_components(hook_points: Collection[str], n_layers: int, layer: int | None = None) -> list[Component]:
    """Name the components whose sum is the residual stream entering `layer`.

    Args:
        hook_points: The hook points of the model; without `hook_pos_embed` there is no such component.
        n_layers: Layers of the model.
        layer: 0 to `n_layers`; by default `n_layers`, which is the stream leaving the last block.

    Source:
        TransformerLens 2.16, `ActivationCache.decompose_resid`, mode `all`.
    """
    stop = n_layers if layer is None else layer
    if not 0 <= stop <= n_layers:
        raise ValueError(f"layer {layer} is not one of 0 to {n_layers}")
    components = [Component("embed", "hook_embed", None, "embed")]
    if "hook_pos_embed" in hook_points:
        components.append(Component("pos_embed", "hook_pos_embed", None, "pos_embed"))
    written = ((block, kind) for block in range(stop) for kind in ("attn_out", "mlp_out"))
    components += [Component(f"{block}_{kind}", f"blocks.{block}.hook_{kind}", block, kind) for block, kind in written]
    return components


def residual_hook(n_layers: int, layer: int | None = None) -> str:
    """Name the activation that the components add up to."""
    if layer is None or layer == n_layers:
        return f"blocks.{n_layers - 1}.hook_resid_post"
    return f"blocks.{layer}.hook_resid_pre"


@dataclass(frozen=True)
class ResidualSums:
    """Sums over rows, in float64, from which the shares of the components follow; they add up."""

    n_rows: int
    norm: Float[np.ndarray, " component"]
    """Of each component's length."""
    share: Float[np.ndarray, " component"]
    """Of its projection onto the residual stream, as a share of that stream's length."""
    worst: float
    """Largest difference between the sum of components and the residual stream, relative to its largest entry."""

    def __add__(self, other: ResidualSums) -> ResidualSums:
        return ResidualSums(
            n_rows=self.n_rows + other.n_rows,
            norm=self.norm + other.norm,
            share=self.share + other.share,
            worst=max(self.worst, other.worst),
        )


def sum_residual_shares(
    components: Float[np.ndarray, "component row d_model"], residual: Float[np.ndarray, "row d_model"]
) -> ResidualSums:
    """Measure how much each component contributes to the residual stream.

    The share of a component is `<component, residual> / |residual|^2`; at each row the shares of all
    components add up to 1. Rows whose residual stream is zero have no shares and count as zero.

    Args:
        components: What each component wrote.
        residual: The stream they add up to.
    """
    wide: Any = residual.astype(np.float64)
    squared = (wide**2).sum(-1)
    shares = np.einsum("crd,rd->cr", components, residual, dtype=np.float64) / np.where(squared > 0, squared, np.inf)
    difference = np.abs(components.sum(0, dtype=np.float64) - wide).max(initial=0.0)
    return ResidualSums(
        n_rows=len(residual),
        norm=np.linalg.norm(components, axis=-1).sum(-1, dtype=np.float64),
        share=shares.sum(-1),
        worst=float(difference / max(float(np.abs(wide).max(initial=0.0)), 1e-30)),
    )

"""The residual stream as a sum of what was written to it."""

from __future__ import annotations

from collections.abc import Collection, Iterable
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
    """Sums over rows, in float64, from which what is said of each component follows; they add up."""

    n_rows: int
    norm: Float[np.ndarray, " component"]
    """Of each component's length."""
    share: Float[np.ndarray, " component"]
    """Of its projection onto the residual stream, as a share of that stream's length."""
    cosine: Float[np.ndarray, " component"]
    """Of its cosine with the residual stream."""
    product: Float[np.ndarray, " component"]
    """Of its dot product with the residual stream."""
    written: Float[np.ndarray, "component d_model"]
    """Of the component itself."""
    stream: Float[np.ndarray, " d_model"]
    """Of the residual stream."""
    squared: float
    """Of that stream's squared length."""
    worst: float
    """Largest difference between the sum of components and the residual stream, relative to its largest entry; 0 where
    the components are not all of it."""

    def __add__(self, other: ResidualSums) -> ResidualSums:
        return ResidualSums(
            n_rows=self.n_rows + other.n_rows,
            norm=self.norm + other.norm,
            share=self.share + other.share,
            cosine=self.cosine + other.cosine,
            product=self.product + other.product,
            written=self.written + other.written,
            stream=self.stream + other.stream,
            squared=self.squared + other.squared,
            worst=float(np.maximum(self.worst, other.worst)),
        )

    @property
    def variance_share(self) -> Float[np.ndarray, " component"]:
        """Each component's covariance with the stream, summed over d_model, as a share of the stream's variance.

        The shares of all components add up to 1. NaN where the stream does not vary.
        """
        mean = self.stream / self.n_rows
        covariance = self.product / self.n_rows - self.written @ mean / self.n_rows
        variance = self.squared / self.n_rows - float(mean @ mean)
        return covariance / (variance if variance > 0 else np.nan)


def sum_residual_shares(
    components: Iterable[Float[np.ndarray, "row d_model"]],
    residual: Float[np.ndarray, "row d_model"],
    *,
    is_whole: bool = True,
) -> ResidualSums:
    """Measure how much each component contributes to the residual stream; one of them is held at a time.

    The share of a component is `<component, residual> / |residual|^2`; at each row the shares of all
    components add up to 1. Rows whose residual stream is zero have no shares and count as zero, and so does the cosine
    of what is zero.

    Args:
        components: What each component wrote.
        residual: The stream they add up to.
        is_whole: Whether they are all that it consists of.
    """
    wide = residual.astype(np.float64)
    length = np.linalg.norm(wide, axis=-1)
    longer = np.where(length > 0, length, np.inf)
    left = wide.copy()
    sums: list[tuple[Any, ...]] = []
    for component in components:
        product = np.einsum("rd,rd->r", component, wide)
        norm = np.linalg.norm(component, axis=-1).astype(np.float64)
        cosine = product / longer / np.where(norm > 0, norm, np.inf)
        written = component.sum(0, dtype=np.float64)
        sums.append((norm.sum(), (product / longer**2).sum(), cosine.sum(), product.sum(), written))
        left -= component
    norms, shares, cosines, products, totals = zip(*sums, strict=True)
    off = float(np.abs(left).max(initial=0.0)) if is_whole else 0.0
    return ResidualSums(
        n_rows=len(residual),
        norm=np.array(norms),
        share=np.array(shares),
        cosine=np.array(cosines),
        product=np.array(products),
        written=np.stack(totals),
        stream=wide.sum(0),
        squared=float((length**2).sum()),
        worst=off / max(float(np.abs(wide).max(initial=0.0)), 1e-30),
    )

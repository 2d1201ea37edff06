"""Figures of attention heads from weights: scores by layer and head, and who composes with whom."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import plotly.graph_objects as go

from actpipe.records import Finding
from actpipe.report.drawing import Plot, heat_map, layer_by_head, styled
from actpipe.stores.results import Result

_MOST_PAIRS = 400_000
"""Cells that a heat map of all pairs of heads may have; larger models show layers by layers."""

_SCORES = {
    "ov_copying": ("Copying by eigenvalues", "Sum of the eigenvalues of W_E W_V W_O W_U over the sum of moduli"),
    "ov_copying_rank": (
        "Copying by rank",
        "Mean of 1 - rank / (vocabulary - 1) of a token's own logit when the head attends to it; 0.5 is chance",
    ),
    "qk_matching": ("Matching by eigenvalues", "The same share for W_E W_Q W_K^T W_E^T: whether like attends to like"),
}
_MODES = {"Q": "queries", "K": "keys", "V": "values"}


def _weights(result: Result) -> Iterator[Plot | Finding]:
    table = result.table
    for score, (title, caption) in _SCORES.items():
        best = table.iloc[int(table[score].argmax())]
        where = f"Highest: L{int(best['layer'])}H{int(best['head'])} with {best[score]:.3f}."
        grid = layer_by_head(table, score)
        yield Plot(title, f"{caption}. {where}", heat_map(grid, "score", diverging=score != "ov_copying_rank"))
    scores = result.dataset["composition"]
    for mode, reads in _MODES.items():
        values = scores.sel(mode=mode).values
        if values.shape[0] > 1:
            yield _composition(values, reads)


def _composition(values: np.ndarray, reads: str) -> Plot:
    """Draw later heads downwards and earlier ones across; pairs that cannot compose are left empty."""
    n_layers, n_heads = values.shape[:2]
    layer = np.arange(n_layers)
    possible = np.broadcast_to((layer[:, None] < layer[None])[:, None, :, None], values.shape)
    values = np.where(possible, values, np.nan)
    what = "heads"
    names = [f"L{i}H{j}" for i in range(n_layers) for j in range(n_heads)]
    grid = values.reshape(len(names), len(names)).T
    if grid.size > _MOST_PAIRS:
        what, names = "layers, the largest score of their heads", [f"L{i}" for i in range(n_layers)]
        grid = np.where(possible, values, -np.inf).max((1, 3)).T
        grid = np.where(np.isinf(grid), np.nan, grid)
    grid = grid[-(len(names) - len(names) // n_layers) :, : len(names) - len(names) // n_layers]
    figure = go.Figure(
        go.Heatmap(
            z=grid.astype(np.float32),
            x=names[: grid.shape[1]],
            y=names[-grid.shape[0] :],
            colorscale="Blues",
            zmin=0.0,
            colorbar={"title": {"text": "score", "side": "right"}, "thickness": 14},
            texttemplate="%{z:.2f}" if grid.size <= 100 else None,
            hovertemplate="%{x} into %{y}: %{z:.4f}<extra></extra>",
        )
    )
    figure.update_xaxes(title="writes", type="category")
    figure.update_yaxes(title="reads", type="category", autorange="reversed", automargin=True)
    height = 150 + max(120, min(700, 22 * len(grid)))
    caption = f"|W_left W_right| / (|W_left| |W_right|) of all pairs of {what}, the earlier into the {reads}."
    return Plot(f"Composition through {reads}", caption, styled(figure, height))


HEAD_MAKERS: dict[str, Callable[[Result], Iterator[Plot | Finding]]] = {"weights": _weights}
"""By kind of result."""

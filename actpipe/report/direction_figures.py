"""Figures of neurons, directions, and the geometry of activations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import plotly.graph_objects as go

from actpipe.records import Finding
from actpipe.report.drawing import BLUE, GREEN, GREY, ORANGE, Plot, styled
from actpipe.stores.results import Result

_MOST_LABELLED = 14
"""Largest matrix whose cells have their numbers written in."""


def short_name(hook: str) -> str:
    """Return a hook's name as an axis takes it: `3.resid_post`."""
    return hook.removeprefix("blocks.").replace("hook_", "")


def matrix_map(values: np.ndarray, names: Sequence[str], unit: str, *, diverging: bool) -> go.Figure:
    """Draw a square matrix of things with themselves; from 0 to 1, or from -1 to 1."""
    figure = go.Figure(
        go.Heatmap(
            z=values.astype(np.float32),
            x=list(names),
            y=list(names),
            colorscale="RdBu" if diverging else "Blues",
            reversescale=diverging,
            zmin=-1.0 if diverging else 0.0,
            zmax=1.0,
            colorbar={"title": {"text": unit, "side": "right"}, "thickness": 14},
            texttemplate="%{z:.2f}" if len(names) <= _MOST_LABELLED else None,
            hovertemplate="%{y}, %{x}: %{z:.4f}<extra></extra>",
            xgap=1,
            ygap=1,
        )
    )
    figure.update_xaxes(type="category", ticks="", showline=False)
    figure.update_yaxes(type="category", autorange="reversed", ticks="", automargin=True)
    return styled(figure, 170 + max(10, min(40, 560 // len(names))) * len(names))


def by_layer(names: Sequence[str], series: Sequence[tuple[str, np.ndarray]], unit: str) -> go.Figure:
    """Draw lines over activations, in the order of the store."""
    figure = go.Figure()
    for color, (label, values) in zip((BLUE, ORANGE, GREEN, GREY), series, strict=False):
        figure.add_scatter(x=list(names), y=values, name=label, mode="lines+markers", line={"color": color, "width": 2})
    figure.update_xaxes(type="category", automargin=True)
    figure.update_yaxes(title=unit, rangemode="tozero")
    figure.update_layout(showlegend=len(series) > 1, legend={"orientation": "h", "y": 1.12})
    return styled(figure, 340)


def _geometry(result: Result) -> Iterator[Plot | Finding]:
    data, name = result.dataset, result.record.name
    names = [short_name(str(hook)) for hook in data["hook"].values]
    yield Plot(
        f"Length of rows: {name}",
        "Mean Euclidean norm over all tokens.",
        by_layer(names, [("norm", data["mean_norm"].values)], "norm"),
    )
    yield Plot(
        f"Length of rows by position: {name}", "Mean over all tokens at a position.", _by_position(result, names)
    )
    yield Plot(
        f"Dimension: {name}",
        f"Of {int(data['d_row'].max())}: how many dimensions of equal variance would be spread as much (participation "
        "ratio), and the exponential of the entropy of the shares of variance (effective rank).",
        by_layer(
            names,
            [
                ("participation ratio", data["participation_ratio"].values),
                ("effective rank", data["effective_rank"].values),
            ],
            "dimensions",
        ),
    )
    yield Plot(
        f"Anisotropy: {name}",
        "Mean cosine of all pairs of different rows: 0 where they point everywhere.",
        by_layer(names, [("mean cosine", data["anisotropy"].values)], "mean cosine"),
    )
    if result.record.settings.get("cka") and len(names) > 1:
        yield Plot(
            f"Similarity of activations: {name}",
            "Linear CKA over all tokens: 1 where one is the other, turned and scaled.",
            matrix_map(data["cka"].values, names, "CKA", diverging=False),
        )


def _by_position(result: Result, names: Sequence[str]) -> go.Figure:
    data = result.dataset
    there = np.flatnonzero(data["count"].values.any(-1))
    figure = go.Figure()
    for number, name in enumerate(names):
        shade = 0.25 + 0.75 * (number + 1) / len(names)
        figure.add_scatter(
            x=data["position"].values[there],
            y=data["norm"].values[there, number],
            name=name,
            mode="lines",
            line={"color": f"rgba(47,109,181,{shade:.2f})", "width": 2},
        )
    figure.update_xaxes(title="position in the sequence")
    figure.update_yaxes(title="norm", rangemode="tozero")
    figure.update_layout(showlegend=len(names) <= _MOST_LABELLED)
    return styled(figure, 340)


DIRECTION_MAKERS: dict[str, Callable[[Result], Iterator[Plot | Finding]]] = {"geometry": _geometry}
"""By kind of result."""

"""What figures are drawn with: bars, lines, heat maps of layers and heads, in one style."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import plotly.graph_objects as go

BLUE, ORANGE, GREEN, GREY = "#2f6db5", "#d9822b", "#3c8d5a", "#8a8f98"
_COLORS = {
    "embed": GREY,
    "pos_embed": GREY,
    "attn_out": BLUE,
    "mlp_out": ORANGE,
    "bias": GREEN,
    "attn_bias": GREEN,
    "head": BLUE,
    "neuron": ORANGE,
    "other_neurons": GREY,
    "mlp_bias": GREEN,
}
_ROW_HEIGHT = 22
MOST_LABELLED = 14
"""Most lines that have a legend, and the largest matrix whose cells have their numbers written in."""


@dataclass(frozen=True)
class Plot:
    """A figure, what it shows, and how to read it."""

    title: str
    caption: str
    figure: go.Figure


def styled(figure: go.Figure, height: int) -> go.Figure:
    """Give a figure its height in pixels and the look of all."""
    return figure.update_layout(
        template="simple_white",
        height=height,
        margin={"l": 70, "r": 24, "t": 24, "b": 56},
        font={"family": "system-ui, -apple-system, Segoe UI, sans-serif", "size": 13},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        hoverlabel={"font": {"size": 13}},
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": "#b6bdc7", "activecolor": "#5b6675"},
    )


def bars(table: pd.DataFrame, value: str, unit: str, error: str | None = None) -> go.Figure:
    """Draw horizontal bars, first component on top, coloured by what it is."""
    figure = go.Figure(
        go.Bar(
            y=table["component"],
            x=table[value],
            orientation="h",
            marker_color=[_COLORS.get(kind, GREY) for kind in table["kind"]],
            error_x=None if error is None else {"array": table[error], "color": "#555", "thickness": 1, "width": 2},
            hovertemplate="%{y}: %{x:.4f}<extra></extra>",
        )
    )
    figure.update_yaxes(autorange="reversed", title=None, automargin=True, type="category")
    figure.update_xaxes(title=unit, zeroline=True)
    return styled(figure, 130 + _ROW_HEIGHT * len(table))


def position_lines(position: np.ndarray, curves: Mapping[str, np.ndarray], unit: str) -> go.Figure:
    """Draw a line over positions for each of several things in an order, such as layers: the later, the darker."""
    figure = go.Figure()
    for number, (name, values) in enumerate(curves.items()):
        shade = 0.25 + 0.75 * (number + 1) / len(curves)
        line = {"color": f"rgba(47,109,181,{shade:.2f})", "width": 2}
        figure.add_scatter(x=position, y=values, name=name, mode="lines", line=line)
    figure.update_xaxes(title="position in the sequence")
    figure.update_yaxes(title=unit, rangemode="tozero")
    figure.update_layout(showlegend=len(curves) <= MOST_LABELLED)
    return styled(figure, 340)


def heat_map(values: np.ndarray, unit: str, *, diverging: bool, shares: bool = True) -> go.Figure:
    """Draw layers downwards and heads across.

    Args:
        values: `(layer, head)`, NaN where a layer has fewer heads.
        unit: What they are.
        diverging: Whether colours are symmetric about 0; else they start there.
        shares: Whether colours that start at 0 end at 1, as for shares, or at the largest value.
    """
    n_layers, n_heads = values.shape
    largest = float(np.nanmax(np.abs(values), initial=1e-9))
    figure = go.Figure(
        go.Heatmap(
            z=values,
            x=np.arange(n_heads),
            y=np.arange(n_layers),
            colorscale="RdBu" if diverging else "Blues",
            reversescale=diverging,
            zmin=-largest if diverging else 0.0,
            zmax=1.0 if shares and not diverging else largest,
            colorbar={"title": {"text": unit, "side": "right"}, "thickness": 14},
            texttemplate="%{z:.2f}" if values.size <= 200 else None,
            hovertemplate="L%{y}H%{x}: %{z:.4f}<extra></extra>",
            xgap=1,
            ygap=1,
        )
    )
    figure.update_xaxes(
        title="head", dtick=1 if n_heads <= 16 else 4 if n_heads <= 40 else None, showline=False, ticks=""
    )
    figure.update_yaxes(title="layer", autorange="reversed", dtick=1 if n_layers <= 40 else None, ticks="")
    return styled(figure, 150 + max(6, min(34, 700 // n_layers)) * n_layers)


def layer_by_head(table: pd.DataFrame, value: str) -> np.ndarray:
    """Return one column of a table of heads as `(layer, head)`, NaN where a head is missing."""
    grid = np.full((int(table["layer"].max()) + 1, int(table["head"].max()) + 1), np.nan)
    grid[table["layer"].to_numpy(int), table["head"].to_numpy(int)] = table[value].to_numpy(float)
    return grid

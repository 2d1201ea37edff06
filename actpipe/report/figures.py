"""One function per kind of result: from numbers to figures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from actpipe.stores.results import Result

_BLUE, _ORANGE, _GREEN, _GREY = "#2f6db5", "#d9822b", "#3c8d5a", "#8a8f98"
_COLORS = {
    "embed": _GREY,
    "pos_embed": _GREY,
    "attn_out": _BLUE,
    "mlp_out": _ORANGE,
    "bias": _GREEN,
    "attn_bias": _GREEN,
    "head": _BLUE,
}
_ROW_HEIGHT = 22


@dataclass(frozen=True)
class Plot:
    """A figure, what it shows, and how to read it."""

    title: str
    caption: str
    figure: go.Figure


def _styled(figure: go.Figure, height: int) -> go.Figure:
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


_METRICS = {
    "loss": ("Loss by position", "nats per token"),
    "entropy": ("Entropy of the prediction by position", "nats"),
    "correct": ("Share of right top predictions by position", "share"),
}


def _metrics(result: Result) -> Iterator[Plot]:
    data = result.dataset
    for metric, (title, unit) in _METRICS.items():
        if metric not in data["metric"].values:
            continue
        one = data.sel(metric=metric)
        there = one["count"].values > 0
        position, mean = one["position"].values[there], one["mean"].values[there]
        error = 1.96 * one["std"].values[there] / np.sqrt(one["count"].values[there])
        figure = go.Figure()
        figure.add_scatter(
            x=np.concatenate([position, position[::-1]]),
            y=np.concatenate([mean + error, (mean - error)[::-1]]),
            fill="toself",
            fillcolor="rgba(47,109,181,0.18)",
            line={"width": 0},
            hoverinfo="skip",
            showlegend=False,
        )
        figure.add_scatter(x=position, y=mean, mode="lines", line={"color": _BLUE, "width": 2}, showlegend=False)
        overall = float(result.record.summary[metric])
        figure.add_hline(y=overall, line={"color": _GREY, "dash": "dot"})
        figure.update_xaxes(title="position in the sequence")
        figure.update_yaxes(title=unit, rangemode="tozero")
        caption = (
            f"Mean over all tokens at a position, with its 95 % interval. Dotted: over all positions, {overall:.3f}."
        )
        yield Plot(title, caption, _styled(figure, 340))


def _bars(table: pd.DataFrame, value: str, unit: str, error: str | None = None) -> go.Figure:
    """Draw horizontal bars, first component on top, coloured by what it is."""
    figure = go.Figure(
        go.Bar(
            y=table["component"],
            x=table[value],
            orientation="h",
            marker_color=[_COLORS.get(kind, _GREY) for kind in table["kind"]],
            error_x=None if error is None else {"array": table[error], "color": "#555", "thickness": 1, "width": 2},
            hovertemplate="%{y}: %{x:.4f}<extra></extra>",
        )
    )
    figure.update_yaxes(autorange="reversed", title=None, automargin=True, type="category")
    figure.update_xaxes(title=unit, zeroline=True)
    return _styled(figure, 130 + _ROW_HEIGHT * len(table))


def _heat_map(values: np.ndarray, unit: str, *, diverging: bool) -> go.Figure:
    """Draw layers downwards and heads across; shares from 0 to 1, other values symmetric about 0."""
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
            zmax=largest if diverging else 1.0,
            colorbar={"title": {"text": unit, "side": "right"}, "thickness": 14},
            texttemplate="%{z:.2f}" if values.size <= 200 else None,
            hovertemplate="L%{y}H%{x}: %{z:.4f}<extra></extra>",
            xgap=1,
            ygap=1,
        )
    )
    figure.update_xaxes(title="head", dtick=1 if n_heads <= 40 else None, showline=False, ticks="")
    figure.update_yaxes(title="layer", autorange="reversed", dtick=1 if n_layers <= 40 else None, ticks="")
    return _styled(figure, 150 + max(6, min(34, 700 // n_layers)) * n_layers)


def _layer_by_head(table: pd.DataFrame, value: str) -> np.ndarray:
    grid = np.full((int(table["layer"].max()) + 1, int(table["head"].max()) + 1), np.nan)
    grid[table["layer"].to_numpy(int), table["head"].to_numpy(int)] = table[value].to_numpy(float)
    return grid


def _residual(result: Result) -> Iterator[Plot]:
    table = result.table
    yield Plot(
        "Share of the residual stream by component",
        "Projection of what each component writes onto the residual stream, as a share of its length; "
        "the shares add up to 1.",
        _bars(table, "mean_share", "share"),
    )
    yield Plot(
        "Length of what each component writes",
        "Mean Euclidean norm over all tokens.",
        _bars(table, "mean_norm", "norm"),
    )


def _attribution(result: Result) -> Iterator[Plot]:
    table = result.table
    heads = table[table["kind"] == "head"]
    components = table[~table["kind"].isin(["head", "attn_bias"])]
    yield Plot(
        "Logit of the correct next token, by component",
        "Direct contribution of each component, mean over all tokens; whiskers are one standard deviation "
        "over tokens. The bars add up to the mean logit.",
        _bars(components, "mean", "logit", error="std"),
    )
    if len(heads):
        yield Plot(
            "Logit of the correct next token, by head",
            "Direct contribution of each attention head, mean over all tokens.",
            _heat_map(_layer_by_head(heads, "mean"), "logit", diverging=True),
        )


def _heads(result: Result) -> Iterator[Plot]:
    wanted = {
        "previous_token_head": ("Previous-token heads", "the token before"),
        "duplicate_token_head": ("Duplicate-token heads", "earlier tokens equal to the current one"),
        "induction_head": ("Induction heads", "tokens that came after earlier ones equal to the current one"),
    }
    for pattern, table in result.table.groupby("pattern", sort=False):
        title, where = wanted[str(pattern)]
        best = table.iloc[0]
        yield Plot(
            title,
            f"Share of each head's attention on {where}, over queries that have such a key. "
            f"Highest: L{best['layer']}H{best['head']} with {best['matched']:.3f}.",
            _heat_map(_layer_by_head(table, "matched"), "share", diverging=False),
        )


_MAKERS: dict[str, Callable[[Result], Iterator[Plot]]] = {
    "metrics": _metrics,
    "attribution": _attribution,
    "heads": _heads,
    "residual": _residual,
}
"""By kind of result, in the order of the page."""


def plots_of(results: Iterable[Result]) -> Iterator[Plot]:
    """Yield the figures of all results of a corpus, kind by kind."""
    by_kind = sorted(results, key=lambda result: list(_MAKERS).index(result.record.kind))
    for result in by_kind:
        yield from _MAKERS[result.record.kind](result)

"""Figures of what writes to the residual stream and to logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import xarray as xr
from markupsafe import escape

from actpipe.report.drawing import BLUE, Plot, bars, heat_map, layer_by_head, styled
from actpipe.stores.results import Result

_PARTS = ("head", "attn_bias", "neuron", "other_neurons", "mlp_bias")
"""Kinds of columns that others are made of."""
_MOST_SHOWN = 30
"""Neurons, and groups, that a figure shows."""
_MOST_LABELLED = 200
"""Cells of a map whose numbers are written in."""
_GROUPS = {
    "value": ("by {by}", "value"),
    "document": ("by document", "document_id"),
    "token": ("by token", "token_text"),
    "target": ("by target", "target_text"),
}


def _attribution(result: Result) -> Iterator[Plot]:
    table = result.table
    whose = str(result.record.summary.get("logit", "the correct next token"))
    if "rank" in table:
        components = table[~table["kind"].isin(_PARTS)]
        grid = components.pivot_table("mean", "rank", "component", sort=False)
        yield Plot(
            f"Logits of {whose}, by component and rank",
            "Direct contribution of each component to the logit of the token of each rank, mean over all tokens. "
            "The cells of a line add up to the mean logit.",
            _map(grid.to_numpy(), list(grid.columns), [f"rank {rank}" for rank in grid.index], "logit"),
        )
        table, whose = table[table["rank"] == 0], f"{whose}, the first of them"
    yield from _by_part(table, whose)
    for axis in _GROUPS:
        if f"mean_by_{axis}" in _dataset(result):
            yield _by_group(result, axis, whose)


def _dataset(result: Result) -> xr.Dataset:
    return xr.Dataset() if result.record.dataset is None else result.dataset


def _by_part(table: pd.DataFrame, whose: str) -> Iterator[Plot]:
    """Draw components, heads and neurons."""
    components = table[~table["kind"].isin(_PARTS)]
    if len(components):
        yield Plot(
            f"Logit of {whose}, by component",
            "Direct contribution of each component, mean over all tokens; whiskers are one standard deviation "
            "over tokens. The bars add up to the mean logit.",
            bars(components, "mean", "logit", error="std"),
        )
    heads = table[table["kind"] == "head"]
    if len(heads):
        yield Plot(
            f"Logit of {whose}, by head",
            "Direct contribution of each attention head, mean over all tokens.",
            heat_map(layer_by_head(heads, "mean"), "logit", diverging=True),
        )
    neurons = table[table["kind"] == "neuron"]
    if len(neurons):
        neurons = neurons.sort_values("mean_modulus", ascending=False, kind="stable")
        left = {kind: table.loc[table["kind"] == kind, "mean"].sum() for kind in ("other_neurons", "mlp_bias")}
        yield Plot(
            f"Logit of {whose}, by neuron",
            f"Direct contribution of the {min(len(neurons), _MOST_SHOWN)} neurons with the largest mean modulus, mean "
            f"over all tokens; whiskers are one standard deviation over tokens. All neurons that are not listed add "
            f"{left['other_neurons']:+.3f}, and biases {left['mlp_bias']:+.3f}.",
            bars(neurons.head(_MOST_SHOWN), "mean", "logit", error="std"),
        )


def _by_group(result: Result, axis: str, whose: str) -> Plot:
    """Draw the means of the groups with most rows, the largest first."""
    data, kinds = result.dataset, dict(zip(result.table["component"], result.table["kind"], strict=True))
    title, label = _GROUPS[axis]
    mean, count = data[f"mean_by_{axis}"], data[f"count_by_{axis}"]
    if "rank" in mean.dims:
        mean, count = mean.isel(rank=0), count.isel(rank=0)
    others = data[axis].values == -1 if axis in ("token", "target") else np.zeros(len(count), bool)
    order = np.lexsort((-count.values, others))
    order = order[count.values[order] > 0]
    columns = [n for n, name in enumerate(data["component"].values) if kinds[str(name)] not in _PARTS]
    names = [
        _cut(str(data[label].values[n]), "''" if axis == "value" else f"{axis} {data[axis].values[n]}")
        for n in order[:_MOST_SHOWN]
    ]
    which = "those" if len(names) == len(order) else f"the {len(names)} of {len(order):,}"
    by = result.record.settings.get("by")
    by = by["column"] if isinstance(by, dict) else by
    return Plot(
        f"Logit of {whose}, by component, {title.format(by=by)}",
        f"Mean direct contribution over the tokens of each group, {which} with most tokens first, their number in "
        "brackets. The cells of a line add up to its mean logit.",
        _map(
            mean.values[order[:_MOST_SHOWN]][:, columns],
            [str(name) for name in data["component"].values[columns]],
            [f"{name} ({number:,})" for name, number in zip(names, count.values[order], strict=False)],
            "logit",
        ),
    )


def _cut(text: str, otherwise: str) -> str:
    """Return a label that an axis has room for, escaped; spaces at its ends are shown."""
    shown = text if text == text.strip() and text else repr(text) if text else otherwise
    return str(escape(shown if len(shown) <= 24 else f"{shown[:23]}\u2026"))


def _map(values: np.ndarray, across: Sequence[str], down: Sequence[str], unit: str) -> go.Figure:
    """Draw a map of groups downwards and components across, symmetric about 0."""
    largest = float(np.nanmax(np.abs(values), initial=1e-9))
    figure = go.Figure(
        go.Heatmap(
            z=values.astype(np.float32),
            x=list(across),
            y=[f"{number}" for number in range(len(down))],
            customdata=np.broadcast_to(np.array(down, dtype=object)[:, None], values.shape),
            colorscale="RdBu",
            reversescale=True,
            zmin=-largest,
            zmax=largest,
            colorbar={"title": {"text": unit, "side": "right"}, "thickness": 14},
            texttemplate="%{z:.2f}" if values.size <= _MOST_LABELLED else None,
            hovertemplate="%{customdata}, %{x}: %{z:.4f}<extra></extra>",
            xgap=1,
            ygap=1,
        )
    )
    figure.update_xaxes(type="category", ticks="", showline=False, automargin=True)
    figure.update_yaxes(
        type="category",
        autorange="reversed",
        ticks="",
        automargin=True,
        tickvals=[f"{number}" for number in range(len(down))],
        ticktext=list(down),
    )
    return styled(figure, 170 + 26 * len(down))


def _residual(result: Result) -> Iterator[Plot]:
    table = result.table
    if (table["kind"] == "resid").all():
        yield from _streams(result)
        return
    heads, others = table[table["kind"] == "head"], table[table["kind"] != "head"]
    whole = "worst_sum_error" in result.record.summary
    adds_up = "; the shares of all parts add up to 1." if whole else "."
    measures = {
        "mean_share": (
            "Share of the residual stream",
            f"Projection of what each writes onto the residual stream, as a share of its length{adds_up}",
            "share",
        ),
        "variance_share": (
            "Share of the residual stream's variance",
            f"Covariance of what each writes with the residual stream, as a share of its variance{adds_up}",
            "share",
        ),
        "mean_norm": ("Length of what is written", "Mean Euclidean norm over all tokens.", "norm"),
    }
    for measure, (title, caption, unit) in measures.items():
        if measure not in table:
            continue
        yield Plot(f"{title} by component", caption, bars(others, measure, unit))
        if len(heads):
            grid = layer_by_head(heads, measure)
            yield Plot(f"{title} by head", caption, heat_map(grid, unit, diverging=True))


def _streams(result: Result) -> Iterator[Plot]:
    """Draw the stream at each layer."""
    last = f"the last of them, {result.record.summary['stream']}"
    for measure, title, caption, unit in (
        ("mean_norm", "Length of the residual stream", "Mean Euclidean norm over all tokens.", "norm"),
        ("mean_cosine", "Cosine with the last residual stream", f"Mean cosine with {last}, over all tokens.", "cosine"),
    ):
        figure = go.Figure(
            go.Scatter(x=result.table["component"], y=result.table[measure], mode="lines+markers", line={"color": BLUE})
        )
        figure.update_xaxes(title="residual stream", type="category")
        figure.update_yaxes(title=unit, rangemode="tozero")
        yield Plot(f"{title} by layer", caption, styled(figure, 320))


def _named(make: Callable[[Result], Iterator[Plot]], stage: str) -> Callable[[Result], Iterator[Plot]]:
    """Say in titles which result it is, where that does not have the stage's name."""

    def figures(result: Result) -> Iterator[Plot]:
        name = "" if result.record.name == stage else f": {result.record.name}"
        return (replace(plot, title=f"{plot.title}{name}") for plot in make(result))

    return figures


ATTRIBUTION_MAKERS: dict[str, Callable[[Result], Iterator[Plot]]] = {
    "attribution": _named(_attribution, "attribute_logits"),
    "residual": _named(_residual, "decompose_residual"),
}
"""By kind of result."""

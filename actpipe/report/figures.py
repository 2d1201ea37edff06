"""One function per kind of result: from numbers to figures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import plotly.graph_objects as go

from actpipe.records import Finding
from actpipe.report.attribution_figures import ATTRIBUTION_MAKERS
from actpipe.report.direction_figures import DIRECTION_MAKERS
from actpipe.report.drawing import BLUE, GREY, Plot, styled
from actpipe.report.eval_figures import EVAL_MAKERS, metric_groups
from actpipe.report.head_figures import HEAD_MAKERS
from actpipe.report.lens_figures import LENS_MAKERS
from actpipe.report.weight_figures import WEIGHT_MAKERS
from actpipe.stores.results import Result

_MOST_LEGEND = 14
_METRICS = {
    "loss": ("Loss by position", "nats per token"),
    "entropy": ("Entropy of the prediction by position", "nats"),
    "correct": ("Share of right top predictions by position", "share"),
}


def _metrics(result: Result) -> Iterator[Plot | Finding]:
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
        figure.add_scatter(x=position, y=mean, mode="lines", line={"color": BLUE, "width": 2}, showlegend=False)
        overall = float(result.record.summary[metric])
        figure.add_hline(y=overall, line={"color": GREY, "dash": "dot"})
        figure.update_xaxes(title="position in the sequence")
        figure.update_yaxes(title=unit, rangemode="tozero")
        caption = (
            f"Mean over all tokens at a position, with its 95 % interval. Dotted: over all positions, {overall:.3f}."
        )
        yield Plot(title, caption, styled(figure, 340))
    yield from metric_groups(result)


def _reduction(result: Result) -> Iterator[Plot]:
    data = result.dataset
    hooks = [str(name).removesuffix(".variance") for name in data.data_vars if str(name).endswith(".variance")]
    if hooks:
        spread = [float(np.sqrt(data[f"{hook}.variance"].values.mean())) for hook in hooks]
        mean = [float(np.sqrt((data[f"{hook}.mean"].values ** 2).mean())) for hook in hooks]
        figure = go.Figure()
        figure.add_bar(y=hooks, x=spread, orientation="h", name="deviation", marker_color=BLUE)
        figure.add_bar(y=hooks, x=mean, orientation="h", name="mean", marker_color=GREY)
        figure.update_yaxes(autorange="reversed", automargin=True, type="category")
        figure.update_xaxes(title="root mean square over channels")
        yield Plot(
            f"Size of activations: {result.record.name}",
            "Standard deviation over tokens, and mean over tokens, of a typical channel.",
            styled(figure, 150 + 34 * len(hooks)),
        )
    if any(str(name).endswith(".rms") for name in data.data_vars):
        yield _channels(result, hooks)
    for name in data.data_vars:
        if str(name).endswith(".quantile"):
            hook = str(name).removesuffix(".quantile")
            figure = go.Figure(go.Scatter(x=data[name].values, y=data["level"].values, line={"color": BLUE}))
            figure.update_xaxes(title="value")
            figure.update_yaxes(title="share of values below", range=[0, 1])
            yield Plot(f"Distribution: {hook}", "Quantiles over all tokens and channels.", styled(figure, 320))


def _channels(result: Result, hooks: Sequence[str]) -> Plot:
    figure = go.Figure()
    for number, hook in enumerate(hooks):
        rms = result.dataset[f"{hook}.rms"].values.ravel()
        order = np.argsort(-rms, kind="stable")
        shade = 0.25 + 0.75 * (number + 1) / len(hooks)
        figure.add_scatter(
            x=np.arange(1, len(rms) + 1),
            y=rms[order],
            customdata=order,
            name=hook,
            mode="lines",
            line={"color": f"rgba(47,109,181,{shade:.2f})", "width": 2},
            hovertemplate="channel %{customdata}: %{y:.4g}<extra>" + hook + "</extra>",
        )
    figure.update_xaxes(title="channels, the largest first", type="log")
    figure.update_yaxes(title="root mean square over tokens", rangemode="tozero")
    figure.update_layout(showlegend=1 < len(hooks) <= _MOST_LEGEND)
    caption = "A few channels far above the others are outliers, which hold most of the length of rows."
    return Plot(f"Size of channels: {result.record.name}", caption, styled(figure, 340))


Shown = Plot | Finding
"""What a result shows: a figure, or a table of text."""

MAKERS: dict[str, Callable[[Result], Iterator[Shown]]] = {
    "metrics": _metrics,
    "attribution": ATTRIBUTION_MAKERS["attribution"],
    **HEAD_MAKERS,
    "residual": ATTRIBUTION_MAKERS["residual"],
    "reduction": _reduction,
    **LENS_MAKERS,
    **EVAL_MAKERS,
    **WEIGHT_MAKERS,
    **DIRECTION_MAKERS,
}
"""By kind of result, in the order of the page."""


def shown_of(results: Iterable[Result]) -> Iterator[Shown]:
    """Yield what the results of a corpus show, kind by kind; a kind of another package shows nothing here."""
    known = [result for result in results if result.record.kind in MAKERS]
    for result in sorted(known, key=lambda result: list(MAKERS).index(result.record.kind)):
        yield from MAKERS[result.record.kind](result)

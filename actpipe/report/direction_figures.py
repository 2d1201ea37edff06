"""Figures of neurons, directions, and the geometry of activations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import xarray as xr
from markupsafe import Markup, escape

from actpipe.records import Finding
from actpipe.report.drawing import BLUE, GREEN, GREY, MOST_LABELLED, ORANGE, Plot, position_lines, styled
from actpipe.stores.results import Result


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
            texttemplate="%{z:.2f}" if len(names) <= MOST_LABELLED else None,
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
    curves = dict(zip(names, data["norm"].values[there].T, strict=True))
    return position_lines(data["position"].values[there], curves, "norm")


def _examples(result: Result) -> Iterator[Plot | Finding]:
    data = result.dataset.drop_vars("mean_by_token", errors="ignore").load()
    yield Plot(
        f"How often units are active: {result.record.name}",
        "Each dot is a unit: the share of tokens at which it is above zero, and its largest value.",
        _activity(data),
    )
    n_shown = result.record.settings.get("shown", 0)
    spread = np.where(data["std"].values > 0, data["std"].values, np.inf)
    order = np.argsort(-(data["max"].values - data["mean"].values) / spread, kind="stable")
    table = result.table
    for unit in order[: n_shown if isinstance(n_shown, int) else 0]:
        one = data.isel(unit=int(unit))
        yield _excerpts(one, table[(table["hook"] == str(one["hook"].values)) & (table["unit"] == int(one["number"]))])


def _activity(data: xr.Dataset) -> go.Figure:
    figure = go.Figure()
    hooks = np.array([str(hook) for hook in data["hook"].values], dtype=object)
    for number, hook in enumerate(dict.fromkeys(hooks)):
        these = np.flatnonzero(hooks == hook)
        figure.add_scatter(
            x=data["density"].values[these],
            y=data["max"].values[these],
            text=[f"{short_name(hook)} {label}" for label in data["label"].values[these]],
            name=short_name(hook),
            mode="markers",
            marker={"size": 6, "opacity": 0.7, "color": (BLUE, ORANGE, GREEN, GREY)[number % 4]},
            hovertemplate="%{text}: above zero %{x:.3%}, at most %{y:.3f}<extra></extra>",
        )
    figure.update_xaxes(title="share of tokens above zero", tickformat="~%", range=[-0.03, 1.03])
    figure.update_yaxes(title="largest value")
    return styled(figure, 360)


def _directions(result: Result) -> Iterator[Plot | Finding]:
    data, table, name = result.dataset.load(), result.table, result.record.name
    label = result.record.settings.get("label", "")
    names = [short_name(str(hook)) for hook in data["hook"].values]
    pool = result.record.settings.get("pool")
    samples = {"mean": "documents (means of their tokens)", "last": "documents (their last tokens)"}
    what_of = samples.get(str(pool), "tokens of documents")
    held_out = f"{int(table['n_validation'].iloc[0]):,} {what_of} that no fit saw"
    for what, title, unit, chance in (
        ("accuracy", "Accuracy of probes", "share right", ("majority", "largest class")),
        ("auc", "Ranking by probes", "AUC", ("mean_difference_auc", "mean difference")),
    ):
        series = [("probe", table[what].to_numpy()), (chance[1], table[chance[0]].to_numpy())]
        if result.record.settings.get("control"):
            series.append(("shuffled labels", table[f"control_{what}"].to_numpy()))
        caption = f"Probes of {label!r}, {data.sizes['class']} classes, on {held_out}; AUC is the mean over classes."
        yield Plot(f"{title}: {name}", caption, by_layer(names, series, unit))
    yield Plot(
        f"Calibration of probes: {name}",
        f"Share of right predictions by confidence, on {held_out}; dotted is perfect. Expected calibration error: "
        + ", ".join(f"{one} {error:.3f}" for one, error in zip(names, table["calibration_error"], strict=True))
        + ".",
        _reliability(data, names),
    )
    for method, what in (("probe", "probes"), ("mean_difference", "mean differences"), ("pca", "principal axes")):
        if f"cosine_{method}" in data and len(names) > 1:
            values = data[f"cosine_{method}"].values
            mean = "Cosine without its sign, mean over components" if method == "pca" else "Cosine, mean over classes"
            figure = matrix_map(values.mean(0), names, "cosine", diverging=method != "pca")
            yield Plot(f"Similarity of {what}: {name}", f"{mean}.", figure)


def _reliability(data: xr.Dataset, names: Sequence[str]) -> go.Figure:
    figure = go.Figure()
    figure.add_scatter(x=[0, 1], y=[0, 1], mode="lines", line={"color": GREY, "dash": "dot"}, showlegend=False)
    for number, name in enumerate(names):
        count = data["bin_count"].values[number]
        there = np.flatnonzero(count)
        shade = 0.25 + 0.75 * (number + 1) / len(names)
        figure.add_scatter(
            x=data["bin_confidence"].values[number, there],
            y=data["bin_accuracy"].values[number, there],
            customdata=count[there],
            name=name,
            mode="lines+markers",
            marker={"size": 4 + 12 * np.sqrt(count[there] / count.max())},
            line={"color": f"rgba(47,109,181,{shade:.2f})", "width": 2},
            hovertemplate="confidence %{x:.3f}, right %{y:.3f}, %{customdata:,} samples<extra></extra>",
        )
    figure.update_xaxes(title="confidence", range=[0, 1.02])
    figure.update_yaxes(title="share right", range=[0, 1.02])
    return styled(figure, 380)


def _excerpts(unit: xr.Dataset, table: pd.DataFrame) -> Finding:
    """Return a table of a unit's examples, the token marked; all text is escaped."""
    rows = tuple(
        (
            f"{row.value:.3f}" if row.end == "highest" else f"{row.value:.3f}, lowest",
            str(row.document),
            marked(str(row.before), str(row.token), str(row.after)),
        )
        for row in table.assign(document=table["document"].astype("string").fillna("")).itertuples()
    )
    note = f"Above zero at {float(unit['density']):.2%} of tokens, mean {float(unit['mean']):.4g}."
    if "high_token_text" in unit:
        for end, what in (("high", "Highest"), ("low", "Lowest")):
            texts = [repr(str(text)) for text in unit[f"{end}_token_text"].values if isinstance(text, str)]
            note += f" {what} means by token: {', '.join(texts)}."
    title = f"{short_name(str(unit['hook'].values))} {unit['label'].values}"
    return Finding(title, ("value", "document", "where"), rows, note=note)


def marked(before: str, token: str, after: str) -> Markup:
    """Return text as HTML, escaped, with one token of it marked and line ends shown."""
    left, middle, right = (escape(text.replace("\n", "\u23ce")) for text in (before, token, after))
    return Markup("{}<mark>{}</mark>{}").format(left, middle, right)


DIRECTION_MAKERS: dict[str, Callable[[Result], Iterator[Plot | Finding]]] = {
    "directions": _directions,
    "examples": _examples,
    "geometry": _geometry,
}
"""By kind of result."""

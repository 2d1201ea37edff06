"""Figures and tables of losses, evaluations and comparisons."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from actpipe.records import Finding
from actpipe.report.drawing import BLUE, GREY, Plot, styled
from actpipe.stores.results import Result

_SHOWN = 30
_EXCERPT = 160
"""Characters of a document that the page shows."""


def metric_groups(result: Result) -> Iterator[Plot | Finding]:
    """Yield what metrics are by document, token and label: the loss, or else the first metric."""
    data = result.dataset
    metric = str(data["metric"].values[0])
    one = data.sel(metric=metric)
    for name in map(str, one.dims):
        if name.startswith("column."):
            yield _by_label(one, name, metric)
    if "document" in one.dims:
        yield _spread_over_documents(one["document.mean"].values, metric)
        yield _documents(result, metric)
    if "token" in one.dims:
        yield _tokens(one, metric)


def _by_label(one: object, name: str, metric: str) -> Plot:
    count, mean, error = (one[f"{name}.{what}"].values for what in ("count", "mean", "standard_error"))  # type: ignore[index]
    order = np.argsort(-count, kind="stable")[:_SHOWN]
    known = one[name].values.tolist()  # type: ignore[index]
    figure = _whiskers([str(known[i]) or "(empty)" for i in order], mean[order], 1.96 * error[order])
    figure.update_xaxes(title=metric)
    column = name.removeprefix("column.")
    return Plot(
        f"{metric.capitalize()} by {column}",
        f"Mean over all tokens of the documents, with its 95 % interval; "
        f"the {len(order)} largest of {len(known)} groups, the largest on top.",
        styled(figure, 130 + 22 * len(order)),
    )


def _whiskers(names: list[str], values: np.ndarray, errors: np.ndarray | dict[str, object]) -> go.Figure:
    """Draw points with whiskers, the first on top."""
    arrays: dict[str, object] = errors if isinstance(errors, dict) else {"array": errors}
    figure = go.Figure(
        go.Scatter(
            y=names,
            x=values,
            mode="markers",
            marker={"color": BLUE, "size": 8},
            error_x={**arrays, "color": GREY, "thickness": 1.5, "width": 3},
            hovertemplate="%{y}: %{x:.4f}<extra></extra>",
        )
    )
    figure.update_yaxes(autorange="reversed", automargin=True, type="category")
    return figure


def _spread_over_documents(mean: np.ndarray, metric: str) -> Plot:
    there = mean[~np.isnan(mean)]
    count, edges = np.histogram(there, bins=min(60, max(5, int(np.sqrt(len(there))))))
    figure = go.Figure(
        go.Bar(x=(edges[1:] + edges[:-1]) / 2, y=count, width=np.diff(edges), marker_color=BLUE, name="documents")
    )
    if len(there):
        figure.add_vline(x=float(np.median(there)), line={"color": GREY, "dash": "dot"})
    figure.update_xaxes(title=f"mean {metric} of a document")
    figure.update_yaxes(title="documents")
    caption = f"{len(there):,} documents; dotted: their median."
    return Plot(f"{metric.capitalize()} by document", caption, styled(figure, 320))


def _documents(result: Result, metric: str) -> Finding:
    rows = tuple(
        (row["end"], f"{row[metric]:.3f}", f"{row['n_tokens']:,}", row["id"], row["excerpt"][:_EXCERPT])
        for _, row in result.table.iterrows()
    )
    columns = ("mean", metric, "tokens", "document", "begins with")
    return Finding(f"Documents with the highest and the lowest {metric}", columns, rows)


def _tokens(one: object, metric: str) -> Finding:
    count, mean, error = (one[f"token.{what}"].values for what in ("count", "mean", "standard_error"))  # type: ignore[index]
    ids, texts = one["token"].values, one["token_text"].values  # type: ignore[index]
    order = np.argsort(-np.nan_to_num(count * mean), kind="stable")[:_SHOWN]
    rows = tuple(
        (str(ids[i]), repr(str(texts[i])), f"{count[i]:,}", f"{mean[i]:.3f}", f"{error[i]:.3f}") for i in order
    )
    title = f"{metric.capitalize()} after each token: the {len(order)} with the largest sums"
    return Finding(title, ("id", "token", "count", "mean", "standard error"), rows)


def _comparison(result: Result) -> Iterator[Plot | Finding]:
    table, settings = result.table, result.record.settings
    share = f"{float(str(settings['confidence'])):.0%}"
    metrics = table[table["kind"] == "metric"]
    drawn = f"whiskers: {share} interval by drawing whole {settings['cluster']}s {settings['n_resamples']} times"
    against = result.dataset.attrs["against"]
    if len(metrics):
        figure = _whiskers(metrics["name"].tolist(), metrics["estimate"].to_numpy(), _reach(metrics))
        figure.add_vline(x=0, line={"color": GREY, "dash": "dot"})
        figure.update_xaxes(title="this minus the other")
        title = f"Paired differences of metrics: {result.record.name}"
        yield Plot(title, f"Against {against}; mean over tokens, {drawn}.", styled(figure, 150 + 34 * len(metrics)))
    for statistic, title in (("relative_error", "Relative error"), ("cosine", "Cosine")):
        hooks = table[table["statistic"] == statistic]
        if len(hooks):
            figure = _whiskers(hooks["name"].tolist(), hooks["estimate"].to_numpy(), _reach(hooks))
            figure.update_xaxes(title=title.lower())
            caption = f"Each token's activation against that of {against}; mean over tokens, {drawn}."
            yield Plot(f"{title} by hook: {result.record.name}", caption, styled(figure, 150 + 22 * len(hooks)))


def _reach(table: pd.DataFrame) -> dict[str, object]:
    """Return whiskers from the bootstrap's interval."""
    above, below = table["high"] - table["estimate"], table["estimate"] - table["low"]
    return {"array": above.to_numpy(), "arrayminus": below.to_numpy(), "symmetric": False}


def _evaluation(result: Result) -> Iterator[Plot | Finding]:
    data, table = result.dataset, result.table
    if "induction_loss" in data:
        loss = data["induction_loss"].values
        mean, copy = loss.mean(0), (loss.shape[1] + 1) // 2
        figure = go.Figure(go.Scatter(x=np.arange(1, len(mean) + 1), y=mean, line={"color": BLUE, "width": 2}))
        figure.add_vline(x=copy, line={"color": GREY, "dash": "dot"})
        figure.update_xaxes(title="position of the predicted token")
        figure.update_yaxes(title="nats", rangemode="tozero")
        whole = table[(table["task"] == "induction") & (table["measure"] == "loss")]["mean"].iloc[0]
        caption = f"Mean over {len(loss)} sequences; dotted: where the second copy begins. Its mean: {whole:.3f}."
        yield Plot("Loss on random tokens repeated", caption, styled(figure, 340))
    names = table[(table["task"] == "ioi") & (table["n"] > 0)]
    if len(names):
        yield _by_template(names)


def _by_template(names: pd.DataFrame) -> Finding:
    wide = {measure: rows.set_index("group") for measure, rows in names.groupby("measure")}
    difference, right = wide["logit_difference"], wide["accuracy"]["mean"].tolist()
    rows = tuple(
        (
            str(group),
            f"{row['n']:,}",
            f"{row['mean']:.3f}",
            f"{row['standard_error']:.3f}",
            f"{accuracy:.1%}",
        )
        for (group, row), accuracy in zip(difference.iterrows(), right, strict=True)
    )
    columns = ("template", "prompts", "logit difference", "standard error", "right")
    return Finding("Indirect object identification", columns, rows)


EVAL_MAKERS: dict[str, Callable[[Result], Iterator[Plot | Finding]]] = {
    "comparison": _comparison,
    "evaluation": _evaluation,
}
"""By kind of result."""

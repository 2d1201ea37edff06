"""Figures of attention heads: scores by layer and head, what attention looks like, and who composes with whom."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from actpipe.records import Finding
from actpipe.report.drawing import Plot, heat_map, layer_by_head, position_lines, styled
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


_PATTERNS = {
    "previous_token_head": ("Previous-token heads", "the token before"),
    "duplicate_token_head": ("Duplicate-token heads", "earlier tokens equal to the current one"),
    "induction_head": ("Induction heads", "tokens that came after earlier ones equal to the current one"),
    "duplicate_stripe": ("Duplicate stripe", "the same token one period before"),
    "induction_stripe": ("Induction stripe", "the token after the same one, one period before"),
}
_STATISTICS = {
    "entropy": (
        "Entropy of attention",
        "Mean entropy of each query's attention, in nats: 0 where it is all on one key",
    ),
    "distance": ("Distance of attention", "Mean distance from a query to what it attends to, in tokens"),
    "first": ("Attention on the first position", "Mean attention on the first position of the model input"),
    "current": ("Attention on the token itself", "Mean attention of a token on itself"),
    "largest": ("Largest attention", "Mean of the largest attention of each query on any one key"),
}
_UNITS = {"entropy": "nats", "distance": "tokens"}
_RANKED = 10


def _heads(result: Result) -> Iterator[Plot | Finding]:
    for name, table in result.table.groupby("pattern", sort=False):
        title, where = _PATTERNS.get(str(name), (f"Pattern {name}", "what the pattern says"))
        caption = f"Share of each head's attention on {where}, over queries that have such a key."
        caption += f" {_highest(table, 'matched')}"
        if "uniform" in table:
            caption += f" Attention spread evenly over what a query sees has {table['uniform'].iloc[0]:.3f}."
        yield Plot(title, caption, heat_map(layer_by_head(table, "matched"), "share", diverging=False))
        if "uniform" in table:
            yield _ranking(table, title, ("matched", "mul", "abs"))


def _highest(table: pd.DataFrame, column: str) -> str:
    """Say which head has the highest score."""
    if table[column].isna().all():
        return "Nothing was measured."
    best = table.nlargest(1, column).iloc[0]
    return f"Highest: L{int(best['layer'])}H{int(best['head'])} with {best[column]:.3f}."


def _ranking(table: pd.DataFrame, title: str, columns: Sequence[str], *, smallest: bool = False) -> Finding:
    """Return the heads with the highest score, or the smallest, by the first of some columns."""
    best = table.nsmallest(_RANKED, columns[0]) if smallest else table.nlargest(_RANKED, columns[0])
    rows = tuple(
        (str(rank), f"L{int(row['layer'])}H{int(row['head'])}", *(f"{row[column]:.3f}" for column in columns))
        for rank, (_, row) in enumerate(best.iterrows(), 1)
    )
    note = (
        f"The first {len(rows)} of {len(table)}; all are in the table of the result." if len(table) > len(rows) else ""
    )
    return Finding(f"{title}, ranked", ("", "head", *columns), rows, note)


def _attention(result: Result) -> Iterator[Plot | Finding]:
    table, data = result.table, result.dataset
    for name, (title, caption) in _STATISTICS.items():
        unit = _UNITS.get(name, "share")
        figure = heat_map(layer_by_head(table, name), unit, diverging=False, shares=unit == "share")
        yield Plot(title, f"{caption}. {_highest(table, name)}", figure)
    yield _ranking(table, "Most focused heads", tuple(_STATISTICS), smallest=True)
    if "mean_by_position" not in data:
        return
    there = np.flatnonzero(data["count"].values)
    for name in ("entropy", "first"):
        values = data["mean_by_position"].sel(statistic=name).values[there]
        curves = {f"layer {layer}": np.nanmean(values[:, n], -1) for n, layer in enumerate(data["layer"].values)}
        title, caption = _STATISTICS[name]
        figure = position_lines(there, curves, _UNITS.get(name, "share"))
        yield Plot(f"{title} by position", f"{caption}, mean over the heads of a layer.", figure)


def _copying(result: Result) -> Iterator[Plot | Finding]:
    table = result.table
    what = "the logit of the token it attends to is above the vocabulary's mean, by its own output"
    yield Plot(
        "Copying heads",
        f"By how many standard deviations over the vocabulary {what}. {_highest(table, 'standardized')}",
        heat_map(layer_by_head(table, "standardized"), "SD", diverging=True),
    )
    yield Plot(
        "Copying heads, in logits",
        f"By how much {what}, in nats. {_highest(table, 'raised')}",
        heat_map(layer_by_head(table, "raised"), "nats", diverging=True),
    )
    yield _ranking(table, "Copying heads", ("standardized", "raised"))


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


HEAD_MAKERS: dict[str, Callable[[Result], Iterator[Plot | Finding]]] = {
    "heads": _heads,
    "attention": _attention,
    "copying": _copying,
    "weights": _weights,
}
"""By kind of result."""

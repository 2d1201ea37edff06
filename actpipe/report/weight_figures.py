"""Figures of weights: singular values, and the tokens that singular vectors point to."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from actpipe.records import Finding
from actpipe.report.drawing import Plot, styled
from actpipe.stores.results import Result

_MATRICES = ("OV", "QK", "W_in", "W_out")
_MOST_LEGEND = 14
_TOKENS = 8
"""Tokens of either end in a line of the report."""
_VOCABULARY = {"W_U": "the unembedding W_U", "W_E": "the transposed embedding W_E"}


def _singular_vectors(result: Result) -> Iterator[Plot | Finding]:
    settings, table = result.record.settings, result.table
    n_shown = settings["shown"]
    for which in _MATRICES:
        if f"{which}_singular_value" not in result.dataset:
            continue
        yield _spectrum(result, which)
        if isinstance(n_shown, int) and n_shown:
            where = _VOCABULARY[str(settings["vocabulary"])]
            yield _tokens(table[table["matrix"] == which], which, n_shown, where)


def _spectrum(result: Result, which: str) -> Plot:
    values = result.dataset[f"{which}_singular_value"]
    heads = "head" in values.dims
    mean = values.mean("head") if heads else values
    n_layers = mean.sizes["layer"]
    figure = go.Figure()
    for number, layer in enumerate(mean["layer"].values):
        one = mean.values[number]
        shade = 0.25 + 0.75 * (number + 1) / n_layers
        figure.add_scatter(
            x=np.arange(len(one)),
            y=one,
            name=f"layer {layer}",
            mode="lines",
            line={"color": f"rgba(47,109,181,{shade:.2f})", "width": 2},
        )
    figure.update_xaxes(title="number of the singular value")
    figure.update_yaxes(title="singular value", rangemode="tozero")
    figure.update_layout(showlegend=1 < n_layers <= _MOST_LEGEND)
    caption = f"All singular values of {which}, the largest first{'; means over heads' if heads else ''}."
    return Plot(f"Singular values of {which}: {result.record.name}", caption, styled(figure, 320))


def _tokens(table: pd.DataFrame, which: str, n_shown: int, where: str) -> Finding:
    """Return a table of the vectors with a token the most standard deviations out; all text is escaped by the page."""
    far = table["deviations"].abs().groupby(table["label"], sort=False).max()
    rows = []
    for label in far.sort_values(ascending=False, kind="stable").index[:n_shown]:
        one = table[table["label"] == label]
        ends = (_listed(one[one["end"] == end].head(_TOKENS)) for end in ("highest", "lowest"))
        rows.append((str(label), f"{one['singular_value'].iloc[0]:.3f}", f"{one['share'].iloc[0]:.1%}", *ends))
    return Finding(
        f"Singular vectors of {which} as tokens",
        ("vector", "singular value", "share", "highest", "lowest"),
        tuple(rows),
        note=f"Scores are those of {where}; which end is which is a convention. Share: of the squared norm.",
    )


def _listed(lines: pd.DataFrame) -> str:
    return ", ".join(f"{_shown(str(line.token), str(line.token_id))} {line.value:+.2f}" for line in lines.itertuples())


def _shown(text: str, token_id: str) -> str:
    """Return a token as it is read; one that is a piece of a character, by its id."""
    return f"id {token_id}" if "\N{REPLACEMENT CHARACTER}" in text else repr(text)


WEIGHT_MAKERS: dict[str, Callable[[Result], Iterator[Plot | Finding]]] = {"singular-vectors": _singular_vectors}
"""By kind of result."""

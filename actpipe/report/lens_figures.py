"""Figures of what each layer's residual stream would predict."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import plotly.graph_objects as go

from actpipe.report.drawing import BLUE, Plot, styled
from actpipe.stores.results import Result

_SHOWN = {
    "loss": ("Loss of what each layer would predict", "nats per token"),
    "rank": ("Rank of the next token by layer", "tokens that are more probable"),
    "agreement": ("Share of top predictions that are the model's own, by layer", "share"),
    "kl": ("KL divergence from the model's distribution, by layer", "nats"),
}


def _lens(result: Result) -> Iterator[Plot]:
    """Draw each measure by layer."""
    table = result.table
    how = "Each residual stream through the final norm and the unembedding"
    if result.record.settings["translators"] == "fit":
        how = "Each residual stream, brought to the last one by an affine map, on documents that the fit did not see"
    for metric, (title, unit) in _SHOWN.items():
        figure = go.Figure(
            go.Scatter(x=table["stream"], y=table[metric], mode="lines+markers", line={"color": BLUE, "width": 2})
        )
        figure.update_xaxes(title="residual stream", type="category")
        figure.update_yaxes(title=unit, rangemode="tozero")
        yield Plot(f"{title}: {result.record.name}", f"{how}; means over all tokens.", styled(figure, 320))


LENS_MAKERS: dict[str, Callable[[Result], Iterator[Plot]]] = {"lens": _lens}
"""By kind of result."""

"""Put every result of a run into one page."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from plotly.offline import get_plotlyjs

from actpipe import __version__
from actpipe.describing import describe_corpus
from actpipe.planning import format_bytes
from actpipe.records import Finding
from actpipe.report.drawing import Plot
from actpipe.report.figures import Shown, shown_of
from actpipe.stores.layout import RunFolder, write_whole
from actpipe.stores.reading import ActivationStore
from actpipe.stores.results import list_results
from actpipe.stores.token_table import TokenTable
from actpipe.stores.verifying import chunk_bytes, corpora


@dataclass(frozen=True)
class _Card:
    value: str
    label: str


@dataclass(frozen=True)
class _Drawn:
    title: str
    caption: str
    height: int
    figure: dict[str, Any]


@dataclass(frozen=True)
class _Section:
    title: str
    lead: str
    shown: list[_Drawn | Finding]
    tables: list[Finding]


def write_report(folder: RunFolder, title: str) -> None:
    """Write `report.html`: self-contained, with every figure of every corpus of the run."""
    found = corpora(folder)
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    template = environment.from_string(files("actpipe.report").joinpath("page.html").read_text(encoding="utf-8"))
    page = template.render(
        title=title,
        lead=_lead(folder),
        cards=_cards(found),
        sections=[_section(name, corpus) for name, corpus in found.items()],
        plotly_js=get_plotlyjs(),
        version=__version__,
    )
    write_whole(folder.report, page.encode())


def _lead(folder: RunFolder) -> str:
    if not folder.has_store:
        there = "Tokens only" if TokenTable.exists(folder) else "No tokens"
        return f"{there}; nothing was extracted."
    store = ActivationStore(folder)
    shape, model = store.shape, store.manifest.model
    return (
        f"{model.name} ({model.family}, {shape.n_layers} layers, {shape.n_heads} heads, d_model {shape.d_model}, "
        f"computed in {model.dtype}) on {store.tokens.manifest.dataset}"
    )


def _cards(found: dict[str, RunFolder]) -> list[_Card]:
    tables = [TokenTable(folder).manifest for folder in found.values() if TokenTable.exists(folder)]
    n_bytes = sum(chunk_bytes(folder) for folder in found.values())
    cards = [
        _Card(f"{sum(table.n_rows for table in tables):,}", "tokens"),
        _Card(f"{sum(table.n_documents for table in tables):,}", "documents"),
        _Card(format_bytes(n_bytes), "stored"),
    ]
    losses = {
        name: result.record.summary["loss"]
        for name, folder in found.items()
        for result in list_results(folder)
        if result.record.kind == "metrics" and "loss" in result.record.summary
    }
    return cards + [_Card(f"{loss:.3f}", f"loss of {name}, nats per token") for name, loss in losses.items()]


def _section(name: str, folder: RunFolder) -> _Section:
    shown = [_drawn(one) for one in shown_of(list_results(folder))]
    lead = "Nothing was tokenized yet."
    if TokenTable.exists(folder):
        table = TokenTable(folder).manifest
        sizes = f"{table.n_documents:,} documents, {table.n_rows:,} tokens in {table.n_sequences:,} sequences"
        lead = f"{table.dataset}: {sizes}"
    return _Section(f"Corpus: {name}", lead, shown, describe_corpus(name, folder))


def _drawn(shown: Shown) -> _Drawn | Finding:
    """Return a figure as the page's script takes it; tables are as they are."""
    if isinstance(shown, Plot):
        return _Drawn(shown.title, shown.caption, shown.figure.layout.height, json.loads(shown.figure.to_json()))
    return shown

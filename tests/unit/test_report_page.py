"""The report stands alone, at any size, whatever the documents say."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import xarray as xr
from actpipe.schemas.results import ResultRecord
from support import TEXTS, make_recipe, run

from actpipe import open_results
from actpipe.report.page import write_report
from actpipe.stores.layout import RunFolder
from actpipe.stores.results import ResultWriter, labels, list_results

EVIL = "<script>alert('x')</script> & </script><img src=http://example.org/x.png> "
LOADS = re.compile(
    r"""<(?:script|img|iframe|link|source|embed)\b[^>]*?(?:src|href)\s*=|@import\s|url\(\s*['"]?https?:""",
    re.IGNORECASE,
)
"""What makes a browser fetch something."""


def own_part(page: str) -> str:
    """Return the page without the library that draws, which is inlined and names addresses in its text."""
    start = page.index("<script>")
    return page[:start] + page[page.index("</style>", 0) :].split("</head>", 1)[1]


def test_the_page_loads_nothing_and_shows_excerpts_as_text(write_jsonl, tmp_path):
    rows = [{"id": EVIL + str(i), "text": EVIL + text, "kind": EVIL} for i, text in enumerate(TEXTS)]
    recipe = make_recipe(write_jsonl(rows), metrics=["loss"])
    recipe["stages"] += [
        {"stage": "summarize_metrics", "by": ["position", "document", "token"], "columns": ["kind"]},
        {"stage": "write_report", "title": EVIL},
    ]
    run(recipe, tmp_path / "run")
    page = (tmp_path / "run/report.html").read_text()
    body = own_part(page)

    assert "&lt;script&gt;alert(" in body
    assert "<script>alert(" not in page
    assert LOADS.findall(body) == []
    assert page.count("<script") == body.count("<script") + 1 == 2
    for tag in re.findall(r"<script[^>]*>", page):
        assert tag == "<script>"


def write_heads(folder: RunFolder, fingerprint: str, n: int) -> None:
    """Leave results of a model with `n` layers of `n` heads."""
    generator = np.random.default_rng(0)
    layer, head = (axis.ravel() for axis in np.indices((n, n)))
    scores = pd.DataFrame({"pattern": "induction_head", "layer": layer, "head": head})
    scores["matched"] = generator.beta(0.3, 5, n * n)
    attribution = pd.DataFrame({"component": [f"L{a}H{b}" for a, b in zip(layer, head, strict=True)], "kind": "head"})
    attribution = attribution.assign(layer=layer, head=head, mean=generator.normal(0, 0.02, n * n), std=0.1)
    records = {"heads": scores.sort_values("matched", ascending=False), "attribution": attribution}
    for kind, table in records.items():
        record = ResultRecord(name=kind, kind=kind, corpus="main", settings={}, model_fingerprint=fingerprint)
        ResultWriter(folder, record).commit(table=table)


def test_a_thousand_heads_are_one_readable_figure(corpus, tmp_path):
    run(make_recipe(corpus, metrics=["loss"]), tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    write_heads(folder, "0" * 64, 32)
    write_report(folder, "A thousand heads")
    page = folder.report.read_text()

    assert "Highest: L" in page
    heights = [int(height) for height in re.findall(r'class="figure" style="height:(\d+)px"', page)]
    assert max(heights) < 1200
    assert len(heights) == 2


def test_heads_are_drawn_and_ranked(corpus, tmp_path):
    recipe = make_recipe(corpus, hooks=["blocks.*.attn.hook_pattern", "blocks.*.attn.hook_z", "ln_final.hook_scale"])
    recipe["stages"] += [
        {"stage": "score_heads", "patterns": ["induction_head", {"name": "two-back", "attend": {"offset": -2}}]},
        {"stage": "describe_attention", "by_position": True},
        {"stage": "score_copying"},
        {"stage": "write_report"},
    ]
    run(recipe, tmp_path / "run")
    page = own_part((tmp_path / "run/report.html").read_text())

    for title in ("Induction heads", "Pattern two-back", "Most focused heads", "Copying heads"):
        (table,) = re.findall(rf"<caption>{title}, ranked</caption>(.*?)</table>", page, re.DOTALL)
        assert re.findall(r"<td>(\d+)</td><td>L\d+H\d+</td>", table) == [str(rank) for rank in range(1, 9)]
    for title in ("Entropy of attention", "Distance of attention", "Attention on the first position by position"):
        assert f"<h3>{title}</h3>" in page
    best = open_results(tmp_path / "run", "score_copying").table.iloc[0]
    assert f"Highest: L{best.layer:.0f}H{best['head']:.0f} with {best.standardized:.3f}" in page


def test_every_result_of_a_run_opens_by_its_name(corpus, tmp_path):
    recipe = make_recipe(corpus, metrics=["loss"])
    recipe["stages"] += [
        {"stage": "summarize_metrics", "by": ["document"]},
        {"stage": "evaluate_model", "induction": {"length": 16}, "ioi": {"n_samples": 4}},
    ]
    run(recipe, tmp_path / "run")

    found = [result.record.name for result in list_results(RunFolder(tmp_path / "run"))]
    assert found == ["evaluate_model", "summarize_metrics"]
    for name in found:
        result = open_results(tmp_path / "run", name)
        assert isinstance(result.dataset.load(), xr.Dataset)
        assert isinstance(result.table, pd.DataFrame)
        assert len(result.table)
    assert labels(["a"]).dtype == object

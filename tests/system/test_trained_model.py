"""A model trained by others: the figures that are known of it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from support import run

from actpipe import HookedModel, open_results, open_store

DATA = Path(__file__).parent / "data"
MODEL = DATA / "stories260k"


def recipe(*stages):
    return {"model": {"name": str(MODEL), "dtype": "float32", "device": "cpu"}, "stages": list(stages)}


def test_stories_have_the_known_perplexity(tmp_path):
    dataset = {"path": str(DATA / "tinystories.parquet")}
    run(
        recipe(
            {"stage": "tokenize_text", "dataset": dataset, "layout": "documents", "context_length": 512},
            {"stage": "extract_activations", "hooks": ["blocks.4.hook_resid_post"], "metrics": ["loss"]},
        ),
        tmp_path / "run",
    )
    store = open_store(tmp_path / "run")
    losses = np.asarray(store["metrics/loss"], np.float64)

    assert np.isnan(losses).sum() == 116
    assert math.exp(np.nanmean(losses)) == pytest.approx(4.182, abs=2e-3)

    sequence = next(iter(store.tokens.read_sequences()))
    native = HookedModel.from_pretrained(str(MODEL), device="cpu").native
    seen = []
    hook = native.model.layers[4].register_forward_hook(lambda _module, _args, output: seen.append(output))
    with torch.no_grad():
        native(torch.from_numpy(sequence.ids.astype(np.int64))[None])
    hook.remove()
    rows = np.arange(sequence.first_row, sequence.row_stop)
    np.testing.assert_allclose(store.rows("blocks.4.hook_resid_post", rows), seen[0][0], atol=1e-4)


def test_repeated_tokens_show_the_known_heads(tmp_path):
    run(
        recipe(
            {
                "stage": "tokenize_text",
                "synthetic": {"n_documents": 32, "period": 64},
                "layout": "documents",
                "context_length": 128,
                "prepend_bos": False,
            },
            {"stage": "extract_activations", "hooks": ["blocks.*.attn.hook_pattern"]},
            {"stage": "score_heads"},
        ),
        tmp_path / "run",
    )
    table = open_results(tmp_path / "run", "score_heads").table
    previous = table[table.pattern == "previous_token_head"].head(5)
    induction = table[table.pattern == "induction_head"]

    found = [(row.layer, row.head) for row in previous.itertuples()]
    assert found == [(3, 6), (1, 3), (1, 5), (1, 4), (1, 2)]
    np.testing.assert_allclose(previous.matched, [0.861, 0.795, 0.667, 0.644, 0.612], atol=0.02)
    assert induction.matched.max() < 0.03

"""A model trained by others: the figures that are known of it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from support import run

from actpipe import HookedModel, open_store

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

"""The figures that are published of four small models' heads, on random tokens repeated once.

The draws were others, so means over heads differ in the third decimal.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support import INDUCTION, run

from actpipe import HookedModel, open_results, open_store

DATA = Path(__file__).parent / "data"
CONTROL, STORIES, NEOX = (DATA / name for name in ("gpt2-2l-no-induction", "stories260k", "neox-4l"))
HEADS = ["L0H0", "L0H1", "L0H2", "L0H3", "L1H0", "L1H1", "L1H2", "L1H3"]


def score(model: Path, out: Path, *, period: int = 64, n_documents: int = 64):
    """Score a model's heads on random tokens repeated once; return `matched` by pattern and head, and the store."""
    recipe = {
        "model": {"name": str(model), "dtype": "float32", "device": "cpu"},
        "stages": [
            {
                "stage": "tokenize_text",
                "synthetic": {"n_documents": n_documents, "period": period},
                "layout": "documents",
                "context_length": 2 * period,
                "prepend_bos": False,
            },
            {
                "stage": "extract_activations",
                "hooks": ["blocks.*.attn.hook_pattern"],
                "metrics": ["loss", "correct"],
            },
            {"stage": "score_heads", "patterns": ["previous_token_head", "induction_head", "induction_stripe"]},
        ],
    }
    run(recipe, out)
    table = open_results(out, "score_heads").table
    table["name"] = [f"L{layer}H{head}" for layer, head in zip(table["layer"], table["head"], strict=True)]
    return table.set_index(["pattern", "name"])["matched"], open_store(out)


def second_copy(store, metric: str) -> np.ndarray:
    """Return a metric of the predictions within the second copy of 64 tokens."""
    values = store[f"metrics/{metric}"].compute().reshape(-1, 128)
    return values[:, 64:-1]


def test_the_induction_model_has_one_induction_head_behind_one_previous_token_head(tmp_path):
    matched, store = score(INDUCTION, tmp_path)

    stripe = [0.000, 0.010, 0.010, 0.010, 0.772, 0.009, 0.010, 0.008]
    np.testing.assert_allclose(matched["induction_stripe"][HEADS], stripe, atol=0.005)
    previous = [0.995, 0.036, 0.031, 0.026, 0.018, 0.035, 0.033, 0.040]
    np.testing.assert_allclose(matched["previous_token_head"][HEADS], previous, atol=0.003)
    assert matched["induction_head"].idxmax() == "L1H0"
    first = store["metrics/loss"].compute().reshape(-1, 128)[:, :63]
    assert first.mean(dtype=np.float64) == pytest.approx(6.39, abs=0.05)
    assert second_copy(store, "loss").mean(dtype=np.float64) == pytest.approx(0.42, abs=0.05)
    assert second_copy(store, "correct").mean() == pytest.approx(0.94, abs=0.02)


@pytest.mark.parametrize(("period", "published"), [(16, 0.794), (32, 0.777), (128, 0.626)])
def test_the_induction_head_weakens_with_the_distance(tmp_path, period, published):
    matched, _ = score(INDUCTION, tmp_path, period=period, n_documents=32)

    assert matched["induction_stripe"]["L1H0"] == pytest.approx(published, abs=0.015)
    assert matched["induction_stripe"].drop("L1H0").max() < 0.05


def test_without_either_head_the_second_copy_is_as_unknown_as_the_first(tmp_path):
    """Loss on the second copy with one head's output at zero, less the loss with all heads."""
    published = dict(zip(HEADS, [6.316, 0.531, 0.418, 0.376, 6.310, 0.360, 0.387, 0.321], strict=True))
    _, store = score(INDUCTION, tmp_path, n_documents=32)
    ids = torch.tensor(np.stack([sequence.ids for sequence in store.tokens.read_sequences()]).astype(np.int64))
    model = HookedModel.from_pretrained(str(INDUCTION), device="cpu")

    def loss() -> float:
        with torch.no_grad():
            return float(model.forward(ids, return_type="loss", loss_per_token=True)[:, 63:].mean())

    whole = loss()
    for name, expected in published.items():
        layer, head = int(name[1]), int(name[3])

        def zero(z, point, head=head):
            return z.index_fill(2, torch.tensor([head]), 0.0)

        with model.hooks([(f"blocks.{layer}.attn.hook_z", zero)]):
            without = loss()
        if expected > 6:
            assert without == pytest.approx(expected, abs=0.05)
        else:
            assert without - whole == pytest.approx(expected - 0.416, abs=0.02)


def test_the_control_has_neither_head(tmp_path):
    matched, store = score(CONTROL, tmp_path)

    assert matched["induction_stripe"].max() == pytest.approx(0.011, abs=0.002)
    assert matched["induction_head"].max() < 0.02
    assert matched["previous_token_head"].max() == pytest.approx(0.057, abs=0.003)
    first = store["metrics/loss"].compute().reshape(-1, 128)[:, :63]
    assert first.mean(dtype=np.float64) == pytest.approx(6.26, abs=0.03)
    assert second_copy(store, "loss").mean(dtype=np.float64) == pytest.approx(6.17, abs=0.03)


def test_the_stories_model_has_five_previous_token_heads_and_no_induction_head(tmp_path):
    matched, _ = score(STORIES, tmp_path, n_documents=32)

    previous = matched["previous_token_head"].nlargest(5)
    assert list(previous.index) == ["L3H6", "L1H3", "L1H5", "L1H4", "L1H2"]
    np.testing.assert_allclose(previous, [0.861, 0.795, 0.667, 0.644, 0.612], atol=0.02)
    assert matched["induction_stripe"].max() == pytest.approx(0.014, abs=0.003)


def test_the_undertrained_neox_model_has_no_induction_head(tmp_path):
    matched, _ = score(NEOX, tmp_path, n_documents=32)

    assert matched["induction_stripe"].max() == pytest.approx(0.013, abs=0.003)
    assert matched["previous_token_head"].idxmax() == "L3H0"
    assert matched["previous_token_head"].max() == pytest.approx(0.305, abs=0.01)


def test_on_shakespeare_the_same_heads_stand_out(tmp_path):
    """Prefix matching and copying on text, where tokens repeat by chance."""
    hooks = ["blocks.*.attn.hook_pattern", "blocks.*.attn.hook_z", "ln_final.hook_scale"]
    speeches = INDUCTION.parent / "tinyshakespeare_speeches.parquet"
    recipe = {
        "model": {"name": str(INDUCTION), "dtype": "float32", "device": "cpu"},
        "stages": [
            {"stage": "tokenize_text", "dataset": {"path": str(speeches)}, "context_length": 256, "max_tokens": 8_000},
            {"stage": "extract_activations", "hooks": hooks},
            {"stage": "score_heads"},
            {"stage": "score_copying"},
        ],
    }
    run(recipe, tmp_path)

    scores = open_results(tmp_path, "score_heads").table.set_index(["pattern", "layer", "head"]).sort_index()
    induction, previous = scores.loc["induction_head"], scores.loc["previous_token_head"]
    assert induction["matched"].idxmax() == (1, 0)
    first, second = induction["matched"].nlargest(2)
    assert first > 4 * induction["uniform"].iloc[0]
    assert second < 2 * induction["uniform"].iloc[0]
    assert previous["matched"].idxmax() == (0, 0)
    copying = open_results(tmp_path, "score_copying").table
    assert tuple(copying.loc[0, ["layer", "head"]]) == (1, 0)
    assert copying.loc[0, "standardized"] > 0.8

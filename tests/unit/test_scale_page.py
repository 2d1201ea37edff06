"""The page on scale says what its script works out."""

from __future__ import annotations

from pathlib import Path

import pytest
import scale_page


def test_the_page_is_what_the_script_writes():
    assert Path(scale_page.__file__).with_name("scale.md").read_text() == scale_page.page()


def test_costs_by_hand():
    _, model, large = scale_page.MODELS

    assert model.flops == pytest.approx(2 * 8.03e9 + 2 * 1024 * 4096 * 32)
    assert scale_page.token_bytes(model, "every `resid_post`") == 32 * 4096 * 2 + 16
    assert (model.n_devices, large.n_devices) == (1, 4)
    assert model.tokens_per_second("A100") == pytest.approx(0.4 * 312e12 / model.flops)
    assert [scale_page.size(1.5e13), scale_page.duration(7200)] == ["15 TB", "2 h"]

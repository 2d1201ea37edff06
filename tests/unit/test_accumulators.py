"""Statistics of batches, merged in any grouping, are those of all rows."""

from __future__ import annotations

from functools import reduce
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actpipe.compute.accumulators import (
    Covariance,
    Extremes,
    Histogram,
    MeanBy,
    Moments,
    RowTokens,
    TopRows,
    bin_edges,
)

N_ROWS, D = 60, 4


@pytest.fixture(scope="module")
def rows():
    """Far from zero, so that naive sums of squares would cancel; with ties and zeros."""
    drawn = torch.randn(N_ROWS, D, generator=torch.Generator().manual_seed(0)) * 0.1 + torch.tensor([1e3, 0, -5, 0.0])
    drawn[:, 3] = drawn[:, 3].relu().mul(20).round()
    return drawn


TOKENS = RowTokens(
    torch.arange(N_ROWS) + 1000,
    torch.arange(N_ROWS) % 7,
    torch.randint(5, (N_ROWS,), generator=torch.Generator().manual_seed(1)),
)


def states(accumulator, rows, cuts):
    bounds = [0, *cuts, N_ROWS]
    pieces = [slice(start, stop) for start, stop in pairwise(bounds) if start < stop]
    return [
        accumulator.of(rows[piece], RowTokens(TOKENS.row[piece], TOKENS.position[piece], TOKENS.token[piece]))
        for piece in pieces
    ]


def finished(accumulator, rows, cuts, backwards=False):
    pieces = states(accumulator, rows, sorted(cuts))
    return accumulator.finish(reduce(accumulator.merge, pieces[::-1] if backwards else pieces))


CUTS = st.sets(st.integers(1, N_ROWS - 1), max_size=6)


@given(cuts=CUTS, backwards=st.booleans())
@settings(max_examples=25, deadline=None)
def test_moments_and_covariance_are_those_of_all_rows(rows, cuts, backwards):
    wide = rows.double().numpy()
    found = finished(Moments(), rows, cuts, backwards)
    assert found["count"] == N_ROWS
    np.testing.assert_allclose(found["mean"], wide.mean(0), rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(found["variance"], wide.var(0), rtol=1e-10)
    covariance = finished(Covariance(), rows, cuts, backwards)["covariance"]
    np.testing.assert_allclose(covariance, np.cov(wide.T, bias=True), rtol=1e-4, atol=1e-5)


@given(cuts=CUTS, backwards=st.booleans())
@settings(max_examples=25, deadline=None)
def test_what_is_counted_or_compared_is_exact_in_any_grouping(rows, cuts, backwards):
    extremes = finished(Extremes(), rows, cuts, backwards)
    np.testing.assert_array_equal(extremes["min"], rows.numpy().min(0))
    np.testing.assert_array_equal(extremes["max"], rows.numpy().max(0))
    np.testing.assert_array_equal(extremes["density"], (rows.numpy() > 0).mean(0))
    top = finished(TopRows(9), rows, cuts, backwards)
    for channel in range(D):
        order = sorted(range(N_ROWS), key=lambda row: (-float(rows[row, channel]), row))[:9]
        assert top["top_row"][:, channel].tolist() == [row + 1000 for row in order]
        np.testing.assert_array_equal(top["top_value"][:, channel], rows[order, channel])
    whole, cut = (finished(Histogram(), rows, cuts, backwards) for cuts in (set(), cuts))
    for name in whole:
        np.testing.assert_array_equal(whole[name], cut[name])


@pytest.mark.parametrize("key", ["token", "position"])
def test_means_by_key_are_of_the_rows_that_have_it(rows, key):
    found = finished(MeanBy(key), rows, [7, 40])
    keys = getattr(TOKENS, key).numpy()
    np.testing.assert_array_equal(found[key], np.unique(keys))
    for number, one in enumerate(found[key]):
        assert found[f"{key}_count"][number] == (keys == one).sum()
        np.testing.assert_allclose(found[f"mean_by_{key}"][number], rows.double().numpy()[keys == one].mean(0))


def test_a_bin_of_the_histogram_holds_what_lies_between_its_edges():
    edges = bin_edges()
    assert (np.diff(edges) >= 0).all()
    values = torch.cat([torch.randn(5000) * 10.0**power for power in (-30, -3, 0, 3, 30)] + [torch.zeros(3)])
    found = Histogram().finish(Histogram().of(values.unsqueeze(1), TOKENS))
    counted, _ = np.histogram(values.double().numpy(), found["bin_edge"])
    assert found["bin_count"].sum() == len(values)
    assert np.abs(counted - found["bin_count"]).sum() <= 8  # zeros, and values on an edge of a negative bin
    wanted = np.quantile(values.double().numpy(), Histogram().levels, method="inverted_cdf")
    np.testing.assert_allclose(found["quantile"], wanted, rtol=1 / 31)

"""A factored matrix against the dense product in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import INDUCTION, MODELS

from actpipe import FactoredMatrix, HookedModel, open_weights

sizes = st.integers(1, 6)


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-7)


@given(sizes, sizes, sizes, sizes, st.sampled_from([(), (2,), (2, 3)]))
def test_products_on_both_sides_are_those_of_the_dense_matrix(n_left, n_inner, n_right, n_other, leading):
    matrix = FactoredMatrix(random(*leading, n_left, n_inner), random(n_inner, n_right))
    right, left = random(n_right, n_other), random(n_other, n_left)
    factored = FactoredMatrix(random(n_right, 2), random(2, n_other))

    assert matrix.shape == (*leading, n_left, n_right)
    close((matrix @ right).AB, matrix.AB @ right)
    close((left @ matrix).AB, left @ matrix.AB)
    close(matrix @ right[:, 0], matrix.AB @ right[:, 0])
    close(left[0] @ matrix, left[0] @ matrix.AB)
    close((matrix @ factored).AB, matrix.AB @ factored.AB)
    close((factored.T @ matrix.T).AB, factored.AB.mT @ matrix.AB.mT)
    close((2.5 * matrix).AB, 2.5 * matrix.AB)
    close((torch.tensor([-2.0], dtype=torch.float64) * matrix * 3).AB, -6 * matrix.AB)
    close(matrix.T.AB, matrix.AB.mT)


@given(sizes, sizes, sizes, st.sampled_from([(), (2,)]))
def test_singular_values_norms_and_even_factors_are_those_of_the_dense_matrix(n_left, n_inner, n_right, leading):
    matrix = FactoredMatrix(random(*leading, n_left, n_inner), random(*leading, n_inner, n_right))
    U, S, Vh = matrix.svd()

    close(U * S[..., None, :] @ Vh.mT, matrix.AB)
    dense = torch.linalg.svdvals(matrix.AB)
    n_shared = min(S.shape[-1], dense.shape[-1])
    close(S[..., :n_shared], dense[..., :n_shared])
    close(matrix.norm(), matrix.AB.norm(dim=(-2, -1)))
    close(matrix.make_even().AB, matrix.AB)
    close(U @ matrix.collapse_l(), matrix.AB)
    close(matrix.collapse_r() @ Vh.mT, matrix.AB)


def test_eigenvalues_are_those_of_the_dense_matrix_without_its_zeros():
    matrix = FactoredMatrix(random(3, 7, 2), random(3, 2, 7))
    dense = torch.linalg.eigvals(matrix.AB)
    largest = dense.abs().argsort(dim=-1, descending=True)[:, :2]

    close(matrix.eigenvalues.sum(-1), dense.gather(1, largest).sum(-1))
    close(matrix.eigenvalues.abs().sort().values, dense.abs().sort().values[:, -2:])


INDICES = [
    0,
    -1,
    slice(1, 3),
    (0, 1),
    (None, 1),
    (..., 2),
    (0, 1, 2),
    (0, 1, 2, 3),
    (0, 1, -1, -1),
    (0, 1, slice(2), 4),
    (slice(None), 0, slice(1, 3)),
    (torch.tensor([0, 1]), torch.tensor([2, 0])),
]


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_indexing_is_that_of_the_dense_matrix_and_matrix_axes_stay(index):
    matrix = FactoredMatrix(random(2, 3, 4, 2), random(2, 3, 2, 5))
    parts = index if isinstance(index, tuple) else (index,)
    at_row = 2 + (parts[0] is None)
    kept = tuple(
        slice(part, part + 1 or None) if isinstance(part, int) and (number >= at_row or parts[0] is ...) else part
        for number, part in enumerate(parts)
    )

    found = matrix[index]
    assert isinstance(found, FactoredMatrix)
    close(found.AB, matrix.AB[kept])


def test_what_has_no_meaning_is_refused():
    matrix = FactoredMatrix(random(2, 4, 3), random(2, 3, 5))

    with pytest.raises(ValueError, match="have no product"):
        FactoredMatrix(random(4, 3), random(4, 3))
    with pytest.raises(ValueError, match="cannot be broadcast"):
        FactoredMatrix(random(3, 4, 3), random(2, 3, 4))
    with pytest.raises(ValueError, match="cannot multiply"):
        matrix @ random(4, 5)
    with pytest.raises(ValueError, match="cannot multiply"):
        random(5, 5) @ matrix
    with pytest.raises(ValueError, match="takes a scalar"):
        matrix * random(2)
    with pytest.raises(ValueError, match="only square"):
        _ = matrix.BA
    with pytest.raises(IndexError, match="too many"):
        matrix[0, 0, 0, 0]


def test_corners_pairs_and_new_axes_are_those_of_transformerlens():
    matrix = FactoredMatrix(random(5, 4, 3), random(5, 3, 6))

    close(matrix.get_corner(2), matrix.AB[:2, :2, :2])
    close(matrix.unsqueeze(0).AB, matrix.AB[None])
    assert matrix.pair == (matrix.A, matrix.B)
    assert (matrix.ndim, matrix.has_leading_dims, matrix.mdim) == (3, True, 3)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_circuits_of_a_model_are_products_of_its_weights_with_shared_keys_repeated(family):
    model = HookedModel.from_pretrained(str(MODELS / family), dtype="float32", device="cpu")

    for weights in (model.weights, open_weights(str(MODELS / family))):
        assert weights.QK.shape == weights.OV.shape == (2, 4, model.shape.d_model, model.shape.d_model)
        torch.testing.assert_close(weights.QK[1, 2].AB, model.weights.W_Q[1, 2] @ model.weights.W_K[1, 2].T)
        torch.testing.assert_close(weights.OV[0, 3].AB, model.weights.W_V[0, 3] @ model.weights.W_O[0, 3])


def test_the_product_of_three_factored_matrices_stays_at_the_size_of_the_heads():
    weights = open_weights(str(INDUCTION))
    circuit = weights.W_E @ weights.OV[1, 0] @ weights.W_U

    assert circuit.A.shape == (512, 32)
    assert circuit.B.shape == (32, 512)

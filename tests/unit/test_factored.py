"""A factored matrix against the dense product in float64."""

from __future__ import annotations

import numpy as np
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


SIZES = [
    ((3, 3, 3), (3, 3, 3)),
    ((1, 1, 1), (1, 1, 1)),
    ((1, 2, 1), (1, 6, 1)),
    ((1, 1, 1), (1, 2, 5)),
    ((5, 2, 1), (1, 1, 1)),
    ((1, 2, 3), (3, 2, 4)),
    ((3, 2, 1), (1, 3, 2)),
    ((1, 2, 5), (5, 3, 1)),
    ((3, 4, 5), (5, 6, 7)),
    ((8, 6, 5), (5, 7, 3)),
    ((3, 4, 4), (4, 5, 5)),
    ((7, 6, 3), (3, 7, 8)),
]
"""Those of TransformerLens' own tests: `(ldim, mdim, rdim)` of both."""
LEADING = [((), ()), ((2,), ()), ((), (2,)), ((9,), (2, 9)), ((2, 9), (9,)), ((2, 1), (9,))]


@pytest.mark.parametrize(("left_leading", "right_leading"), LEADING)
@pytest.mark.parametrize(("left", "right"), SIZES)
def test_products_of_factored_matrices_have_the_smallest_inner_dimension_and_joint_leading_ones(
    left, right, left_leading, right_leading
):
    one = FactoredMatrix(random(*left_leading, *left[:2]), random(*left_leading, *left[1:]))
    other = FactoredMatrix(random(*right_leading, *right[:2]), random(*right_leading, *right[1:]))
    product = one @ other

    close(product.AB, one.AB @ other.AB)
    assert (product.ldim, product.mdim, product.rdim) == (left[0], min(*left[1:], *right[:2]), right[2])
    leading = torch.broadcast_shapes(left_leading, right_leading)
    assert product.A.shape[:-2] == product.B.shape[:-2] == product.shape[:-2] == leading


@pytest.mark.parametrize(("left_leading", "right_leading"), LEADING)
@pytest.mark.parametrize("size", [(2, 3, 4), (2, 6, 4), (2, 4, 4), (6, 3, 4), (2, 2, 4)])
def test_products_with_matrices_keep_the_smaller_factors(size, left_leading, right_leading):
    matrix = FactoredMatrix(random(*left_leading, *size[:2]), random(*left_leading, *size[1:]))
    leading = torch.broadcast_shapes(left_leading, right_leading)
    right, left = random(*right_leading, size[2], 5), random(*right_leading, 5, size[0])

    for product, dense, inner in (
        (matrix @ right, matrix.AB @ right, size[2]),
        (left @ matrix, left @ matrix.AB, size[0]),
    ):
        close(product.AB, dense)
        assert product.mdim == min(size[1], inner)
        assert product.A.shape[:-2] == product.B.shape[:-2] == leading
    vector = random(size[2])
    assert isinstance(matrix @ vector, torch.Tensor)
    close(matrix @ vector, matrix.AB @ vector)
    close(random(size[0]) @ matrix, random(size[0]) @ matrix.AB)


@pytest.mark.parametrize("scalar", [3, -0.5, np.float32(2.5), np.int64(-2), torch.tensor(1.5), torch.tensor([[1.5]])])
@pytest.mark.parametrize("leading", [(), (6,)])
def test_numbers_multiply_the_left_factor_from_either_side(scalar, leading):
    matrix = FactoredMatrix(random(*leading, 2, 3), random(*leading, 3, 4))

    for product in (matrix * scalar, scalar * matrix):
        assert isinstance(product, FactoredMatrix)
        assert product.shape == matrix.shape
        close(product.A, matrix.A * float(scalar))
        assert product.B is matrix.B or torch.equal(product.B, matrix.B)


@pytest.mark.parametrize("size", [(3, 2, 3), (4, 5, 4), (6, 7, 6), (6, 7, 3), (8, 9, 8)])
@pytest.mark.parametrize("leading", [(), (1,), (2, 3)])
def test_properties_are_those_of_transformerlens(size, leading):
    A, B = random(*leading, *size[:2]), random(*leading, *size[1:])
    matrix = FactoredMatrix(A, B)
    U, S, Vh = matrix.svd()

    close(matrix.T.A, B.mT)
    close(matrix.T.B, A.mT)
    assert (matrix.ndim, matrix.has_leading_dims) == (len(leading) + 2, len(leading) > 0)
    assert U.shape[-1] == S.shape[-1] == Vh.shape[-1] == min(size)
    eye = torch.eye(min(size), dtype=torch.float64).expand(*leading, -1, -1)
    close(U.mT @ U, eye)
    close(Vh.mT @ Vh, eye)
    assert matrix.U is U  # computed once for each object
    close(matrix.collapse_l(), S[..., :, None] * Vh.mT)
    close(matrix.collapse_r(), U * S[..., None, :])
    even = matrix.make_even()
    close(even.A.mT @ even.A, torch.diag_embed(S))
    close(even.B @ even.B.mT, torch.diag_embed(S))
    close(matrix.unsqueeze(0).AB, matrix.AB.unsqueeze(0))
    if size[0] == size[2]:
        close(matrix.BA, B @ A)
        assert matrix.eigenvalues.shape == (*leading, size[1])
    assert repr(matrix) == f"FactoredMatrix: Shape({matrix.shape}), Hidden Dim({size[1]})"


def test_half_precision_is_decomposed_in_float32():
    matrix = FactoredMatrix(random(5, 2).bfloat16(), random(2, 5).bfloat16())

    assert matrix.S.dtype == torch.float32
    dense = torch.linalg.eigvals(matrix.A.double() @ matrix.B.double()).abs().sort().values[-2:]
    torch.testing.assert_close(matrix.eigenvalues.abs().sort().values.double(), dense, atol=0.05, rtol=0.05)


def test_leading_dimensions_of_either_factor_are_those_of_the_matrix():
    matrix = FactoredMatrix(random(5, 3), random(2, 4, 3, 7))

    assert matrix.A.shape == (2, 4, 5, 3)
    assert matrix.shape == (2, 4, 5, 7)
    assert matrix[1, 3].shape == (5, 7)
    assert FactoredMatrix(random(4, 5, 3), random(2, 4, 3, 7)).A.shape == (2, 4, 5, 3)


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
    (slice(None), slice(None), [0, 3], [1]),
    (slice(None), slice(None), torch.tensor([0, 3]), torch.tensor([1, 0, 4])),
    (1, slice(None), [2, 0], 3),
    (0, 1, np.int64(2), np.array([4, 0])),
    (0, 1, torch.tensor(2), slice(None, None, 2)),
    (..., [0, 1], slice(1, 4)),
    (np.int64(1), -1),
    torch.tensor([[True, False, True], [False, True, False]]),
]


def is_number(part):
    return isinstance(part, int | np.integer) or (isinstance(part, torch.Tensor) and part.ndim == 0)


def outer(dense, index):
    """Index one axis after the other, so that lists of rows and of columns choose a rectangle."""
    if len(index) == 4 and index[0] is not None:
        *leading, row, column = index
        return dense[tuple(leading)][..., row, :][..., column]
    return dense[index]


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_indexing_is_that_of_the_dense_matrix_and_matrix_axes_stay(index):
    matrix = FactoredMatrix(random(2, 3, 4, 2), random(2, 3, 2, 5))
    parts = index if isinstance(index, tuple) else (index,)
    at_row = 2 + (parts[0] is None)
    kept = tuple(
        slice(int(part), int(part) + 1 or None) if is_number(part) and (number >= at_row or parts[0] is ...) else part
        for number, part in enumerate(parts)
    )

    found = matrix[index]
    assert isinstance(found, FactoredMatrix)
    close(found.AB, outer(matrix.AB, kept))


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
    for index in [(0, 4), (0, -5), (0, 0, 5), (2,)]:
        with pytest.raises(IndexError, match="out of bounds"):
            matrix[index]
    with pytest.raises(IndexError, match="new axis"):
        matrix[0, 0, None]
    with pytest.raises(ValueError, match="cannot multiply"):
        matrix @ torch.tensor(2.0)
    with pytest.raises(ValueError, match="takes a scalar"):
        random(2, 2) * matrix
    with pytest.raises(TypeError):
        matrix * "2"
    for other in (random(4, 5, 7), FactoredMatrix(random(4, 5, 2), random(4, 2, 7))):
        with pytest.raises(ValueError, match="cannot be broadcast"):
            matrix @ other
    with pytest.raises(ValueError, match="cannot be broadcast"):
        random(3, 6, 4) @ matrix
    with pytest.raises(ValueError, match="takes no new one at 2"):
        matrix.unsqueeze(2)


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

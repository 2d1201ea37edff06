"""A matrix kept as the product of two smaller ones.

Source:
    TransformerLens 2.16, `FactoredMatrix`: the same names, shapes and values. Nothing here forms the product
    but `AB`, and products with a matrix that is smaller than the inner dimension.
"""

from __future__ import annotations

from functools import cached_property
from numbers import Real
from typing import Any

import torch
from jaxtyping import Complex, Float

from actpipe.compute.indexing import Index, select_columns, select_rows, split_index


class FactoredMatrix:
    """The matrix `A @ B`, with its algebra, singular values and eigenvalues at the cost of its factors.

    Args:
        A: Left factor `(..., ldim, mdim)`.
        B: Right factor `(..., mdim, rdim)`; leading dimensions are broadcast.

    Raises:
        ValueError: The inner dimensions, or the leading ones, do not fit.
    """

    __array_priority__ = 1000

    def __init__(self, A: Float[torch.Tensor, "..."], B: Float[torch.Tensor, "..."]) -> None:
        if A.ndim < 2 or B.ndim < 2 or A.shape[-1] != B.shape[-2]:
            raise ValueError(f"factors of the shapes {tuple(A.shape)} and {tuple(B.shape)} have no product")
        leading = _joint_leading(A.shape, B.shape)
        self.A = A.broadcast_to((*leading, *A.shape[-2:]))
        self.B = B.broadcast_to((*leading, *B.shape[-2:]))
        self.ldim, self.mdim, self.rdim = A.shape[-2], A.shape[-1], B.shape[-1]
        self.has_leading_dims = len(leading) > 0
        self.shape = torch.Size((*leading, self.ldim, self.rdim))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Leave `tensor @ factored` and `tensor * factored` to the methods below."""
        return NotImplemented

    @property
    def ndim(self) -> int:
        """Number of dimensions, leading ones included."""
        return len(self.shape)

    @property
    def pair(self) -> tuple[Float[torch.Tensor, "..."], Float[torch.Tensor, "..."]]:
        """Both factors."""
        return self.A, self.B

    @property
    def AB(self) -> Float[torch.Tensor, "*leading ldim rdim"]:
        """The product itself; large."""
        return self.A @ self.B

    @property
    def BA(self) -> Float[torch.Tensor, "*leading mdim mdim"]:
        """The reverse product; it has the eigenvalues of a square `AB`, but for zeros.

        Raises:
            ValueError: The matrix is not square.
        """
        if self.ldim != self.rdim:
            raise ValueError(f"only square matrices have a reverse product, and this is {tuple(self.shape)}")
        return self.B @ self.A

    @property
    def T(self) -> FactoredMatrix:
        """The transpose."""
        return FactoredMatrix(self.B.mT, self.A.mT)

    def __matmul__(self, other: Any) -> Any:
        """Multiply by a vector (a tensor comes out), a matrix or a factored matrix (a factored one does)."""
        if isinstance(other, FactoredMatrix):
            return (self @ other.A) @ other.B
        if not isinstance(other, torch.Tensor):
            return NotImplemented
        if other.ndim == 0 or other.shape[-2:][0] != self.rdim:
            raise ValueError(f"cannot multiply {tuple(self.shape)} by {tuple(other.shape)}")
        _joint_leading(self.shape, other.shape)
        if other.ndim < 2:
            return (self.A @ (self.B @ other.unsqueeze(-1))).squeeze(-1)
        return FactoredMatrix(self.A, self.B @ other) if self.rdim > self.mdim else FactoredMatrix(self.AB, other)

    def __rmatmul__(self, other: Any) -> Any:
        """Multiply from the left by a vector or a matrix; see `__matmul__`."""
        if not isinstance(other, torch.Tensor):
            return NotImplemented
        if other.ndim == 0 or other.shape[-1] != self.ldim:
            raise ValueError(f"cannot multiply {tuple(other.shape)} by {tuple(self.shape)}")
        _joint_leading(other.shape, self.shape)
        if other.ndim < 2:
            return ((other.unsqueeze(-2) @ self.A) @ self.B).squeeze(-2)
        return FactoredMatrix(other @ self.A, self.B) if self.ldim > self.mdim else FactoredMatrix(other, self.AB)

    def __mul__(self, scalar: Any) -> FactoredMatrix:
        """Multiply by a number, or by a tensor of one element."""
        if isinstance(scalar, torch.Tensor) and scalar.numel() != 1:
            raise ValueError(f"`*` takes a scalar, not a tensor of shape {tuple(scalar.shape)}; use `@`")
        if not isinstance(scalar, torch.Tensor | Real):
            return NotImplemented
        factor = scalar.reshape(()) if isinstance(scalar, torch.Tensor) else float(scalar)
        return FactoredMatrix(self.A * factor, self.B)

    __rmul__ = __mul__

    def __getitem__(self, index: Index) -> FactoredMatrix:
        """Index leading dimensions, then rows, then columns; an integer row or column keeps its axis, of length 1.

        Raises:
            IndexError: More indices than dimensions, or an integer beyond them.
        """
        leading, row, column = split_index(index, self.shape)
        return FactoredMatrix(select_rows(self.A, leading, row), select_columns(self.B, leading, column))

    @cached_property
    def _svd(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        U_a, S_a, V_a = reduced_svd(self.A)
        U_b, S_b, V_b = reduced_svd(self.B)
        U_m, S_m, V_m = reduced_svd(S_a[..., :, None] * (V_a.mT @ U_b) * S_b[..., None, :])
        return U_a @ U_m, S_m, V_b @ V_m

    def svd(
        self,
    ) -> tuple[
        Float[torch.Tensor, "*leading ldim rank"],
        Float[torch.Tensor, "*leading rank"],
        Float[torch.Tensor, "*leading rdim rank"],
    ]:
        """Return `U`, `S` and `Vh` with `AB = U @ diag(S) @ Vh.T`; `Vh` is not transposed, as there."""
        return self._svd

    @property
    def U(self) -> Float[torch.Tensor, "*leading ldim rank"]:
        """Left singular vectors, as columns."""
        return self._svd[0]

    @property
    def S(self) -> Float[torch.Tensor, "*leading rank"]:
        """Singular values, the largest first."""
        return self._svd[1]

    @property
    def Vh(self) -> Float[torch.Tensor, "*leading rdim rank"]:
        """Right singular vectors, as columns."""
        return self._svd[2]

    @property
    def eigenvalues(self) -> Complex[torch.Tensor, "*leading mdim"]:
        """Eigenvalues of the product, without the zeros beyond the inner dimension."""
        return torch.linalg.eigvals(_wide(self.BA))

    def norm(self) -> Float[torch.Tensor, "*leading"]:
        """Return the Frobenius norm."""
        return self.S.pow(2).sum(-1).sqrt()

    def make_even(self) -> FactoredMatrix:
        """Return the same matrix with the singular values shared evenly between the factors."""
        root = self.S.sqrt()
        return FactoredMatrix(self.U * root[..., None, :], root[..., :, None] * self.Vh.mT)

    def collapse_l(self) -> Float[torch.Tensor, "*leading rank rdim"]:
        """Return the matrix without its left orthogonal factor."""
        return self.S[..., :, None] * self.Vh.mT

    def collapse_r(self) -> Float[torch.Tensor, "*leading ldim rank"]:
        """Return the matrix without its right orthogonal factor."""
        return self.U * self.S[..., None, :]

    def get_corner(self, k: int = 3) -> Float[torch.Tensor, "..."]:
        """Return the first `k` rows and columns, and the first `k` of every leading dimension."""
        corner = self.A[..., :k, :] @ self.B[..., :, :k]
        return corner[tuple(slice(k) for _ in range(corner.ndim))]

    def unsqueeze(self, k: int) -> FactoredMatrix:
        """Return it with a new leading dimension at `k`.

        Raises:
            ValueError: `k` is no place before the rows.
        """
        if not 0 <= k <= self.ndim - 2:
            raise ValueError(f"a matrix of {self.ndim - 2} leading dimensions takes no new one at {k}")
        return FactoredMatrix(self.A.unsqueeze(k), self.B.unsqueeze(k))

    def __repr__(self) -> str:
        return f"FactoredMatrix: Shape({self.shape}), Hidden Dim({self.mdim})"


def reduced_svd(
    matrix: Float[torch.Tensor, "*leading left right"],
) -> tuple[
    Float[torch.Tensor, "*leading left rank"],
    Float[torch.Tensor, "*leading rank"],
    Float[torch.Tensor, "*leading right rank"],
]:
    """Return `U`, `S` and `V`, not transposed, with `matrix = U diag(S) V.T`, in at least float32."""
    U, S, Vh = torch.linalg.svd(_wide(matrix), full_matrices=False)
    return U, S, Vh.mT


def _wide(matrix: torch.Tensor) -> torch.Tensor:
    """Return a matrix in a type that it can be decomposed in."""
    return matrix if matrix.dtype in (torch.float32, torch.float64) else matrix.float()


def _joint_leading(left: torch.Size, right: torch.Size) -> tuple[int, ...]:
    """Return the leading dimensions of both together.

    Raises:
        ValueError: They cannot be broadcast.
    """
    try:
        return tuple(torch.broadcast_shapes(left[:-2], right[:-2]))  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise ValueError(f"leading dimensions of {tuple(left)} and {tuple(right)} cannot be broadcast") from error

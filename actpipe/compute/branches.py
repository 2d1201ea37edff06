"""What stands between heads or neurons and the residual stream: output weights, a bias, in some models a norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float


@dataclass(frozen=True)
class BranchNorm:
    """The weights of a norm that attention's, or an MLP's, output goes through before it is added to the stream."""

    weight: Float[np.ndarray, " d_model"]
    bias: Float[np.ndarray, " d_model"] | None
    """None for RMSNorm."""


@dataclass(frozen=True)
class Branch:
    """From the heads of a layer, or the neurons of its MLP, to the stream."""

    W: Float[np.ndarray, "... d_model"]
    """`W_O (head, d_head, d_model)` or `W_out (neuron, d_model)`."""
    b: Float[np.ndarray, " d_model"]
    """`b_O` or `b_out`."""
    norm: BranchNorm | None = None

    def writes(
        self, rows: Float[np.ndarray, "row d_model"], scale: Float[np.ndarray, "row 1"] | None
    ) -> Float[np.ndarray, "row d_model"]:
        """Return what a part of the branch's output, such as one head's, adds to the stream.

        Args:
            rows: The part before the norm.
            scale: What the norm divided each row by; None where there is no norm.
        """
        if self.norm is None:
            return rows
        return behind_norm(rows, self.norm.weight, scale, centered=self.norm.bias is not None)

    def bias(self, n_rows: int, scale: Float[np.ndarray, "row 1"] | None) -> Float[np.ndarray, "row d_model"]:
        """Return what the bias, and that of the norm, add to the stream; see `writes`."""
        found = self.writes(np.broadcast_to(self.b, (n_rows, len(self.b))), scale)
        return found if self.norm is None or self.norm.bias is None else found + self.norm.bias

    def sees(self, directions: Float[np.ndarray, "row d_model"]) -> Float[np.ndarray, "row d_model"]:
        """Return the directions with which parts before the norm are multiplied, and then divided by its scale.

        What `writes` does to a part is linear; this does the adjoint to what the stream is multiplied with.
        """
        if self.norm is None:
            return directions
        seen: Float[np.ndarray, "row d_model"] = directions * self.norm.weight
        return seen if self.norm.bias is None else seen - seen.mean(-1, keepdims=True)


def behind_norm(parts: Any, weight: Any, scale: Any, *, centered: bool) -> Any:
    """Return what a norm, held at its recorded scale, makes of parts of what it reads; its own bias is left out.

    Args:
        parts: `(..., d_model)`, numpy or Dask.
        weight: The norm's gain, `(d_model,)`.
        scale: What it divided each row by, `(row, 1)`.
        centered: Whether the norm subtracts the mean over d_model, as LayerNorm does.
    """
    if centered:
        parts = parts - parts.mean(-1, keepdims=True)
    return parts * weight / scale

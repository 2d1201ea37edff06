"""Change an element type without losing anything in silence."""

from __future__ import annotations

import torch
from jaxtyping import Float


def cast_rows(
    rows: Float[torch.Tensor, "..."], dtype: torch.dtype, *, clip: bool
) -> tuple[Float[torch.Tensor, "..."], int]:
    """Cast activations, counting the finite values that do not fit.

    Args:
        rows: Activations in any floating type.
        dtype: Type to cast to.
        clip: Put the largest finite value of `dtype` in the place of those that do not fit;
            otherwise they become infinite, as a plain cast makes them.

    Returns:
        The cast values (the input itself where nothing changes), and how many did not fit.
        Infinite values of the input (masked scores) stay and are not counted.
    """
    if rows.dtype == dtype:
        return rows, 0
    cast = rows.to(dtype)
    if torch.finfo(dtype).max >= torch.finfo(rows.dtype).max:
        return cast, 0
    lost = torch.isinf(cast)
    if not bool(lost.any()):
        return cast, 0
    lost &= torch.isfinite(rows)
    n_lost = int(lost.sum())
    if clip and n_lost:
        largest = torch.finfo(dtype).max
        cast = torch.where(lost, rows.clamp(-largest, largest).to(dtype), cast)
    return cast, n_lost

"""What attention looks like, query by query: how spread it is and where it goes."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

STATISTICS = ("entropy", "distance", "first", "current", "largest", "total")


def describe_rows(
    attention: Float[np.ndarray, "row head key_position"], position: Int[np.ndarray, " row"]
) -> Float[np.ndarray, "row head statistic"]:
    """Describe the attention of some queries, each for itself.

    `entropy` is `-sum a ln a` over the keys, in nats; 0 where all attention is on one key, `ln(position + 1)` where a
    decoder spreads it evenly. `distance` is `sum a |position - key|`, in tokens. `first` is the attention on the first
    position of the model input, `current` that of the token on itself, `largest` that on any one key, and `total` the
    sum, which is 1 but for rounding and for models whose attention may go nowhere. Nothing is divided by `total`.

    Args:
        attention: What each query attends to; 0 at keys that it does not see, padding included.
        position: The position of each query in its model input.

    Returns:
        One column for each of `STATISTICS`, summed in float64.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        surprise = np.where(attention > 0, -attention * np.log(attention), 0.0)
    distance = np.abs(position[:, None] - np.arange(attention.shape[-1])[None])[:, None].astype(np.float32)
    return np.stack(
        [
            surprise.sum(-1, dtype=np.float64),
            (attention * distance).sum(-1, dtype=np.float64),
            attention[..., 0].astype(np.float64),
            np.take_along_axis(attention, position[:, None, None], -1)[..., 0].astype(np.float64),
            attention.max(-1).astype(np.float64),
            attention.sum(-1, dtype=np.float64),
        ],
        axis=-1,
    )

"""Arithmetic only: rows, parts, chunks, bytes."""

from __future__ import annotations

import math

from actpipe.records import Part

DEFAULT_ROWS_PER_PART = 65_536
"""Rows of a part when the recipe does not say: 96 MiB of float16 at d_model 768."""


def rows_per_part_for(n_rows: int, *, multiple_of: int = 1, most: int = DEFAULT_ROWS_PER_PART) -> int:
    """Choose the rows of a part: as even as possible, at most `most`, a whole number of sequences.

    Args:
        n_rows: Rows of the whole store, in tokens.
        multiple_of: Length of a packed sequence, in tokens; 1 where sequences differ in length.
        most: Upper bound, in tokens. A single sequence longer than that is one part.

    Returns:
        Rows per part, a multiple of `multiple_of`.
    """
    if n_rows < 0 or multiple_of < 1 or most < 1:
        raise ValueError(f"n_rows ({n_rows}), multiple_of ({multiple_of}) and most ({most}) must be positive")
    largest = max(1, most // multiple_of) * multiple_of
    n_parts = max(1, math.ceil(n_rows / largest))
    even = math.ceil(max(1, n_rows) / n_parts)
    return math.ceil(even / multiple_of) * multiple_of


def count_parts(n_rows: int, rows_per_part: int) -> int:
    """Return the number of parts that hold `n_rows` rows."""
    return math.ceil(n_rows / rows_per_part)


def plan_parts(n_rows: int, rows_per_part: int) -> tuple[Part, ...]:
    """Cut `n_rows` rows into parts; together they hold every row exactly once."""
    return tuple(
        Part(index, index * rows_per_part, min(n_rows, (index + 1) * rows_per_part))
        for index in range(count_parts(n_rows, rows_per_part))
    )


def format_bytes(n_bytes: float) -> str:
    """Write a number of bytes for people, in powers of 1000 as disks are sold."""
    if n_bytes < 1000:
        return f"{n_bytes:.0f} B"
    exponent = min(5, int(math.log10(n_bytes) // 3))
    return f"{n_bytes / 1000**exponent:.3g} {' kMGTP'[exponent]}B"

"""The commit record: its existence is what makes a part count."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from actpipe.schemas.base import Contract, Without
from pydantic import Field, NonNegativeFloat, NonNegativeInt

Crc32c = Annotated[str, Field(pattern=r"^[0-9a-f]{8}$")]


class ChunkRecord(Contract):
    """One chunk file."""

    path: str
    """Relative to the Zarr group: `activations/hook_embed/c/12/0`."""
    n_bytes: NonNegativeInt
    crc32c: Crc32c
    """CRC-32C (Castagnoli) of the whole file."""


class Fidelity(Contract):
    """What quantising did to one array of a part, as sums over its values in float64: they add up over parts."""

    squared: NonNegativeFloat
    """Of the values."""
    squared_stored: NonNegativeFloat
    """Of what is read back."""
    product: float
    """Of a value and what is read back for it."""
    squared_error: NonNegativeFloat
    """Of the difference."""


class Commit(Without):
    """All chunks of one part. Holds nothing that differs between two runs of the same recipe."""

    without: ClassVar = {"fidelity": {}}

    schema_version: Literal[1, 2] = 1
    """2 where arrays are quantised."""
    part: NonNegativeInt
    row_start: NonNegativeInt
    row_stop: NonNegativeInt
    n_clipped: dict[str, int] = Field(default_factory=dict)
    """Values clipped to the largest of the element type, by array, where the recipe asks for clipping."""
    fidelity: dict[str, Fidelity] = Field(default_factory=dict)
    """By quantised array."""
    chunks: tuple[ChunkRecord, ...]

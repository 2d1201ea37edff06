"""The commit record: its existence is what makes a part count."""

from __future__ import annotations

from typing import Annotated, Literal

from actpipe.schemas.base import Contract
from pydantic import Field, NonNegativeInt

Crc32c = Annotated[str, Field(pattern=r"^[0-9a-f]{8}$")]


class ChunkRecord(Contract):
    """One chunk file."""

    path: str
    """Relative to the Zarr group: `activations/hook_embed/c/12/0`."""
    n_bytes: NonNegativeInt
    crc32c: Crc32c
    """CRC-32C (Castagnoli) of the whole file."""


class Commit(Contract):
    """All chunks of one part. Holds nothing that differs between two runs of the same recipe."""

    schema_version: Literal[1] = 1
    part: NonNegativeInt
    row_start: NonNegativeInt
    row_stop: NonNegativeInt
    n_clipped: dict[str, int] = Field(default_factory=dict)
    """Values clipped to the largest of the element type, by array, where the recipe asks for clipping."""
    chunks: tuple[ChunkRecord, ...]

"""What stands beside the numbers of a result: `results/NAME.json`."""

from __future__ import annotations

from typing import ClassVar, Literal

from actpipe.schemas.base import Contract, Name, NonEmpty, Without
from actpipe.schemas.commit import Crc32c
from pydantic import Field, NonNegativeInt


class FileRecord(Contract):
    """One file of a result."""

    path: NonEmpty
    """Relative to the folder `results`: `logit_lens.zarr/mean/c/0/0/0`."""
    n_bytes: NonNegativeInt
    crc32c: Crc32c
    """CRC-32C (Castagnoli) of the whole file."""


class ResultRecord(Without):
    """One result: its files, and what made it. Written last, so its presence means that the result is whole."""

    without: ClassVar = {"files": ()}

    schema_version: Literal[1] = 1
    name: Name
    kind: Name
    """What the numbers are, for the report: by it the figures are drawn."""
    corpus: Name
    settings: dict[str, object]
    """Settings of the stage that made it."""
    model_fingerprint: str
    dataset: str | None = None
    """File name of the labelled arrays (a Zarr group that xarray opens), if any."""
    table: str | None = None
    """File name of the table (Parquet), if any."""
    summary: dict[str, float | int | str] = Field(default_factory=dict)
    """The few numbers worth a line."""
    files: tuple[FileRecord, ...] = ()
    """Every file of the result, by path; none in records of earlier releases, whose files can only be missed."""

"""What stands beside the numbers of a result: `results/NAME.json`."""

from __future__ import annotations

from typing import Literal

from actpipe.schemas.base import Contract, Name
from pydantic import Field


class ResultRecord(Contract):
    """One result: its files, and what made it. Written last, so its presence means that the result is whole."""

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

"""What an export says of itself, so that importing it gives back the same store."""

from __future__ import annotations

from typing import Literal

from actpipe.schemas.base import Contract
from actpipe.schemas.manifest import StoreManifest


class ExportRecord(Contract):
    """`actpipe/record.json` in an exported folder; other programs need not know it."""

    format: Literal["actpipe-export"] = "actpipe-export"
    schema_version: Literal[1] = 1
    layout: Literal["sae_lens", "safetensors", "datasets", "npy"]
    """The format of the folder."""
    store: StoreManifest
    """The store, with the arrays and rows that were exported, and without codec and quantisation."""
    written: dict[str, str]
    """By the path of an array, the element type in the files; `uint16` holds the bits of `bfloat16`."""

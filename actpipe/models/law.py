"""One identity, as all laws are written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from actpipe.hooks import BlockShape
from actpipe.models.probe import Probe

Sides = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Law:
    """One identity: two ways to the same numbers."""

    statement: str
    kinds: tuple[str, ...]
    """What it reads, without layer; it is checked in those layers that have all of it."""
    sides: Callable[[Probe, int], tuple[torch.Tensor, torch.Tensor]]
    per_layer: bool = True
    exact: bool = False
    least_tolerance: float = 0.0
    """What rounding may make of it in any model, whatever the element type."""
    when: Callable[[BlockShape], bool] = lambda _: True

"""Read a parameter of a module."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

Reader = Callable[[nn.Module, str], torch.Tensor | None]
"""Returns a module's parameter or buffer by its name in that module, None where it has none."""


def read_parameter(module: nn.Module, name: str) -> torch.Tensor | None:
    """Return a parameter as the module computes with it."""
    value = getattr(module, name, None)
    assert value is None or isinstance(value, torch.Tensor)
    return value

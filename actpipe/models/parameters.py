"""Read a parameter of a module, wherever it is kept: there, offloaded by accelerate, or quantised."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import align_module_device, has_offloaded_params
from torch import nn

from actpipe.errors import UnsupportedModelError

Reader = Callable[[nn.Module, str], torch.Tensor | None]
"""Returns a module's parameter or buffer by its name in that module, None where it has none."""


def read_parameter(module: nn.Module, name: str) -> torch.Tensor | None:
    """Return a parameter as the module computes with it."""
    if has_offloaded_params(module):
        with align_module_device(module):
            return _held(module, name)
    return _held(module, name)


def execution_device(module: nn.Module) -> torch.device:
    """Return the device that a module computes on; that of its parameters, unless they are offloaded."""
    if has_offloaded_params(module):
        placed: Any = module._hf_hook
        return torch.device(placed.execution_device)
    return next(module.parameters()).device


def _held(module: nn.Module, name: str) -> torch.Tensor | None:
    value = getattr(module, name, None)
    if value is None or type(value) in (torch.Tensor, nn.Parameter):
        return value
    kind = type(value)
    if kind.__name__ in ("Int8Params", "Params4bit"):
        return _from_bitsandbytes(module, value)
    if kind.__module__.startswith("torchao."):
        dequantized: torch.Tensor = value.dequantize()
        return dequantized
    raise _refusal(module, f"kept as {kind.__name__}")


def _from_bitsandbytes(module: nn.Module, weight: Any) -> torch.Tensor:
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
        raise _refusal(module, "repacked by bitsandbytes for this processor")
    dequantized: torch.Tensor = dequantize_bnb_weight(weight, getattr(module, "state", None))
    return dequantized


def _refusal(module: nn.Module, how: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"weights of {type(module).__name__} cannot be read as plain numbers: they are {how}; "
        "take weights, and `hook_result`, from the model that is not quantised"
    )

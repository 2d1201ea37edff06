"""Statements about tensors: the same numbers, a norm, a sum, a rotation, a non-linearity."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from transformers.activations import ACT2FN

from actpipe.models.anatomy import norm_epsilon
from actpipe.models.recognition.watching import Call

TOLERANCE = 1e-4
_ACTIVATIONS = (
    "silu",
    "gelu",
    "gelu_new",
    "gelu_pytorch_tanh",
    "relu",
    "relu2",
    "quick_gelu",
    "xielu",
    "tanh",
    "sigmoid",
)


def same(left: torch.Tensor | None, right: torch.Tensor | None) -> bool:
    """Whether two tensors hold the same numbers in the same order, whatever their axes."""
    if left is None or right is None or left.numel() != right.numel() or left.numel() == 0:
        return False
    return _gap(left, right) <= TOLERANCE


@dataclass(frozen=True)
class Norm:
    """What a module does that divides by a length."""

    kind: Literal["LN", "RMS"]
    offset: float
    epsilon: float | None
    """None where the module says it."""


def as_norm(call: Call) -> Norm | None:
    """Return what kind of norm a call was, None if it was none."""
    if call.input is None or call.output is None or call.input.shape != call.output.shape:
        return None
    if not call.input.is_floating_point() or list(call.module.children()):
        return None
    weight, bias = getattr(call.module, "weight", None), getattr(call.module, "bias", None)
    if weight is not None and weight.ndim != 1:
        return None
    said = any(hasattr(call.module, name) for name in ("eps", "variance_epsilon"))
    epsilons = (norm_epsilon(call.module),) if said else (1e-6, 1e-5, 1e-12, 1e-8)
    fits = [
        (_gap(call.output, value), Norm(kind, offset, None if said else epsilon))
        for epsilon in epsilons
        for kind, offset, value in _normalized(call.input.float(), weight, bias, epsilon)
    ]
    gap, norm = min(fits, key=lambda fit: fit[0])
    return norm if gap <= TOLERANCE else None


def _normalized(
    given: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, epsilon: float
) -> Iterator[tuple[Literal["LN", "RMS"], float, torch.Tensor]]:
    """Yield what each kind of norm makes of a tensor, and what it adds to its weight before."""
    kinds: tuple[Literal["LN", "RMS"], ...] = ("RMS", "LN")
    for kind in kinds:
        wide = given - given.mean(-1, keepdim=True) if kind == "LN" else given
        wide = wide / (wide.square().mean(-1, keepdim=True) + epsilon).sqrt()
        for offset in (0.0, 1.0) if weight is not None else (0.0,):
            scaled = wide if weight is None else wide * (weight.float() + offset)
            yield kind, offset, scaled if bias is None else scaled + bias.float()


def _gap(left: torch.Tensor, right: torch.Tensor) -> float:
    """Return the largest difference, relative to the largest value."""
    left, right = left.float().reshape(-1), right.float().reshape(-1)
    return float((left - right).abs().max() / right.abs().max().clamp_min(1e-6))


def is_linear(module: nn.Module) -> bool:
    """Whether a module multiplies with one matrix."""
    weight = getattr(module, "weight", None)
    return isinstance(module, nn.Linear) or (type(module).__name__ == "Conv1D" and weight is not None)


def same_size(left: torch.Tensor | None, right: torch.Tensor) -> bool:
    """Whether two tensors have as many numbers."""
    return left is not None and left.numel() == right.numel()


def _near(values: torch.Tensor, target: torch.Tensor) -> int | None:
    """Return which row of `values` is `target`, if one is."""
    if not len(values):
        return None
    distances = (values - target).abs().amax(dim=1)
    best = int(distances.argmin())
    return best if float(distances[best]) <= TOLERANCE * float(target.abs().max().clamp_min(1e-6)) else None


def one_of(values: torch.Tensor, target: torch.Tensor) -> tuple[int, ...]:
    """Return which row of `values` is `target`; empty where none is."""
    found = _near(values, target)
    return () if found is None else (found,)


def pair_of(values: torch.Tensor, target: torch.Tensor) -> tuple[int, ...]:
    """Return which two rows of `values` add up to `target`."""
    size = target.abs().max()
    for first in range(len(values)):
        rest = target - values[first]
        distances = (values - rest).abs().amax(dim=1)
        distances[first] = torch.inf
        second = int(distances.argmin())
        if float(distances[second]) <= TOLERANCE * float(size):
            return first, second
    return ()


def three_of(values: torch.Tensor, target: torch.Tensor) -> tuple[int, ...]:
    """Return which three rows of `values` add up to `target`."""
    for first in range(min(len(values), _MOST_OF_THREE)):
        found = pair_of(values, target - values[first])
        if found and first not in found:
            return first, *found
    return ()


_MOST_OF_THREE = 24


def rotated(before: torch.Tensor, after: torch.Tensor) -> bool | None:
    """Return False where heads pass as they are or scaled, True where position rotates them, else None."""
    if same(before, after) or same(before * ((before * after).sum() / before.square().sum()), after):
        return False
    first, last = before[:, 0], after[:, 0]
    factor = (first * last).sum() / first.square().sum()  # 1, or what YaRN multiplies with
    lengths = same(before.norm(dim=-1) * factor, after.norm(dim=-1))
    return True if lengths and same(first * factor, last) else None


def activated(post: torch.Tensor, pre: torch.Tensor | None, linear: torch.Tensor | None = None) -> bool:
    """Whether neurons are a known function of `pre`, times `linear` where there is one."""
    if pre is None:
        return False
    for name in _ACTIVATIONS:
        if name not in ACT2FN:
            continue
        try:
            with torch.no_grad():
                expected = ACT2FN[name](pre.float())
        except Exception:  # noqa: BLE001  # some need a dtype or parameters of their own
            continue
        if same(post, expected if linear is None else expected * linear.float()):
            return True
    return False

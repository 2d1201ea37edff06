"""Record everything that modules take and give in one forward pass of a small model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from actpipe.models.attention import OwnAttention, interface_watched, observe
from actpipe.models.attention_calls import AttentionSeen


@dataclass
class Call:
    """One run of one module."""

    path: str
    """From the module that was watched."""
    module: nn.Module
    input: torch.Tensor | None
    outputs: tuple[torch.Tensor, ...]
    started: int
    ended: int
    """Counts of starts and ends of calls, in order."""

    @property
    def output(self) -> torch.Tensor | None:
        """The first tensor that came out."""
        return self.outputs[0] if self.outputs else None

    def contains(self, other: Call) -> bool:
        """Whether the other ran inside this one."""
        return self.started < other.started and other.ended < self.ended


@dataclass
class Attention:
    """One run of attention, as its module showed it."""

    call: Call
    seen: AttentionSeen
    own_code: bool


@dataclass
class Recording:
    """One forward pass."""

    calls: list[Call] = field(default_factory=list)
    attention: list[Attention] = field(default_factory=list)
    logits: torch.Tensor | None = None

    def inside(self, block: Call) -> list[Call]:
        """Return what ran inside a call, outermost first, with paths from there."""
        prefix = block.path + "."
        return [
            Call(c.path.removeprefix(prefix), c.module, c.input, c.outputs, c.started, c.ended)
            for c in sorted(self.calls, key=lambda call: call.started)
            if block.contains(c) and c.path.startswith(prefix)
        ]


def record(native: PreTrainedModel, ids: torch.Tensor) -> Recording:
    """Run `(batch, position)` ids and keep what every module took and gave."""
    interface = _record(native, ids, [])
    reached = {attention.call.module for attention in interface.attention}
    others = [module for module in _with_softmax(native, ids) if module not in reached]
    return _record(native, ids, others) if others else interface


def _record(native: PreTrainedModel, ids: torch.Tensor, own: list[nn.Module]) -> Recording:
    recording, started = Recording(), []
    clock = iter(range(10**9))
    seen: list[tuple[nn.Module, AttentionSeen, bool]] = []
    names = {module: name for name, module in native.named_modules() if name}

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        value = args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values()), None))
        started.append((next(clock), value.detach().clone() if isinstance(value, torch.Tensor) else None, len(seen)))

    def after(module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        start, value, n_seen = started.pop()
        outputs = tuple(t.detach().clone() for t in _tensors(output))
        call = Call(names[module], module, value, outputs, start, next(clock))
        recording.calls.append(call)
        for place, attention, own_code in seen[n_seen:]:
            if place is module:
                recording.attention.append(Attention(call, attention, own_code))

    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(interface_watched())
        for module in names:
            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(after).remove)
            observe(module, lambda value, module=module: seen.append((module, value, False)))  # type: ignore[misc]
            stack.callback(observe, module, None)
        for module in own:
            watch = OwnAttention(module, lambda value, module=module: seen.append((module, value, True)))  # type: ignore[misc]
            watch.attach()
            stack.callback(watch.detach)
        recording.logits = cast(torch.Tensor, native(input_ids=ids, use_cache=False).logits)
    return recording


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    for value in output if isinstance(output, tuple | list) else (output,):
        if isinstance(value, torch.Tensor):
            yield value
    if hasattr(output, "items"):
        yield from _tensors(tuple(output.values()))


class _SoftmaxSeen(TorchFunctionMode):
    """Notes which modules take a softmax over as many keys as there are positions."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.running: list[nn.Module] = []
        self.found: list[nn.Module] = []
        self._length = length

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        over_keys = name == "softmax" and output.ndim >= 3 and output.shape[-2:] == (self._length, self._length)
        if (over_keys or name == "scaled_dot_product_attention") and self.running:
            self.found.append(next(m for m in reversed(self.running) if not isinstance(m, nn.Softmax)))
        return output


def _with_softmax(native: PreTrainedModel, ids: torch.Tensor) -> list[nn.Module]:
    """Return the modules whose own code attends over positions."""
    with ExitStack() as stack, torch.no_grad():
        watch = _SoftmaxSeen(ids.shape[1])
        for module in native.modules():
            stack.callback(module.register_forward_pre_hook(lambda m, _: watch.running.append(m)).remove)
            stack.callback(module.register_forward_hook(lambda *_: _forget(watch.running)).remove)
        stack.enter_context(watch)
        native(input_ids=ids, use_cache=False)
    return list(dict.fromkeys(watch.found))


def _forget(running: list[nn.Module]) -> None:
    running.pop()

"""Read named activations out of forward passes, and run no further than the last of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

from actpipe.errors import IdentityError
from actpipe.models.anatomy import Anatomy
from actpipe.models.attention import IMPLEMENTATION, AttentionCall, observe
from actpipe.models.taps import Side, Tap

Sink = Callable[[str, torch.Tensor], None]
"""Takes a name and its activation, `(batch, position, ...)`; the tensor is valid only during the call."""


class _EverythingCaptured(BaseException):
    """Leaves a forward pass once the last wanted activation is there."""


class Capture(AbstractContextManager["Capture"]):
    """Hooks for a set of names; while it is open, each `run` hands them to the sink.

    Args:
        anatomy: The model.
        taps: Where the wanted names are.
        sink: Called inside the forward pass, once per name and run.
        stop: Leave the forward pass after the last name; then `run` returns None.
    """

    def __init__(self, anatomy: Anatomy, taps: Iterable[Tap], sink: Sink, *, stop: bool) -> None:
        self._native = anatomy.native
        self._taps = tuple(taps)
        self._sink = sink
        self._stop = stop
        self._pending: set[str] = set()
        self._running = False
        self._batch_size = 0
        self._handles: list[Any] = []
        self._observed: list[nn.Module] = []
        self._implementation: str | None = None

    def __enter__(self) -> Self:
        places: dict[tuple[nn.Module, Side], list[Tap]] = defaultdict(list)
        for tap in self._taps:
            places[tap.module, tap.side].append(tap)
        if any(side == "attention" for _, side in places):
            self._implementation = self._native.config._attn_implementation
            self._native.set_attn_implementation(IMPLEMENTATION)
        for (module, side), taps in places.items():
            self._attach(module, side, taps)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        for module in self._observed:
            observe(module, None)
        if self._implementation is not None:
            self._native.set_attn_implementation(self._implementation)
        self._handles, self._observed, self._implementation = [], [], None

    def run(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        """Run the model on `(batch, position)` ids; return its output, or None where it was stopped.

        Raises:
            IdentityError: A name that was asked for did not come by.
        """
        self._pending = {tap.name for tap in self._taps}
        self._batch_size = input_ids.shape[0]
        output = None
        if self._pending or not self._stop:
            self._running = True
            try:
                output = self._native(input_ids=input_ids, use_cache=False, **kwargs)
            except _EverythingCaptured:
                output = None
            finally:
                self._running = False
        if self._pending:
            raise IdentityError(
                f"{sorted(self._pending)[0]} was never reached in the forward pass of "
                f"{type(self._native).__name__}: this version of transformers runs it by another way"
            )
        return output

    def _attach(self, module: nn.Module, side: Side, taps: list[Tap]) -> None:
        if side == "attention":

            def on_call(call: AttentionCall) -> None:
                self._deliver(taps, call)

            observe(module, on_call)
            self._observed.append(module)
        elif side == "input":

            def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                self._deliver(taps, args[0] if args else kwargs["hidden_states"])

            self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        else:

            def after(_: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
                self._deliver(taps, output[0] if isinstance(output, tuple) else output)

            self._handles.append(module.register_forward_hook(after))

    def _deliver(self, taps: list[Tap], value: Any) -> None:
        if not self._running:
            return
        for tap in taps:
            tensor = tap.read(value)
            if tensor.shape[0] != self._batch_size:
                tensor = tensor.expand(self._batch_size, *tensor.shape[1:])
            self._sink(tap.name, tensor)
            self._pending.discard(tap.name)
        if self._stop and not self._pending:
            raise _EverythingCaptured

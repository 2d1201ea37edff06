"""Read named activations out of forward passes, and run no further than the last of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn
from transformers import Cache

from actpipe.errors import IdentityError
from actpipe.models.anatomy import Anatomy
from actpipe.models.attention import OwnAttention, interface_watched, observe
from actpipe.models.attention_calls import AttentionSeen
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
        self._anatomy = anatomy
        self._native = anatomy.native
        self._taps = tuple(taps)
        self.fresh = frozenset(tap.name for tap in self._taps if tap.fresh)
        """Names whose tensors may be kept as they are; any other may be a view of what the model goes on to use."""
        self._sink = sink
        self._stop = stop
        self._pending: set[str] = set()
        self._running = False
        self._batch_size = self._n_tokens = self._n_held = 0
        self._held: Cache | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        places: dict[tuple[nn.Module, Side], list[Tap]] = defaultdict(list)
        for tap in self._taps:
            places[tap.module, tap.side].append(tap)
        with ExitStack() as stack:
            stack.enter_context(uncompiled(self._native))
            if any(side == "attention" for _, side in places):
                stack.enter_context(interface_watched())
            for (module, side), taps in places.items():
                self._attach(stack, module, side, taps)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def run(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        """Run the model on `(batch, position)` ids; return its output, or None where it was stopped.

        Raises:
            IdentityError: A name that was asked for did not come by.
        """
        self._pending = {tap.name for tap in self._taps}
        self._batch_size, self._n_tokens = input_ids.shape[0], input_ids.numel()
        self._held = kwargs.get("past_key_values")
        self._n_held = 0 if self._held is None else self._held.get_seq_length() + input_ids.shape[1]
        output = None
        if self._pending or not self._stop:
            self._running = True
            try:
                output = self._native(input_ids=input_ids, **{"use_cache": False, **kwargs})
            except _EverythingCaptured:
                output = None
            finally:
                self._running = False
        self._refuse_missing()
        return output

    @contextmanager
    def complete(self) -> Iterator[None]:
        """Deliver what one forward pass in here, run by others, shows of the names.

        Raises:
            IdentityError: A name that was asked for did not come by.
        """
        self._pending = {tap.name for tap in self._taps}
        native = self._native.register_forward_pre_hook(self._note_size, with_kwargs=True)
        self._running = True
        try:
            yield
        finally:
            self._running = False
            native.remove()
        self._refuse_missing()

    def _note_size(self, _: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._batch_size, self._n_tokens = kwargs["input_ids"].shape[0], kwargs["input_ids"].numel()

    def _refuse_missing(self) -> None:
        if self._pending:
            raise IdentityError(
                f"{sorted(self._pending)[0]} was never reached in the forward pass of "
                f"{type(self._native).__name__}: this version of transformers runs it by another way"
            )

    def _attach(self, stack: ExitStack, module: nn.Module, side: Side, taps: list[Tap]) -> None:
        if side in ("attention", "own_attention"):
            self._watch(stack, module, side, taps)
        elif side == "input":

            def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                self._deliver(taps, (args[0] if args else kwargs["hidden_states"],))

            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
        else:

            def after(_: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
                self._deliver(taps, output if isinstance(output, tuple | list) else (output,))

            stack.callback(module.register_forward_hook(after).remove)

    def _watch(self, stack: ExitStack, module: nn.Module, side: Side, taps: list[Tap]) -> None:
        def on_attention(seen: AttentionSeen) -> None:
            self._deliver(taps, (seen,))

        alibi = self._anatomy.alibi
        if side == "attention":
            observe(module, on_attention, alibi=alibi)
            stack.callback(observe, module, None)
        else:
            own = OwnAttention(module, on_attention, alibi)
            own.attach()
            stack.callback(own.detach)

    def _deliver(self, taps: list[Tap], values: Sequence[Any]) -> None:
        if not self._running:
            return
        for tap in taps:
            tensor = tap.read(values[tap.item])
            if tap.flat and tensor.shape[0] == self._n_tokens:
                tensor = tensor.reshape(self._batch_size, -1, *tensor.shape[1:])
            elif tensor.shape[0] != self._batch_size:
                tensor = tensor.expand(self._batch_size, *tensor.shape[1:])
            self._sink(tap.name, tensor)
            self._pending.discard(tap.name)
        if self._stop and not self._pending and self._is_held():
            raise _EverythingCaptured

    def _is_held(self) -> bool:
        """Whether the tokens that follow can be run: those of this pass count among what the cache holds."""
        return self._held is None or self._held.get_seq_length() == self._n_held


@contextmanager
def uncompiled(native: nn.Module) -> Iterator[None]:
    """Let a model run as it is written: what `torch.compile` made of it does not call hooks that came later."""
    compiled = any(
        module._compiled_call_impl is not None or hasattr(module.forward, "_torchdynamo_orig_callable")
        for module in native.modules()
    )
    if compiled:
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield

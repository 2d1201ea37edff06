"""Look on while attention runs: queries, keys, scores and pattern, without changing what it computes.

Most models hand queries, keys and values to a function that transformers looks up by name; that
lookup is where the first kind of onlooker stands. Models with code of their own are watched at the
tensor functions they call (softmax, or PyTorch's fused kernel). In both cases the model computes what
it always does, by the kernel it always uses; scores and patterns are computed beside it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface

from actpipe.errors import UnsupportedModelError
from actpipe.models.attention_calls import AttentionCall, AttentionSeen, SoftmaxCall

_WITHOUT_EFFECT = {"position_ids", "cache_position"}
"""Tensors that models pass along and that attention functions do not use."""


Observer = Callable[[AttentionSeen], None]

_observers: weakref.WeakKeyDictionary[nn.Module, tuple[Observer, bool]] = weakref.WeakKeyDictionary()


def observe(module: nn.Module, observer: Observer | None, *, alibi: bool = False) -> None:
    """Call `observer` whenever this module hands its queries to an attention function; None takes it off again."""
    if observer is None:
        _observers.pop(module, None)
    else:
        _observers[module] = observer, alibi


class Editor(Protocol):
    """Changes what goes through an attention layer."""

    observers: list[Observer]
    """Onlookers of a layer with code of its own, who are to see what the editor leaves."""

    @property
    def only_inputs(self) -> bool:
        """Whether queries, keys and values are all that it changes."""

    def inputs(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return queries, keys and values as they go on."""

    def run(self, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
        """Do the layer's work, with changed scores or pattern."""

    def pattern(self, pattern: torch.Tensor) -> torch.Tensor:
        """Return the pattern as it goes on."""


_editors: weakref.WeakKeyDictionary[nn.Module, Editor] = weakref.WeakKeyDictionary()


def edit(module: nn.Module, editor: Editor | None) -> None:
    """Let `editor` change what goes through this module's attention; None takes it off again."""
    if editor is None:
        _editors.pop(module, None)
    else:
        _editors[module] = editor


@contextmanager
def interface_watched() -> Iterator[None]:
    """Let observers see every attention function that a model looks up while this is open.

    The lookup is wrapped and not replaced by a function of our own: several models do other things
    under a name they do not know (leave out sparse masks, for one), without an error.
    """
    found = AttentionInterface.get_interface

    def get_interface(self: AttentionInterface, name: str, default: Callable[..., Any]) -> Callable[..., Any]:
        return partial(_shown, found(self, name, default))

    AttentionInterface.get_interface = get_interface
    try:
        yield
    finally:
        AttentionInterface.get_interface = found


def _shown(
    function: Callable[..., Any],
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Run an attention function, and show the call to the module's observer, if it has one."""
    if module in _editors:
        editor = _editors[module]
        query, key, value = editor.inputs(query, key, value)
        if not editor.only_inputs:
            call = _read_call(module, query, key, value, attention_mask, alibi=False, **kwargs)
            given = editor.run(call)
            if module in _observers:
                _observers[module][0](call)
            return given
    if module not in _observers:
        return function(module, query, key, value, attention_mask, *args, **kwargs)
    observer, alibi = _observers[module]
    call = _read_call(module, query, key, value, attention_mask, alibi=alibi, **kwargs)
    given = function(module, query, key, value, attention_mask, *args, **kwargs)
    call.output = given[0] if isinstance(given, tuple) else given
    observer(call)
    return given


def _read_call(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    alibi: bool,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    **others: Any,
) -> AttentionCall:
    unknown = [n for n, v in others.items() if isinstance(v, torch.Tensor) and n not in _WITHOUT_EFFECT]
    if unknown:
        raise UnsupportedModelError(
            f"{type(module).__name__} passes {', '.join(unknown)} to its attention function, "
            "which scores and patterns would not reflect; leave attention hooks of this model out"
        )
    if attention_mask is not None and attention_mask.ndim != 4:
        raise UnsupportedModelError(
            f"{type(module).__name__} runs a kernel that masks by itself; load with "
            "`attn_implementation='sdpa'` for scores and patterns"
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    return AttentionCall(
        query=query,
        key=key,
        value=value,
        mask=attention_mask,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        is_causal=bool(causal) and query.shape[2] > 1,
        window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
        bias=position_bias,
        alibi=alibi,
    )


@dataclass
class OwnAttention:
    """Watches one module that computes attention itself, by the tensor functions it calls."""

    module: nn.Module
    observer: Observer
    alibi: bool = False
    edits: bool = False
    """Whether the module's editor works here."""
    _forward: Callable[..., Any] | None = field(default=None, init=False)

    def attach(self) -> None:
        """Stand beside the module's forward, or behind the editor that stands there."""
        if self.module in _editors and not self.edits:
            _editors[self.module].observers.append(self.observer)
            return
        forward = self._forward = self.module.forward

        def watched(*args: Any, **kwargs: Any) -> Any:
            with _Watch(self.module, self._observers(), self._editor(), alibi=self.alibi):
                return forward(*args, **kwargs)

        self.module.forward = watched

    def detach(self) -> None:
        """Leave the module as it was."""
        if self.module in _editors and self.observer in _editors[self.module].observers:
            _editors[self.module].observers.remove(self.observer)
        if self._forward is not None:
            self.module.__dict__.pop("forward", None)
            if self.module.forward != self._forward:
                self.module.forward = self._forward
            self._forward = None

    def _editor(self) -> Editor | None:
        return _editors.get(self.module) if self.edits else None

    def _observers(self) -> list[Observer]:
        editor = self._editor()
        return [self.observer] if editor is None else [self.observer, *editor.observers]


_PRODUCTS = {"matmul", "__matmul__", "bmm", "baddbmm"}


class _Watch(TorchFunctionMode):
    """Sees the product of queries and keys, and the softmax over it."""

    def __init__(self, module: nn.Module, observers: list[Observer], editor: Editor | None, *, alibi: bool) -> None:
        super().__init__()
        self._module = module
        self._observers = observers
        self._editor = editor
        self._alibi = alibi
        self._factors: tuple[torch.Tensor, torch.Tensor] | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "scaled_dot_product_attention":
            call = self._as_call(*args, **kwargs)
            output = func(*args, **kwargs) if self._editor is None else self._editor.run(call)[0].transpose(1, 2)
            self._show(call)
            return output
        output = func(*args, **kwargs)
        if name in _PRODUCTS:
            left = kwargs.get("batch1", args[1] if len(args) > 2 else args[0])
            right = kwargs.get("batch2", args[-1])
            self._factors = left, right
        elif name == "softmax" and self._factors is not None:
            if self._editor is not None:
                output = self._editor.pattern(output.float()).to(output.dtype)
            self._see_softmax(args[0] if args else kwargs["input"], output, *self._factors)
        return output

    def _show(self, seen: AttentionSeen) -> None:
        for observer in self._observers:
            observer(seen)

    def _as_call(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,  # noqa: ARG002
        is_causal: bool = False,
        scale: float | None = None,
        **_: Any,
    ) -> AttentionCall:
        scaling = query.shape[-1] ** -0.5 if scale is None else scale
        return AttentionCall(query, key, value, attn_mask, scaling, is_causal, alibi=self._alibi)

    def _see_softmax(self, before: torch.Tensor, after: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
        n_queries, n_keys = before.shape[-2:]
        computed_in = next((p.dtype for p in self._module.parameters() if p.is_floating_point()), left.dtype)
        heads = int(getattr(self._module, "num_heads", 0) or getattr(self._module, "n_heads", before.shape[1]))
        shape = (-1, heads, n_queries, n_keys)
        key = right.transpose(-1, -2)
        self._show(
            SoftmaxCall(
                query=left.reshape(-1, heads, n_queries, left.shape[-1]),
                key=key.reshape(before.numel() // (heads * n_queries * n_keys), -1, n_keys, key.shape[-1]),
                before=before.reshape(shape),
                after=after.reshape(shape),
                least=torch.finfo(computed_in).min,
                alibi=self._alibi,
            )
        )

"""Replace activations, and look at their gradients, while the native model runs.

A hook function takes an activation as TransformerLens shapes it, and the point: `hook(tensor, point)`. What it
returns goes on in its place; None leaves it. A backward hook does the same to the gradient.

Source: TransformerLens 2.16, `HookedRootModule.run_with_hooks` and `HookPoint`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

from actpipe.errors import UnsupportedModelError
from actpipe.hooks import HookPoint
from actpipe.models.anatomy import Anatomy, norm_epsilon
from actpipe.models.attention import Observer, OwnAttention, edit, interface_watched
from actpipe.models.attention_calls import AttentionCall
from actpipe.models.taps import Side, Tap, norm_divided, norm_scale, tap_for

Hook = Callable[[torch.Tensor, HookPoint], torch.Tensor | None]

_COPIES = {"hook_attn_in", "hook_q_input", "hook_k_input", "hook_v_input"}
_AT_ATTENTION = {"attn.hook_rot_q", "attn.hook_rot_k", "attn.hook_attn_scores", "attn.hook_pattern"}
_BRANCHES = {"hook_attn_out", "hook_mlp_out"}


@dataclass
class _Point:
    """One hook point with the functions to be called there."""

    point: HookPoint
    forward: list[Hook] = field(default_factory=list)
    backward: list[Hook] = field(default_factory=list)
    flat: bool = False
    """Whether batch and positions pass there as one axis."""

    def _see_gradient(self, hook: Hook, gradient: torch.Tensor) -> torch.Tensor | None:
        return hook(gradient, self.point)

    def run(self, value: torch.Tensor) -> torch.Tensor:
        """Return what goes on in the place of an activation, with TransformerLens' axes."""
        if self.backward and not value.requires_grad:  # a model that is not trained: the graph begins here
            value = value.detach().requires_grad_()
        for hook in self.backward:
            value.register_hook(partial(self._see_gradient, hook))  # type: ignore[no-untyped-call]
        for hook in self.forward:
            new = hook(value, self.point)
            if new is None:
                continue
            if new.shape != value.shape:
                raise ValueError(
                    f"the hook on {self.point.name} returned shape {tuple(new.shape)} in the place of "
                    f"{tuple(value.shape)}"
                )
            value = new.to(value.dtype)
        return value


class Editing(AbstractContextManager["Editing"]):
    """Hook functions on a model, from entering to leaving.

    Args:
        anatomy: The model.
        points: Its hook points.
        fwd_hooks: `(name, function)` for activations.
        bwd_hooks: `(name, function)` for gradients; they are called in a later `backward()`.

    Raises:
        UnsupportedModelError: A point can be read but not replaced in this model; says which to use instead.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        points: Mapping[str, HookPoint],
        fwd_hooks: Iterable[tuple[str, Hook]],
        bwd_hooks: Iterable[tuple[str, Hook]],
    ) -> None:
        self._anatomy = anatomy
        self._wanted: dict[str, _Point] = {}
        for name, hook in fwd_hooks:
            self._at(points[name]).forward.append(hook)
        for name, hook in bwd_hooks:
            self._at(points[name]).backward.append(hook)
        self._batch: tuple[int, ...] = ()
        self._stack = ExitStack()

    def _at(self, point: HookPoint) -> _Point:
        if point.name not in self._wanted:
            _refuse_read_only(self._anatomy, point)
        return self._wanted.setdefault(point.name, _Point(point))

    def __enter__(self) -> Self:
        norms: dict[nn.Module, dict[str, _Point]] = defaultdict(dict)
        attention: dict[tuple[nn.Module, Side], dict[str, _Point]] = defaultdict(dict)
        with ExitStack() as stack:
            stack.callback(self._anatomy.native.register_forward_pre_hook(self._note_batch, with_kwargs=True).remove)
            for wanted in sorted(self._wanted.values(), key=lambda wanted: wanted.point.kind == "hook_resid_mid"):
                tap = tap_for(self._anatomy, wanted.point)
                kind = wanted.point.kind
                if kind.endswith(("hook_scale", "hook_normalized")):
                    norms[tap.module][kind.rpartition(".")[2]] = wanted
                    wanted.flat = tap.flat
                elif tap.side in ("attention", "own_attention"):
                    attention[tap.module, tap.side][kind.removeprefix("attn.hook_")] = wanted
                else:
                    self._attach(stack, tap, wanted)
            for module, points in norms.items():
                self._attach_norm(stack, module, points)
            if any(side == "attention" for _, side in attention):
                stack.enter_context(interface_watched())
            for (module, side), points in attention.items():
                self._attach_attention(stack, module, side, points)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _note_batch(self, _: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._batch = tuple(kwargs["input_ids"].shape)

    def _attach(self, stack: ExitStack, tap: Tap, wanted: _Point) -> None:
        kind, layer = wanted.point.kind, wanted.point.layer
        if kind == "hook_resid_mid":
            assert layer is not None
            self._attach_middle(stack, layer, wanted)
        elif kind == "attn.hook_result":
            stack.callback(tap.module.register_forward_hook(self._results(tap, wanted)).remove)
        elif tap.side == "input":
            _change_input(stack, tap.module, self._edit(tap, wanted))
        else:
            _change_output(stack, tap.module, self._edit(tap, wanted))

    def _run(self, wanted: _Point, value: torch.Tensor) -> torch.Tensor:
        """Run hooks on `(batch, position, ...)`, also where both pass as one axis."""
        if not wanted.flat or value.shape[0] == self._batch[0]:
            return wanted.run(value)
        return wanted.run(value.reshape(*self._batch, *value.shape[1:])).reshape(value.shape)

    def _edit(self, tap: Tap, wanted: _Point) -> Callable[[torch.Tensor], torch.Tensor]:
        scale = self._anatomy.branch_scale if wanted.point.kind in _BRANCHES else 1.0
        wanted.flat = tap.flat

        def change(tensor: torch.Tensor) -> torch.Tensor:
            """Let hooks change the elements that the tap reads; the others stay."""
            if wanted.point.kind == "hook_pos_embed":  # positions may be looked up once for all rows
                tensor = tap.read(tensor).expand(self._batch[0], -1, -1).contiguous()
            places = torch.arange(tensor.numel(), device=tensor.device).reshape(tensor.shape)
            places = places if scale != 1.0 else tap.read(places)
            new = self._run(wanted, tensor.reshape(-1)[places] * scale) / scale
            return tensor.reshape(-1).index_copy(0, places.reshape(-1), new.reshape(-1)).reshape(tensor.shape)

        return change

    def _attach_middle(self, stack: ExitStack, layer: int, wanted: _Point) -> None:
        """Change the stream between the branches: what attention adds is what changes it for both readers."""
        scale = self._anatomy.branch_scale
        entering: list[torch.Tensor] = []

        def remember(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            entering[:] = [args[0] if args else kwargs["hidden_states"]]

        stack.callback(self._anatomy.blocks[layer].register_forward_pre_hook(remember, with_kwargs=True).remove)
        out = HookPoint(f"blocks.{layer}.hook_attn_out", ("d_model",), layer, "")

        def change(added: torch.Tensor) -> torch.Tensor:
            stream = entering[0]
            return (wanted.run(stream + added * scale) - stream) / scale

        _change_output(stack, tap_for(self._anatomy, out).module, change)

    def _results(self, tap: Tap, wanted: _Point) -> Callable[..., torch.Tensor]:
        """Put together what attention puts out from what each head writes."""
        scale = self._anatomy.branch_scale

        def after(module: nn.Module, args: tuple[Any, ...], _: torch.Tensor) -> torch.Tensor:
            results = wanted.run(tap.read(args[0])).sum(2) / scale
            bias = getattr(module, "bias", None)
            return results if bias is None else results + bias

        return after

    def _attach_norm(self, stack: ExitStack, module: nn.Module, points: dict[str, _Point]) -> None:
        family = self._anatomy.family
        epsilon = norm_epsilon(module, family.norm_epsilon)

        def after(_: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
            tensor, out = args[0], output
            if "hook_scale" in points or family.norm == "RMS":
                scale = norm_scale(tensor, family.norm, epsilon)
                if "hook_scale" in points:
                    scale = self._run(points["hook_scale"], scale)
                value = norm_divided(tensor, family.norm, scale)
                if family.norm == "RMS" and "hook_normalized" in points:
                    value = self._run(points["hook_normalized"], value)
                out = _affine(module, value, family.norm_offset).to(output.dtype)
            if family.norm == "LN" and "hook_normalized" in points:
                out = self._run(points["hook_normalized"], out)
            return out

        stack.callback(module.register_forward_hook(after).remove)

    def _attach_attention(self, stack: ExitStack, module: nn.Module, side: Side, points: dict[str, _Point]) -> None:
        edit(module, AttentionEditor(points))
        stack.callback(edit, module, None)
        if side == "own_attention":
            own = OwnAttention(module, lambda _: None, self._anatomy.alibi, edits=True)
            own.attach()
            stack.callback(own.detach)


@dataclass
class AttentionEditor:
    """Changes what goes through one attention layer; by `rot_q`, `rot_k`, `v`, `attn_scores`, `pattern`."""

    points: Mapping[str, _Point]
    observers: list[Observer] = field(default_factory=list)

    @property
    def only_inputs(self) -> bool:
        """Whether the layer's own kernel can still do the work."""
        return not {"attn_scores", "pattern"} & set(self.points)

    def inputs(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return queries, keys and values, `(batch, head, position, d)`, as the hooks leave them."""
        names = ("rot_q", "rot_k", "v")
        return tuple(
            self.points[name].run(tensor.transpose(1, 2)).transpose(1, 2) if name in self.points else tensor
            for name, tensor in zip(names, tensors, strict=True)
        )

    def run(self, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `(batch, position, head, d_head)` and the pattern, computed here because hooks change them."""
        assert call.value is not None
        if "attn_scores" in self.points:
            call.scores = self.points["attn_scores"].run(call.scores)
        pattern = call.pattern = self.pattern(call.pattern)
        value = call.value.repeat_interleave(pattern.shape[1] // call.value.shape[1], dim=1)
        call.output = (pattern.to(value.dtype) @ value).transpose(1, 2)
        return call.output, pattern

    def pattern(self, pattern: torch.Tensor) -> torch.Tensor:
        """Return the pattern as the hooks leave it."""
        return self.points["pattern"].run(pattern) if "pattern" in self.points else pattern


def _refuse_read_only(anatomy: Anatomy, point: HookPoint) -> None:
    kind, layer = point.kind, point.layer
    instead = ""
    if kind in _COPIES:
        instead = "hook_resid_pre changes all heads' input, hook_q, hook_k and hook_v what they compute of it"
    elif point.integer or kind.startswith("mlp.hook_expert") or kind == "mlp.hook_router_logits":
        instead = "hook_mlp_out is what the choice leads to"
    elif kind.startswith(("attn.q_norm", "attn.k_norm")):
        instead = "hook_rot_q and hook_rot_k are what they lead to"
    elif kind == "attn.hook_z_ungated":
        instead = "hook_z follows it"
    elif layer is not None and anatomy.family_at(layer).sees_attention_by == "softmax" and kind in _AT_ATTENTION:
        instead = "" if kind == "attn.hook_pattern" else "hook_q, hook_k and hook_pattern can be replaced"
    elif kind == "hook_mlp_in" and layer is not None and anatomy.shape.blocks[layer].parallel:
        instead = "hook_resid_pre changes it together with attention's input"
    if instead:
        raise UnsupportedModelError(
            f"{point.name} of this {anatomy.family.name} model can be read but not replaced; {instead}"
        )


def _change_input(stack: ExitStack, module: nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)


def _change_output(stack: ExitStack, module: nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    def after(_: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, tuple | list):
            return type(output)((change(output[0]), *output[1:]))
        return change(output)

    stack.callback(module.register_forward_hook(after).remove)


def _affine(norm: nn.Module, value: torch.Tensor, offset: float) -> torch.Tensor:
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    value = value if weight is None else value * (weight + offset)
    return value if bias is None else value + bias

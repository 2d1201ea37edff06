"""Forward passes as people ask for them: with a cache, with hook functions, from a layer on, up to a layer.

Source: TransformerLens 2.16, `HookedTransformer.forward`, `run_with_cache`, `run_with_hooks`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import PreTrainedModel

from actpipe.errors import UnsupportedModelError
from actpipe.hooks import HookName, HookPoint, ModelShape
from actpipe.models.anatomy import Anatomy
from actpipe.models.caching import KeyValueCache
from actpipe.models.capture import Capture, Sink
from actpipe.models.conventions import Convention
from actpipe.models.editing import Editing, Hook
from actpipe.models.prompts import PaddingSide, PromptMethods

InputIds = torch.Tensor | npt.NDArray[Any] | Sequence[int] | Sequence[Sequence[int]]
Input = str | Sequence[str] | InputIds
"""A text, texts, or token ids; with `start_at_layer` the residual stream `(batch, position, d_model)`."""
ReturnType = Literal["logits", "loss", "both"] | None
NamesFilter = str | Sequence[HookName] | Callable[[str], bool] | None


class Output(NamedTuple):
    """What `return_type="both"` gives."""

    logits: torch.Tensor
    loss: torch.Tensor


class PassMethods(PromptMethods, ABC):
    """The ways to run a hooked model."""

    native: PreTrainedModel
    anatomy: Anatomy
    shape: ModelShape
    hook_points: dict[str, HookPoint]
    convention: Convention
    editing: int
    """How many sets of hook functions are on the model."""

    @abstractmethod
    def select(self, patterns: Iterable[HookName]) -> tuple[str, ...]:
        """Resolve hook names and patterns."""

    @abstractmethod
    def capture(self, names: Iterable[str], sink: Sink, *, stop: bool) -> Capture:
        """Return hooks for exact names."""

    @abstractmethod
    def conventional(self, logits: torch.Tensor) -> torch.Tensor:
        """Return logits as the convention has them."""

    @abstractmethod
    def inputs_for(
        self,
        input: Input,  # noqa: A002  # TransformerLens' name
        attention_mask: InputIds | None,
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = None,
        token_type_ids: InputIds | None = None,
        decoder_input_ids: InputIds | None = None,
    ) -> dict[str, torch.Tensor]:
        """Return what the native model is given; see `forward` for the arguments."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model; see `forward`."""
        return self.forward(*args, **kwargs)

    def forward(
        self,
        input: Input,  # noqa: A002  # TransformerLens' name
        attention_mask: InputIds | None = None,
        *,
        return_type: ReturnType = "logits",
        loss_per_token: bool = False,
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = None,
        start_at_layer: int | None = None,
        stop_at_layer: int | None = None,
        tokens: InputIds | None = None,
        token_type_ids: InputIds | None = None,
        decoder_input_ids: InputIds | None = None,
        past_kv_cache: KeyValueCache | None = None,
    ) -> Any:
        """Run the model.

        Args:
            input: A text, texts, or token ids `(batch, position)`; with `start_at_layer` the residual stream.
            attention_mask: `(batch, position)`, 1 at real tokens; worked out for texts. Positions count real tokens.
            return_type: `logits`, `loss`, `both`, or None for nothing.
            loss_per_token: Whether the loss is `(batch, position - 1)` instead of its mean.
            prepend_bos: Whether texts begin with BOS; the family's custom by default.
            padding_side: Where shorter texts are padded; the tokenizer's custom by default.
            start_at_layer: The first block to run, with `input` as the stream that enters it; negative counts
                from the last.
            stop_at_layer: The first block not to run; the stream that would enter it is returned.
            tokens: Ids behind the stream of `start_at_layer`, for the loss.
            token_type_ids: Segment of each token, for models that tell segments apart (BERT); all 0 by default.
            decoder_input_ids: `(batch, position)` for encoder-decoders (T5, BART); by default the one token with
                which the decoder starts.
            past_kv_cache: What stands before the input, from `new_kv_cache()` and earlier passes; the input is added
                to it.

        Returns:
            Logits `(batch, position, d_vocab)` as the bare model computes them, an encoder-decoder's at the
            decoder's positions; or what else was asked for.

        Raises:
            ValueError: The ids do not fit the model, or the arguments each other.
        """
        more: dict[str, Any] = {"token_type_ids": token_type_ids, "decoder_input_ids": decoder_input_ids}
        with ExitStack() as stack:
            if start_at_layer is None:
                inputs = self.inputs_for(input, attention_mask, prepend_bos, padding_side, **more)
            else:
                residual = _as_stream(input, self.shape.d_model)
                ids = torch.zeros(residual.shape[:2], dtype=torch.long) if tokens is None else tokens
                inputs = self.inputs_for(ids, attention_mask, **more)
                stack.enter_context(_entering(self, self.layer(start_at_layer), residual))
            if past_kv_cache is not None:
                inputs = past_kv_cache.extend(inputs)
            if not self.editing:
                stack.enter_context(torch.no_grad())
            if stop_at_layer is not None:
                return self.run_up_to(stop_at_layer, inputs)
            logits = self.conventional(logits_of(self.native(**{"use_cache": False, **inputs})))
        if return_type is None:
            return None
        if return_type == "logits":
            return logits
        if start_at_layer is not None and tokens is None:
            raise ValueError("the loss needs `tokens`: the ids behind the stream that enters start_at_layer")
        loss = next_token_loss(logits, inputs["input_ids"], inputs.get("attention_mask"), per_token=loss_per_token)
        return loss if return_type == "loss" else Output(logits, loss)

    def run_with_cache(
        self,
        input: Input,  # noqa: A002  # TransformerLens' name
        attention_mask: InputIds | None = None,
        names: Iterable[HookName] | None = None,
        *,
        names_filter: NamesFilter = None,
        device: str | torch.device | None = None,
        remove_batch_dim: bool = False,
        stop_at_layer: int | None = None,
        **arguments: Any,
    ) -> tuple[Any, dict[str, torch.Tensor]]:
        """Run the model and keep named activations.

        Args:
            input: As `forward` takes it.
            attention_mask: As `forward` takes it.
            names: Names, patterns or short names (`"k6"`, `("resid_post", -1)`); all hook points by
                default, but for those that another gives (`hook_result`, `hook_q_input`, `hook_mlp_in`).
            names_filter: The same as TransformerLens has it: a name, names, or a function from name to bool.
            device: Where to keep them; where they are computed by default.
            remove_batch_dim: Whether to drop the first axis, for a batch of one.
            stop_at_layer: The first block not to run; names of blocks before it are kept.
            **arguments: As `forward` takes them.

        Returns:
            What `forward` returns, and a dict from name to tensor in firing order, with TransformerLens'
            shapes: `(batch, position, ...)`, scores and patterns `(batch, head, query_position, key_position)`.

        Raises:
            UnknownHookError: A name means nothing for this model.
            ValueError: The ids do not fit the model.
        """
        selected = self._select(names, names_filter, stop_at_layer)
        kept: dict[str, torch.Tensor] = {}

        def keep(name: str, tensor: torch.Tensor) -> None:
            kept[name] = tensor if name in capture.fresh and not self.editing else tensor.clone()
            kept[name] = kept[name] if device is None else kept[name].to(device)

        with self.capture(selected, keep, stop=False) as capture, capture.complete():
            output = self.forward(input, attention_mask, stop_at_layer=stop_at_layer, **arguments)
        cache = {name: kept[name] for name in selected}
        for name in selected:
            if self.hook_points[name].looks_at_keys:
                cache[name] = cache[name].transpose(1, 2)
        if remove_batch_dim:
            cache = {name: _only_row(name, tensor) for name, tensor in cache.items()}
        return output, cache

    def _select(
        self, names: Iterable[HookName] | None, names_filter: NamesFilter, stop_at_layer: int | None
    ) -> tuple[str, ...]:
        if names is not None and names_filter is not None:
            raise ValueError("give names or names_filter, not both")
        if callable(names_filter):
            selected = tuple(name for name in self.hook_points if names_filter(name))
        elif names_filter is not None:
            selected = self.select([names_filter] if isinstance(names_filter, str) else names_filter)
        else:
            selected = self.select(["*"] if names is None else names)
        if stop_at_layer is None:
            return selected
        last = self.shape.n_layers if stop_at_layer == self.shape.n_layers else self.layer(stop_at_layer)
        reached = [name for name in selected if _is_before(self.hook_points[name], last)]
        if names is not None and len(reached) < len(selected):
            missed = next(name for name in selected if name not in reached)
            raise ValueError(f"{missed} is not reached before layer {last}, where the pass stops")
        return tuple(reached)

    @contextmanager
    def hooks(
        self,
        fwd_hooks: Iterable[tuple[HookName | Callable[[str], bool], Hook]] = (),
        bwd_hooks: Iterable[tuple[HookName | Callable[[str], bool], Hook]] = (),
    ) -> Iterator[Self]:
        """Keep hook functions on the model while this is open; see `run_with_hooks`."""
        if self.convention != "native":
            raise UnsupportedModelError(
                "the processed convention can be read and not written; load the model with convention='native'"
            )
        with Editing(self.anatomy, self.hook_points, self._named(fwd_hooks), self._named(bwd_hooks)):
            self.editing += 1
            try:
                yield self
            finally:
                self.editing -= 1

    def _named(self, hooks: Iterable[tuple[HookName | Callable[[str], bool], Hook]]) -> Iterator[tuple[str, Hook]]:
        for pattern, hook in hooks:
            names = filter(pattern, self.hook_points) if callable(pattern) else self.select([pattern])
            for name in names:
                yield name, hook

    def run_with_hooks(
        self,
        *arguments: Any,
        fwd_hooks: Iterable[tuple[HookName | Callable[[str], bool], Hook]] = (),
        bwd_hooks: Iterable[tuple[HookName | Callable[[str], bool], Hook]] = (),
        **named_arguments: Any,
    ) -> Any:
        """Run the model with functions that read or replace activations.

        Args:
            *arguments: As `forward` takes them.
            fwd_hooks: `(name, function)`; the function takes the activation and the hook point, and what it
                returns takes the activation's place; None leaves it. A name may be a pattern, a short name,
                or a function from name to bool.
            bwd_hooks: The same for gradients, in a later `backward()` of what this returns.
            **named_arguments: As `forward` takes them.

        Raises:
            UnknownHookError: A name means nothing for this model.
            UnsupportedModelError: A hook point can be read but not replaced; says which one to use instead.
            ValueError: A function returned another shape.
        """
        with self.hooks(fwd_hooks, bwd_hooks):
            return self.forward(*arguments, **named_arguments)

    def layer(self, index: int) -> int:
        """Return a layer's number, counted from the first.

        Raises:
            ValueError: There is no such layer.
        """
        n_layers = self.shape.n_layers
        if not -n_layers <= index < n_layers:
            raise ValueError(f"layer {index} does not exist: this model has layers 0 to {n_layers - 1}")
        return index % n_layers

    def run_up_to(self, layer: int, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the residual stream `(batch, position, d_model)` that would enter a block, and run no further."""
        n_layers = self.shape.n_layers
        if layer == n_layers:
            last = self.shape.blocks[-1]
            name = f"{self.shape.block_name(n_layers - 1)}.hook_{'normalized_' if last.post_norm else ''}resid_post"
        else:
            name = f"{self.shape.block_name(self.layer(layer))}.hook_resid_pre"
        kept: list[torch.Tensor] = []
        with self.capture([name], lambda _, tensor: kept.append(tensor), stop=True) as capture:
            capture.run(**inputs)
        return kept[0]

    @cached_property
    def block_outputs(self) -> tuple[type, ...]:
        """What each block gives: a tensor, or a tuple of which it is the first."""
        found: dict[nn.Module, type] = {}
        with ExitStack() as stack, torch.no_grad():
            for block in self.anatomy.blocks:
                note = block.register_forward_hook(lambda module, _, output: found.update({module: type(output)}))
                stack.callback(note.remove)
            self.native(use_cache=False, **self.inputs_for(torch.zeros((1, 1), dtype=torch.long), None))
        return tuple(found[block] for block in self.anatomy.blocks)


@contextmanager
def _entering(model: PassMethods, start: int, residual: torch.Tensor) -> Iterator[None]:
    """Let the stream enter at a block; those before it pass on what they get."""
    if model.shape.encoder_decoder:
        raise UnsupportedModelError("start_at_layer is for models of one stack, and this one has two")
    kinds = model.block_outputs

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        stream = args[0] if args else kwargs["hidden_states"]
        new = residual.to(stream)
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

    with ExitStack() as stack:
        for block, kind in zip(model.anatomy.blocks[:start], kinds, strict=False):
            stack.enter_context(_skipped(block, kind))
        block = model.anatomy.blocks[start]
        stack.callback(block.register_forward_pre_hook(enter, with_kwargs=True, prepend=True).remove)
        yield


@contextmanager
def _skipped(block: nn.Module, kind: type) -> Iterator[None]:
    def forward(hidden_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        return kind((hidden_states, None)) if kind in (tuple, list) else hidden_states

    own = block.__dict__.get("forward")
    block.forward = forward
    try:
        yield
    finally:
        block.__dict__.pop("forward")
        if own is not None:
            block.forward = own


def _as_stream(residual: Any, d_model: int) -> torch.Tensor:
    if not isinstance(residual, torch.Tensor) or residual.ndim != 3 or residual.shape[-1] != d_model:
        shape = tuple(residual.shape) if isinstance(residual, torch.Tensor) else type(residual).__name__
        raise ValueError(f"start_at_layer takes a residual stream (batch, position, {d_model}), got {shape}")
    return residual


def _is_before(point: HookPoint, layer: int) -> bool:
    if point.layer is None:
        return "embed" in point.name or point.name == "hook_tokens"
    return point.layer < layer


def _only_row(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.shape[0] != 1:
        raise ValueError(f"remove_batch_dim is for a batch of one, and {name} has {tensor.shape[0]} rows")
    return tensor[0]


def logits_of(output: Any) -> torch.Tensor:
    """Return the logits over the vocabulary, which a model with a second head names otherwise."""
    logits: torch.Tensor = output.prediction_logits if hasattr(output, "prediction_logits") else output.logits
    return logits


def next_token_loss(
    logits: torch.Tensor, tokens: torch.Tensor, attention_mask: torch.Tensor | None, *, per_token: bool
) -> torch.Tensor:
    """Return the cross-entropy of each next token in nats, `(batch, position - 1)`, or its mean over real ones.

    Source:
        TransformerLens 2.16, `utils.lm_cross_entropy_loss`: a pair counts where both its tokens are real.
    """
    targets = tokens[:, 1:].to(logits.device)
    losses = -logits[:, :-1].log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    if attention_mask is None:
        return losses if per_token else losses.mean()
    real = (attention_mask[:, 1:] & attention_mask[:, :-1]).to(losses)
    losses = losses * real
    return losses if per_token else losses.sum() / real.sum()


def as_tensor(ids: InputIds) -> torch.Tensor:
    """Return ids as a tensor; arrays are copied, as they may be read-only views of a store."""
    return ids if isinstance(ids, torch.Tensor) else torch.from_numpy(np.array(ids))

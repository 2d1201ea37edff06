"""A native model that answers to TransformerLens' names."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from transformers import PreTrainedModel

from actpipe.errors import ModelLoadError, UnknownHookError
from actpipe.hooks import HookName, HookPoint, ModelShape, build_catalogue, select_hooks
from actpipe.models.anatomy import Anatomy, find_anatomy
from actpipe.models.caching import KeyValueCache, real_positions
from actpipe.models.capture import Capture, Sink
from actpipe.models.conventions import Convention, Processed, check_convention
from actpipe.models.encoder_inputs import add_encoder_inputs
from actpipe.models.families.entry import Family
from actpipe.models.generation import GenerationMethods
from actpipe.models.loading import (
    DeviceMap,
    MaxMemory,
    ModelSource,
    compute_dtype,
    identify,
    load_config,
    load_native,
    load_skeleton,
    load_tokenizer,
)
from actpipe.models.parameters import execution_device
from actpipe.models.passes import Input, InputIds, as_tensor
from actpipe.models.prompts import PaddingSide, Prompts, is_text
from actpipe.models.recognition import family_for
from actpipe.models.taps import UNEMBED_INPUT, Tap, tap_for, unembed_input_tap
from actpipe.models.weights import Weights
from actpipe.schemas.manifest import ModelIdentity

_CANNOT_BE_SPLIT = (
    "tensor_parallel needs a model of a family with an entry of its own, in the convention `native`, and places it by "
    "itself: leave out `device` and `device_map`"
)


class ModelSpec:
    """What is known of a model without its weights: shape, hook points, tokenizer, identity."""

    def __init__(self, source: ModelSource, dtype: str = "auto", convention: Convention = "native") -> None:
        self.source = source
        self.config = load_config(source)
        family = family_for(self.config, trust_remote_code=source.trust_remote_code)
        self.anatomy = find_anatomy(load_skeleton(source, self.config), family)
        self._dtype = dtype
        self.convention: Convention = convention
        if convention == "processed":
            check_convention(self.anatomy)

    @property
    def shape(self) -> ModelShape:
        """Sizes of the model."""
        return self.anatomy.shape

    @cached_property
    def hook_points(self) -> dict[str, HookPoint]:
        """Every hook point by name, in firing order."""
        return build_catalogue(self.shape)

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return load_tokenizer(self.source)

    @cached_property
    def identity(self) -> ModelIdentity:
        """Which model this is, and what it computes in."""
        dtype = compute_dtype(self.config, self._dtype)
        return identify(self.source, self.config, family=self.anatomy.family.name, dtype=dtype)

    @property
    def n_parameters(self) -> int:
        """Number of weights; tied ones count once."""
        return sum(parameter.numel() for parameter in self.anatomy.native.parameters())

    @property
    def n_bytes(self) -> int:
        """Bytes of the weights as they are loaded; those of a quantised checkpoint as if it were not."""
        return self.n_parameters * self._item_bytes

    @property
    def largest_block_bytes(self) -> int:
        """Bytes of the largest block, the most that is never spread over devices."""
        sizes = [sum(parameter.numel() for parameter in block.parameters()) for block in self.anatomy.blocks]
        return max(sizes) * self._item_bytes

    @property
    def _item_bytes(self) -> int:
        dtype: torch.dtype = getattr(torch, self.identity.dtype)
        return dtype.itemsize

    def select(self, patterns: Iterable[HookName]) -> tuple[str, ...]:
        """Resolve hook names and patterns; see `actpipe.hooks.select_hooks`."""
        return select_hooks(patterns, self.hook_points, n_layers=self.shape.n_layers)


class HookedModel(GenerationMethods):
    """A language model of transformers, run as it is, read by TransformerLens' names.

    Args:
        native: The model.
        source: Where it came from.
        convention: `native` for its own activations; `processed` for those that it would have with
            folded norms and centred weights, as `HookedTransformer.from_pretrained` gives them by default.
        family: Where its parts are, if not as the entry for its type, or its structure, says.
    """

    def __init__(
        self,
        native: PreTrainedModel,
        source: ModelSource,
        convention: Convention = "native",
        family: Family | None = None,
    ) -> None:
        self.native = native
        self.source = source
        family = family or family_for(native.config, trust_remote_code=source.trust_remote_code)
        self.anatomy: Anatomy = find_anatomy(native, family)
        self.shape: ModelShape = self.anatomy.shape
        self.hook_points: dict[str, HookPoint] = build_catalogue(self.shape)
        self.weights = Weights(self.anatomy)
        self.convention: Convention = convention
        self.editing = 0
        self._cache_is_proven = False
        self._processed = Processed(self.anatomy, self.weights) if convention == "processed" else None

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        *,
        revision: str | None = None,
        dtype: str = "auto",
        device: str = "auto",
        device_map: DeviceMap = None,
        max_memory: MaxMemory = None,
        offload_folder: str | Path | None = None,
        tensor_parallel: bool = False,
        trust_remote_code: bool = False,
        convention: Convention = "native",
    ) -> Self:
        """Load a model from the hub or a folder.

        Args:
            name: Hub name (`gpt2`) or a folder.
            revision: Branch, tag or commit on the hub.
            dtype: `float32`, `float16`, `bfloat16`, or `auto` for the checkpoint's own.
            device: `cpu`, `cuda`, `cuda:1`; `auto` takes an accelerator where there is one.
            device_map: Spread the model over devices, the host's memory and the disk with accelerate, in place of
                `device`.
            max_memory: Most that may be put on each of those: bytes, or `40GiB`, by number or `cpu`.
            offload_folder: Where weights wait that are put on the disk; without it, in the checkpoint's own files.
            tensor_parallel: Split every matrix over the processes of `torchrun`, which then all run the same calls.
                Names of which each process has a piece only are not offered, nor are weights.
            trust_remote_code: Run code that comes with the model.
            convention: `native`, or `processed` for TransformerLens' default weight processing.

        Raises:
            ModelLoadError: There is no such model, or it cannot be read.
            UnsupportedModelError: No entry says where its parts are.
        """
        source = ModelSource(name, revision, trust_remote_code)
        return cls.from_source(
            source,
            dtype=dtype,
            device=device,
            device_map=device_map,
            max_memory=max_memory,
            offload_folder=offload_folder,
            tensor_parallel=tensor_parallel,
            convention=convention,
        )

    @classmethod
    def from_source(
        cls,
        source: ModelSource,
        *,
        dtype: str,
        device: str,
        device_map: DeviceMap,
        max_memory: MaxMemory = None,
        offload_folder: str | Path | None = None,
        tensor_parallel: bool = False,
        convention: Convention = "native",
    ) -> Self:
        """Load a model; see `from_pretrained`."""
        config = load_config(source)
        skeleton, family = load_skeleton(source, config), family_for(config, trust_remote_code=source.trust_remote_code)
        find_anatomy(skeleton, family)
        split = None
        if tensor_parallel:
            from actpipe.models.sharding import kinds_in_pieces, split_over_processes  # it runs hooked models

            if device_map is not None or device != "auto" or convention != "native" or family.by_structure:
                raise ModelLoadError(_CANNOT_BE_SPLIT)
            split = split_over_processes(skeleton)
        native = load_native(
            source,
            dtype=dtype,
            device=device,
            device_map=device_map,
            max_memory=max_memory,
            offload_folder=offload_folder,
            split=split,
        )
        model = cls(native, source, convention)
        if split is not None:
            withheld = {**family.withheld, **kinds_in_pieces(model)}
            return cls(native, source, convention, replace(family, withheld=withheld))
        if not model.anatomy.family.by_structure:
            return model
        from actpipe.models.recognition.recognising import prove_loaded  # it runs hooked models: imported last

        return cls(native, source, convention, prove_loaded(model))

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return load_tokenizer(self.source)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """What ends a text, by the model's own settings for generation, or else by its tokenizer; maybe nothing."""
        found = getattr(self.native.generation_config, "eos_token_id", None)
        found = self.tokenizer.eos_token_id if found is None else found
        return tuple(found) if isinstance(found, list | tuple) else () if found is None else (int(found),)

    @cached_property
    def prompts(self) -> Prompts:
        """The tokenizer as prompts need it."""
        family = self.anatomy.family
        return Prompts(
            self.tokenizer, self.shape.n_ctx, family.default_prepend_bos, with_special_tokens=family.task != "causal"
        )

    @property
    def device(self) -> torch.device:
        """Where inputs go: the device that the embedding computes on."""
        return execution_device(self.anatomy.embed)

    @property
    def dtype(self) -> torch.dtype:
        """Element type of the computation."""
        return self.native.dtype

    def select(self, patterns: Iterable[HookName]) -> tuple[str, ...]:
        """Resolve hook names and patterns; see `actpipe.hooks.select_hooks`.

        Raises:
            UnknownHookError: A pattern matches nothing, or only what is withheld of this model; says why.
        """
        patterns = tuple(patterns)
        try:
            return select_hooks(patterns, self.hook_points, n_layers=self.shape.n_layers)
        except UnknownHookError as error:
            whole = build_catalogue(replace(self.shape, withheld=()))
            for name in select_hooks(patterns, whole, n_layers=self.shape.n_layers):
                reason = self.anatomy.family.withheld.get(whole[name].kind)
                if reason is not None:
                    raise UnknownHookError(f"{name} is not offered of this model: {reason}") from error
            raise

    def capture(self, names: Iterable[str], sink: Sink, *, stop: bool) -> Capture:
        """Return hooks for exact names (`UNEMBED_INPUT` too), to be used in a `with` block; see `Capture`."""
        taps = [self._tap(name) for name in names]
        return Capture(self.anatomy, taps, sink, stop=stop)

    def _tap(self, name: str) -> Tap:
        if name == UNEMBED_INPUT:
            return unembed_input_tap(self.anatomy)
        point = self.hook_points[name]
        tap = tap_for(self.anatomy, point)
        return tap if self._processed is None else self._processed.tap(tap, point)

    def new_kv_cache(self) -> KeyValueCache:
        """Return an empty cache of keys and values, for `forward(..., past_kv_cache=...)`.

        Raises:
            UnsupportedModelError: The model has none, or does not compute the same with it.
        """
        cache = KeyValueCache(self.anatomy)
        if not self._cache_is_proven:
            from actpipe.models.cache_proof import prove_cache  # it runs hooked models: imported last

            prove_cache(self)
            self._cache_is_proven = True
        return cache

    def conventional(self, logits: torch.Tensor) -> torch.Tensor:
        """Return logits as the convention has them."""
        return logits if self._processed is None else self._processed.logits(logits)

    def unembed(self, normalized: torch.Tensor) -> torch.Tensor:
        """Return the logits of `UNEMBED_INPUT` `(..., d_model)`, as the model's head computes them."""
        logits: torch.Tensor = self.anatomy.unembed(normalized)
        if self.anatomy.logit_scale != 1.0:
            logits = logits * self.anatomy.logit_scale
        if self.anatomy.family.logit_bias is not None:
            logits = logits + self.weights["unembed.b_U"]
        cap = self.shape.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

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
        ids: Any = input
        if is_text(input):
            texts: Any = input
            ids, mask = self.prompts.encode(texts, prepend_bos=prepend_bos, padding_side=padding_side)
            attention_mask = mask if attention_mask is None and not bool(mask.all()) else attention_mask
        inputs = self._ids_and_mask(ids, attention_mask)
        add_encoder_inputs(inputs, self.anatomy, token_type_ids, decoder_input_ids)
        return inputs

    def _ids_and_mask(self, input_ids: InputIds, attention_mask: InputIds | None) -> dict[str, torch.Tensor]:
        ids = as_tensor(input_ids)
        ids = ids[None] if ids.ndim == 1 else ids
        self.check_ids(ids)
        inputs = {"input_ids": ids.to(self.device, torch.long)}
        if attention_mask is None:
            return inputs
        mask = as_tensor(attention_mask)
        if mask.shape != ids.shape:
            raise ValueError(f"attention_mask is {tuple(mask.shape)}, input_ids are {tuple(ids.shape)}")
        mask = mask.to(self.device, torch.long)
        inputs["attention_mask"] = mask
        positions = real_positions(mask)
        return inputs if positions is None else {**inputs, "position_ids": positions}

    def check_ids(self, ids: torch.Tensor) -> None:
        """Refuse ids that the model cannot take.

        Raises:
            ValueError: Wrong rank, longer than the context, or outside the vocabulary.
        """
        if ids.ndim != 2 or ids.numel() == 0:
            raise ValueError(f"input_ids must be (batch, position) and not empty, got shape {tuple(ids.shape)}")
        if self.shape.learned_positions and ids.shape[1] > self.shape.n_ctx:
            raise ValueError(f"{ids.shape[1]} positions, but this model has learned only {self.shape.n_ctx}")
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.shape.d_vocab:
            raise ValueError(f"token id {low if low < 0 else high} is outside the vocabulary of {self.shape.d_vocab}")

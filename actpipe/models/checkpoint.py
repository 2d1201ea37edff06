"""A model's weights in TransformerLens' layout, read from its files without loading the model."""

from __future__ import annotations

import json
import re
from copy import deepcopy
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.utils import cached_file

from actpipe.errors import ModelLoadError, UnsupportedModelError
from actpipe.models.anatomy import find_anatomy
from actpipe.models.loading import ModelSource, load_config, load_skeleton
from actpipe.models.recognition import family_for
from actpipe.models.weights import Weights

_ONE_FILE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_INSTEAD = "load the model with `HookedModel.from_pretrained` and take its `weights`"


def open_weights(
    name: str, *, revision: str | None = None, dtype: str = "auto", trust_remote_code: bool = False
) -> Weights:
    """Open the weights of a model under TransformerLens' names, without loading the model.

    A tensor is read when it is asked for, and no other; of a sharded model on the hub only the
    files that are read are fetched. Names and values are those of the loaded model's `weights`.

    Args:
        name: Hub name (`gpt2`) or a folder.
        revision: Branch, tag or commit on the hub.
        dtype: `float32`, `float16`, `bfloat16`, or `auto` for the checkpoint's own.
        trust_remote_code: Run code that comes with the model.

    Raises:
        ModelLoadError: There is no such model, or it has no safetensors files.
        UnsupportedModelError: No entry says where its parts are, or its weights are quantised.
    """
    source = ModelSource(name, revision, trust_remote_code)
    config = load_config(source)
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModelError(f"the files of model {name!r} hold quantised weights; {_INSTEAD}")
    files = _TensorFiles(source, getattr(config, "_commit_hash", None))
    config.dtype = _wanted_dtype(config, dtype) or files.first_dtype()
    family = family_for(config, trust_remote_code=trust_remote_code)
    anatomy = find_anatomy(load_skeleton(source, config), family)
    return Weights(anatomy, _Checkpoint(files, anatomy.native).read)


def _wanted_dtype(config: Any, dtype: str) -> torch.dtype | None:
    if dtype == "auto":
        return config.dtype
    wanted = getattr(torch, dtype, None)
    if not isinstance(wanted, torch.dtype):
        raise ModelLoadError(f"dtype {dtype!r} is none of float32, float16, bfloat16, auto")
    return wanted


class _TensorFiles:
    """The safetensors files of a model; each is found and opened when a tensor of it is first read."""

    def __init__(self, source: ModelSource, commit: str | None) -> None:
        self._source = source
        self._revision = commit or source.revision
        self._opened: dict[str, Any] = {}

    @cached_property
    def file_of(self) -> dict[str, str]:
        """The name of the file that holds each tensor."""
        if self._find(_ONE_FILE) is not None:
            return dict.fromkeys(self._open(_ONE_FILE).keys(), _ONE_FILE)
        index = self._find(_INDEX)
        if index is None:
            raise ModelLoadError(self._without_files())
        return dict(json.loads(Path(index).read_text())["weight_map"])

    def read(self, key: str) -> torch.Tensor:
        """Return a tensor as it is stored."""
        try:
            tensor: torch.Tensor = self._open(self.file_of[key]).get_tensor(key)
        except SafetensorError as error:
            raise ModelLoadError(f"cannot read {key} of model {self._source.name!r}: {error}") from error
        return tensor

    def first_dtype(self) -> torch.dtype:
        """Return the element type of the first tensor of a floating type, as transformers takes it for the model's."""
        tensors = map(self.read, sorted(self.file_of))
        return next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.get_default_dtype())

    def _open(self, filename: str) -> Any:
        if filename not in self._opened:
            path = self._find(filename)
            if path is None:
                raise ModelLoadError(f"model {self._source.name!r} lacks {filename}, which its index names")
            try:
                self._opened[filename] = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise ModelLoadError(f"cannot read {path}: {error}") from error
        return self._opened[filename]

    def _find(self, filename: str) -> str | None:
        path: str | None = cached_file(
            self._source.location, filename, revision=self._revision, _raise_exceptions_for_missing_entries=False
        )
        return path

    def _without_files(self) -> str:
        held = sorted(path.name for path in self._source.folder.iterdir()) if self._source.folder else []
        others = [name for name in held if name.endswith((".bin", ".pt", ".gguf"))]
        found = f"only {', '.join(others)}" if others else "none"
        return f"model {self._source.name!r} has no {_ONE_FILE} to read single weights from ({found}); {_INSTEAD}"


class _Checkpoint:
    """Finds a module's parameters in the files, by the renamings that transformers loads with."""

    def __init__(self, files: _TensorFiles, skeleton: PreTrainedModel) -> None:
        self._files = files
        self._skeleton = skeleton
        self._paths = {module: path for path, module in skeleton.named_modules()}
        self._tied: dict[str, str] = dict(skeleton.all_tied_weights_keys)
        self._keys = self._find_keys()
        self._wide = [re.compile(part.replace("*", ".*")) for part in skeleton._get_dtype_plan(skeleton.config.dtype)]

    def _find_keys(self) -> dict[str, str | None]:
        """Return the key of each parameter in the files; None where it is put together from several tensors."""
        transforms = get_model_conversion_mapping(self._skeleton)
        renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
        converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
        declared, prefix = self._skeleton.state_dict(), self._skeleton.base_model_prefix
        keys: dict[str, str | None] = {}
        for key in sorted(self._files.file_of):
            name, converted = rename_source_key(key, renamings, converters, prefix, declared)
            if name not in declared and key in declared:
                name, converted = key, None
            keys.setdefault(name, key if converted is None else None)
        return keys

    def read(self, module: nn.Module, name: str) -> torch.Tensor | None:
        """Return a module's parameter, in the type that the loaded model would have it in.

        Raises:
            ModelLoadError: The files lack it, or have it in another shape.
            UnsupportedModelError: It is not stored as it is.
        """
        declared = getattr(module, name, None)
        if declared is None:
            return None
        parameter = f"{self._paths[module]}.{name}".lstrip(".")
        if name in module._non_persistent_buffers_set:
            return self._computed(module, name)
        tensor = self._files.read(self._key(parameter))
        if tensor.shape != declared.shape:
            raise ModelLoadError(
                f"{parameter} has the shape {tuple(tensor.shape)} in the files, "
                f"but {tuple(declared.shape)} by the configuration"
            )
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise UnsupportedModelError(f"{parameter} is stored quantised, as {tensor.dtype}; {_INSTEAD}")
        return tensor.to(torch.float32 if any(part.search(parameter) for part in self._wide) else declared.dtype)

    def _key(self, parameter: str) -> str:
        kept_as = self._tied.get(parameter, parameter)
        names = [parameter, kept_as, *(other for other, first in self._tied.items() if first == kept_as)]
        found = [self._keys[name] for name in names if name in self._keys]
        if not found:
            raise ModelLoadError(
                f"the files hold no tensor for {parameter}; they may belong to another model than config.json"
            )
        if found[0] is None:
            raise UnsupportedModelError(f"{parameter} is put together from several stored tensors; {_INSTEAD}")
        return found[0]

    def _computed(self, module: nn.Module, name: str) -> torch.Tensor:
        """Return a buffer that is not stored, as the model fills it when it is made."""
        filled = deepcopy(module).to_empty(device="cpu")
        self._skeleton._init_weights(filled)
        buffer: torch.Tensor = getattr(filled, name)
        return buffer

"""Load configurations, tokenizers and models from the hub or a folder; say which model it was."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from actpipe.errors import ModelLoadError, RecipeError, did_you_mean
from actpipe.models.model_class import auto_class, classes_to_try
from actpipe.planning import parse_bytes
from actpipe.schemas.manifest import ModelIdentity

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".gguf")
_SAMPLE_BYTES = 2**20


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from."""

    name: str
    """Hub name, or path of a folder."""
    revision: str | None = None
    trust_remote_code: bool = False

    @property
    def folder(self) -> Path | None:
        """The folder, where `name` is one."""
        path = Path(self.name).expanduser()
        return path if path.is_dir() else None

    @property
    def title(self) -> str:
        """Short name: that of the hub, or the folder's own."""
        return self.folder.resolve().name if self.folder else self.name

    def options(self) -> dict[str, Any]:
        """Return what every `from_pretrained` of transformers is given."""
        return {"revision": self.revision or "main", "trust_remote_code": self.trust_remote_code}

    @property
    def location(self) -> str:
        """What transformers is asked for."""
        return str(self.folder or self.name)


def load_config(source: ModelSource) -> Any:
    """Load a model's configuration.

    Raises:
        ModelLoadError: No such model; names what was looked for and where.
    """
    _refuse_missing_folder(source)
    try:
        return AutoConfig.from_pretrained(source.location, **source.options())
    except (OSError, ValueError, KeyError) as error:
        raise ModelLoadError(_explain(source, "configuration", error)) from error


def _refuse_missing_folder(source: ModelSource) -> None:
    path = Path(source.name).expanduser()
    looks_like_path = source.name.startswith((".", "/", "~")) or source.name.count("/") > 1
    if looks_like_path and not path.exists():
        siblings = [str(path.parent / p.name) for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ModelLoadError(f"model folder {source.name!r} does not exist{did_you_mean(str(path), siblings)}")
    if source.folder is not None and not (source.folder / "config.json").is_file():
        raise ModelLoadError(f"{source.folder} is no model folder: it has no config.json")


def _explain(source: ModelSource, what: str, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if "trust_remote_code" in str(error):
        reason = "it brings its own Python code; set `trust_remote_code: true` if you trust it"
    place = "in that folder" if source.folder else "on the hub (there is no folder of that name here)"
    return f"cannot load the {what} of model {source.name!r} {place}: {reason}"


def load_tokenizer(source: ModelSource) -> Any:
    """Load a model's tokenizer.

    Raises:
        ModelLoadError: The model has none, or it needs code that is not trusted.
    """
    try:
        return AutoTokenizer.from_pretrained(source.location, **source.options())
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelLoadError(_explain(source, "tokenizer", error)) from error


def load_skeleton(source: ModelSource, config: Any) -> PreTrainedModel:
    """Build the model without weights: its modules, on the meta device, cost next to nothing."""
    try:
        with torch.device("meta"):
            model: PreTrainedModel = auto_class(config).from_config(config, trust_remote_code=source.trust_remote_code)
    except ValueError as error:
        raise ModelLoadError(_explain(source, "structure", error)) from error
    return model.eval()


DeviceMap = str | dict[str, int | str] | None
MaxMemory = Mapping[str, int | str] | None


def load_native(
    source: ModelSource,
    *,
    dtype: str,
    device: str,
    device_map: DeviceMap,
    max_memory: MaxMemory = None,
    offload_folder: str | Path | None = None,
    split: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """Load a language model with its weights, ready to run and never to train.

    `split` is what `from_pretrained` is given where processes share the model; each then loads its pieces.

    Raises:
        ModelLoadError: It cannot be read, or lacks weights, or does not fit where it is to be put.
    """
    placed: dict[str, Any] = dict(split or {}) if device_map is None else {"device_map": device_map}
    if max_memory is not None:
        placed["max_memory"] = {
            int(key) if key.isdigit() else key: parse_bytes(most) if isinstance(most, str) else most
            for key, most in max_memory.items()
        }
    if offload_folder is not None:
        placed["offload_folder"] = str(offload_folder)
    classes = classes_to_try(load_config(source))
    for number, chosen in enumerate(classes, start=1):
        try:
            with _bars_on_terminals_only(), _warnings_of(last_try=number == len(classes)):
                model: PreTrainedModel
                model, report = chosen.from_pretrained(
                    source.location, dtype=dtype, output_loading_info=True, **placed, **source.options()
                )
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ModelLoadError(_explain(source, "weights", error)) from error
        missing = _missing_parameters(model, report)
        if not missing:
            break
    _refuse_random_weights(source, model, missing)
    if device_map is None and split is None:
        model = model.to(resolve_device(device))
    return model.eval().requires_grad_(False)


def _missing_parameters(model: PreTrainedModel, report: Mapping[str, Any]) -> list[str]:
    """Return the parameters that a checkpoint lacked; buffers that it lacks have a value of their own."""
    parameters = {name for name, _ in model.named_parameters()}
    return sorted(parameters & set(report["missing_keys"]))


def _refuse_random_weights(source: ModelSource, model: PreTrainedModel, missing: list[str]) -> None:
    """Refuse a model of which the checkpoint lacks parameters, which transformers drew at random."""
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelLoadError(
            f"the weights of model {source.name!r} lack {missing[0]}{more} of {type(model).__name__}, which would be "
            "random; take a checkpoint that has its language-modelling head"
        )


@contextmanager
def _warnings_of(*, last_try: bool) -> Iterator[None]:
    """Hold back what the library says of a class that is not the last one tried."""
    level = logging.get_verbosity()
    if not last_try:
        logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


@contextmanager
def _bars_on_terminals_only() -> Iterator[None]:
    """Keep the library's progress bars out of logs and pipes."""
    shown = logging.is_progress_bar_enabled()
    if shown and not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def resolve_device(device: str) -> torch.device:
    """Turn `auto` into an accelerator where there is one, and refuse devices that are not there.

    Raises:
        RecipeError: The device is unknown or absent.
    """
    if device == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return torch.device("cpu") if accelerator is None else accelerator
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise RecipeError(f"device {device!r} cannot be used here: {reason}") from error
    return torch.device(device)


def identify(source: ModelSource, config: Any, *, family: str, dtype: str) -> ModelIdentity:
    """Say which model this is, so that a run is never continued with another one; loads no weights.

    The fingerprint covers the configuration and, for a folder, size and the first and last MiB
    of every weight file; for a hub model the commit stands for the files.
    """
    digest = hashlib.sha256()
    commit: str | None = getattr(config, "_commit_hash", None)
    if source.folder is not None:
        digest.update((source.folder / "config.json").read_bytes())
        for path in sorted(source.folder.iterdir()):
            if path.suffix in _WEIGHT_SUFFIXES:
                digest.update(f"{path.name}:{path.stat().st_size}".encode())
                digest.update(_sample(path))
    else:
        digest.update(f"{source.name}@{commit or source.revision}".encode())
    return ModelIdentity(
        name=source.title,
        revision=commit,
        family=family,
        fingerprint=digest.hexdigest(),
        dtype=dtype,
    )


def _sample(path: Path) -> bytes:
    with path.open("rb") as file:
        head = file.read(_SAMPLE_BYTES)
        file.seek(max(0, path.stat().st_size - _SAMPLE_BYTES))
        return head + file.read()


def compute_dtype(config: Any, dtype: str) -> str:
    """Return the element type that a model will compute in, from its configuration alone.

    Raises:
        RecipeError: `auto` was asked for, and the configuration does not say.
    """
    if dtype != "auto":
        return dtype
    if config.dtype is None:
        raise RecipeError("this model's configuration does not say its element type; set `model.dtype`")
    return dtype_name(config.dtype)


def dtype_name(dtype: torch.dtype) -> Literal["float32", "float16", "bfloat16", "float64"]:
    """Return torch's name of an element type without the prefix."""
    name = str(dtype).removeprefix("torch.")
    if name not in ("float32", "float16", "bfloat16", "float64"):
        raise ModelLoadError(f"weights of type {name} are not supported; load with `dtype: bfloat16`")
    return name  # type: ignore[return-value]

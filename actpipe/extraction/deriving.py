"""What is stored of activations where it is not all of them: heads, channels, projections, a SAE's latents."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open

from actpipe.compute.projecting import encode, largest, random_directions
from actpipe.errors import RecipeError
from actpipe.models.hooked_model import ModelSpec
from actpipe.schemas.choosing import DeriveConfig, expand_ranges
from actpipe.schemas.manifest import ArrayManifest
from actpipe.schemas.manifest import Derivation as DerivationRecord
from actpipe.stores.layout import sha256_of

Weights = dict[str, torch.Tensor]
Axes = tuple[str, ...]


@dataclass(frozen=True)
class Derivation:
    """One way of making less of one activation."""

    config: DeriveConfig
    hook: str
    axes: Axes
    """Axes of a row of the activation; `row_shape` has their sizes."""
    row_shape: tuple[int, ...]
    integer: bool
    weights: Path | None
    """The file of weights, if there is one."""
    sha256: str | None
    """SHA-256 of that file."""
    sizes: tuple[int, int] | None
    """How many values go into the matrix of that file, and how many come out."""

    @property
    def result(self) -> str:
        """Its name among the results, beside that of the hook."""
        return f"{self.hook}.{self.config.name}"

    @property
    def _path(self) -> str:
        return f"derived/{self.config.name}/{self.hook}"

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of its arrays."""
        return (self._path,) if self.config.top_k is None else (f"{self._path}/values", f"{self._path}/indices")

    def arrays(self, dtype: str) -> tuple[ArrayManifest, ...]:
        """Return what is stored; `dtype` is the element type of values that are not integers."""
        record = DerivationRecord(
            hook=self.hook,
            settings=self.config.model_dump(mode="json", exclude_none=True),
            sha256=self.sha256,
        )
        shape, axes = self.row
        kinds = ("int32" if self.integer else dtype, "int32")
        return tuple(
            ArrayManifest(path=path, dtype=kind, row_shape=shape, axes=("row", *axes), derived=record)
            for path, kind in zip(self.paths, kinds, strict=False)
        )

    def __call__(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the values of each array, in their order, for rows of the activation."""
        config = self.config
        if config.heads is not None:
            axis = self.axes.index("head") + 1
            return (rows.index_select(axis, _numbers(config.heads).to(rows.device)),)
        if config.channels is not None:
            return (rows.index_select(-1, _numbers(config.channels).to(rows.device)),)
        if config.norms:
            lengths = rows.float().norm(dim=-1)
            return (lengths if lengths.ndim > 1 else lengths.unsqueeze(-1),)
        weights = _load(self, rows.device)
        flat = rows.flatten(1) if self._whole_row else rows
        if config.encoder is None:
            return ((flat.float() - weights.get("mean", 0.0)) @ weights["W"] + weights.get("b", 0.0),)
        inputs = flat.float() - (weights["b_dec"] if config.center else 0.0)
        latents = encode(inputs.flatten(0, -2), weights["W_enc"], weights["b_enc"], weights.get("threshold"))
        if config.top_k is None:
            return (latents.view(*flat.shape[:-1], -1),)
        return tuple(each.view(*flat.shape[:-1], -1) for each in largest(latents, config.top_k))

    @property
    def _whole_row(self) -> bool:
        """Whether a matrix is applied to all values of the row, and not along its last axis."""
        return self._d_in != self.row_shape[-1]

    @property
    def _d_in(self) -> int:
        return math.prod(self.row_shape) if self.sizes is None else self.sizes[0]

    @property
    def row(self) -> tuple[tuple[int, ...], Axes]:
        """Sizes and axes of a row of what is derived."""
        config, shape, axes = self.config, self.row_shape, self.axes
        if config.heads is not None:
            axis = axes.index("head")
            return (*shape[:axis], len(_numbers(config.heads)), *shape[axis + 1 :]), axes
        if config.channels is not None:
            return (*shape[:-1], len(_numbers(config.channels))), axes
        if config.norms:
            return (shape[:-1], axes[:-1]) if len(shape) > 1 else ((1,), ("norm",))
        outer = ((), ()) if self._whole_row else (shape[:-1], axes[:-1])
        if config.top_k is not None:
            return (*outer[0], config.top_k), (*outer[1], "rank")
        size = self.sizes[1] if self.sizes is not None else config.random or 0
        return (*outer[0], size), (*outer[1], "component" if config.encoder is None else "latent")


class Derives(Protocol):
    """Settings that name activations, and derivations of some."""

    @property
    def hooks(self) -> tuple[str, ...]:
        """The activations."""

    @property
    def derive(self) -> tuple[DeriveConfig, ...]:
        """The derivations."""


def plan_derivations(config: Derives, spec: ModelSpec, base: Path, context_length: int) -> tuple[Derivation, ...]:
    """Return everything that is derived, checked against the model and the files.

    Args:
        config: What to store.
        spec: The model.
        base: The folder that relative paths start from.
        context_length: Longest model input, in tokens.

    Raises:
        RecipeError: A head, a channel or a file does not fit the activation; names entry, hook and sizes.
    """
    made = []
    for entry in config.derive:
        file = entry.matrix or entry.encoder
        weights = None if file is None else base / Path(file).expanduser()
        sizes = None if weights is None else _matrix_shape(weights, _kind(entry))
        digest = None if weights is None else _sha256(weights, weights.stat().st_mtime_ns)
        for name in spec.select(entry.hooks):
            point = spec.hook_points[name]
            derivation = Derivation(
                entry,
                name,
                tuple(point.axes),
                point.row_shape(spec.shape, context_length),
                point.integer,
                weights,
                digest,
                sizes,
            )
            _check(derivation)
            made.append(derivation)
    return tuple(made)


def captured_hooks(config: Derives) -> tuple[str, ...]:
    """Return the patterns of every activation that is looked at, stored as it is or not."""
    return (*config.hooks, *(hook for entry in config.derive for hook in entry.hooks))


def _check(derivation: Derivation) -> None:
    config, where = derivation.config, f"derive ({derivation.config.name}): {derivation.hook}"
    if config.heads is not None and "head" not in derivation.axes:
        raise RecipeError(f"{where} has no heads, its axes are {', '.join(derivation.axes)}; name `channels`")
    for chosen, axis in ((config.heads, "head"), (config.channels, derivation.axes[-1])):
        if chosen is not None:
            size, numbers = derivation.row_shape[derivation.axes.index(axis)], _numbers(chosen)
            if not len(numbers) or int(numbers.max()) >= size:
                raise RecipeError(f"{where} has {size} places along {axis}, numbered from 0; got {list(chosen)}")
    if (config.heads, config.channels) == (None, None):
        if derivation.integer or derivation.axes[-1] == "key_position":
            raise RecipeError(f"{where} cannot be projected: its last axis is no space of directions")
        if derivation.sizes is not None:
            _check_sizes(derivation, *derivation.sizes, where)


def _check_sizes(derivation: Derivation, d_in: int, d_out: int, where: str) -> None:
    if d_in not in (derivation.row_shape[-1], math.prod(derivation.row_shape)):
        raise RecipeError(
            f"{where} has rows {derivation.row_shape}, and {derivation.weights} takes {d_in} values; name the hook "
            "that the weights were made for"
        )
    if derivation.config.top_k is not None and derivation.config.top_k > d_out:
        raise RecipeError(f"{where}: top_k ({derivation.config.top_k}) is above the {d_out} latents of the encoder")


def _numbers(chosen: Iterable[int | str]) -> torch.Tensor:
    return torch.tensor(expand_ranges(chosen), dtype=torch.long)


_WANTED = {"matrix": (("W",), ("mean", "b")), "encoder": (("W_enc", "b_enc"), ("b_dec", "threshold"))}
"""Tensors that a file must have, and may have."""


def _kind(config: DeriveConfig) -> str:
    return "matrix" if config.encoder is None else "encoder"


def _matrix_shape(path: Path, kind: str) -> tuple[int, int]:
    needed, optional = _WANTED[kind]
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            missing = [name for name in needed if name not in names]
            if missing:
                raise RecipeError(
                    f"derive: {path} lacks {', '.join(missing)}; it holds {', '.join(sorted(names))}, and needs "
                    f"{', '.join(needed)} (and may have {', '.join(optional)})"
                )
            shape = file.get_slice(needed[0]).get_shape()
    except (OSError, SafetensorError) as error:
        raise RecipeError(f"derive: cannot read {path} as a safetensors file: {error}") from error
    if len(shape) != 2:
        raise RecipeError(f"derive: {needed[0]} of {path} must be a matrix (d_in, d_out), its shape is {tuple(shape)}")
    return shape[0], shape[1]


@lru_cache(maxsize=64)
def _sha256(path: Path, version: int) -> str:
    """Return the digest of a file as it was when it was last written."""
    del version
    return sha256_of(path)


@lru_cache(maxsize=64)
def _load(derivation: Derivation, device: torch.device) -> Weights:
    """Return what rows are multiplied with, in float32 on a device."""
    if derivation.weights is None:
        assert derivation.config.random is not None
        directions = random_directions(derivation._d_in, derivation.config.random, derivation.config.seed)
        return {"W": directions.to(device)}
    needed, optional = _WANTED[_kind(derivation.config)]
    with safe_open(derivation.weights, framework="pt") as file:
        names = [name for name in (*needed, *optional) if name in file.keys()]  # noqa: SIM118 - not a dict
        return {name: file.get_tensor(name).float().to(device) for name in names}

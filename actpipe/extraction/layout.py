"""Settle what a store will hold, before any of it is computed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Literal

from actpipe.compute.quantising import LARGEST
from actpipe.errors import RecipeError
from actpipe.extraction.deriving import Derivation
from actpipe.hooks import ModelShape
from actpipe.model_inputs import ModelInputs
from actpipe.models.hooked_model import ModelSpec
from actpipe.planning import rows_per_part_for
from actpipe.schemas.manifest import ArrayManifest, BlockRecord, ShapeRecord, StoreManifest
from actpipe.schemas.recipe import ExtractActivationsConfig
from actpipe.stores.encoding import MOST_BLOSC_BYTES, quantisation_of, row_bytes

Code = Literal["int8", "float8_e4m3"]

TOKEN_ARRAYS = {"input_ids": "int32", "position": "int32", "sequence": "int64"}
GENERATED = {"generated": "bool"}
"""Whether the model itself added the token; only where it added some."""


def check_rows_per_part(config: ExtractActivationsConfig, inputs: ModelInputs) -> None:
    """Refuse parts that would cut packed sequences, so that each would be run twice.

    Raises:
        RecipeError: Says both numbers.
    """
    if config.keep is not None or config.rows_per_part == "auto" or inputs.layout != "packed":
        return
    if config.rows_per_part % inputs.n_rows:
        less = f" less the prefix's {inputs.n_prefix}" if inputs.n_prefix else ""
        raise RecipeError(
            f"rows_per_part ({config.rows_per_part}) is not a multiple of context_length ({inputs.context_length})"
            f"{less}: packed sequences would be run twice"
        )


def check_encoding(config: ExtractActivationsConfig, names: Iterable[str]) -> None:
    """Refuse to quantise what is not finite by its nature.

    Raises:
        RecipeError: Names the hook.
    """
    for name in names:
        if config.dtype in LARGEST and name.endswith("hook_attn_scores"):
            raise RecipeError(
                f"{name} is -inf where a key is masked, which {config.dtype} cannot keep; name hook_pattern in its "
                "place, or set `dtype: bfloat16`"
            )


def record_shape(shape: ModelShape) -> ShapeRecord:
    """Return a shape as the manifest keeps it."""
    blocks = tuple(BlockRecord(**asdict(block)) for block in shape.blocks)
    return ShapeRecord(**{**asdict(shape), "blocks": blocks})


def check_chunks(config: ExtractActivationsConfig, arrays: Iterable[ArrayManifest], rows_per_part: int) -> None:
    """Refuse chunks larger than the codec takes.

    Raises:
        RecipeError: Names the array, its size and the rows that fit.
    """
    for array in arrays:
        size = row_bytes(array) * rows_per_part
        if config.codec == "blosc" and size > MOST_BLOSC_BYTES:
            raise RecipeError(
                f"a chunk of {array.path} is {size:,} bytes, and blosc takes at most {MOST_BLOSC_BYTES:,}; set "
                f"`rows_per_part` to at most {MOST_BLOSC_BYTES // row_bytes(array):,}, or `codec: zstd`"
            )


def plan_store(
    config: ExtractActivationsConfig,
    spec: ModelSpec,
    *,
    n_rows: int,
    inputs: ModelInputs,
    kept_rows: str | None = None,
    derivations: Iterable[Derivation] = (),
) -> StoreManifest:
    """Settle shapes, types and parts of everything that will be stored.

    Args:
        config: What to store.
        spec: The model.
        n_rows: Tokens that are stored.
        inputs: The sequences of the corpus.
        kept_rows: Checksum of the numbers of those tokens, where they are not all.
        derivations: What is stored of activations where it is not all of them.
    """
    check_rows_per_part(config, inputs)
    rows_per_part = config.rows_per_part
    if rows_per_part == "auto":
        whole = config.keep is None and inputs.layout != "documents"
        rows_per_part = rows_per_part_for(n_rows, multiple_of=inputs.n_rows if whole else 1)
    code = config.dtype if config.dtype in LARGEST else None
    dtype = "float32" if code else spec.identity.dtype if config.dtype == "model" else config.dtype
    columns = {**TOKEN_ARRAYS, **(GENERATED if inputs.generated else {})}
    arrays = [ArrayManifest(path=f"tokens/{n}", dtype=t, row_shape=(), axes=("row",)) for n, t in columns.items()]
    stored = [_activation(name, spec, dtype, inputs.context_length) for name in spec.select(config.hooks)]
    stored += [array for derivation in derivations for array in derivation.arrays(dtype)]
    arrays += [_quantised(array, code) for array in stored]
    check_chunks(config, arrays, rows_per_part)
    arrays += [
        ArrayManifest(path=f"metrics/{metric}", dtype="float32", row_shape=(), axes=("row",))
        for metric in dict.fromkeys(config.metrics)
    ]
    return StoreManifest(
        schema_version=_version(config, quantised=code is not None),
        codec=config.codec,
        corpus=config.corpus,
        n_rows=n_rows,
        rows_per_part=rows_per_part,
        context_length=inputs.context_length,
        convention=spec.convention,
        kept_rows=kept_rows,
        model=spec.identity,
        shape=record_shape(spec.shape),
        arrays=tuple(arrays),
    )


def _activation(name: str, spec: ModelSpec, dtype: str, context_length: int) -> ArrayManifest:
    point = spec.hook_points[name]
    return ArrayManifest(
        path=f"activations/{name}",
        dtype="int32" if point.integer else dtype,
        row_shape=point.row_shape(spec.shape, context_length),
        axes=("row", *point.axes),
    )


def _quantised(array: ArrayManifest, code: Code | None) -> ArrayManifest:
    """Return the array in one byte per value, where that is asked for and it holds no integers."""
    if code is None or array.dtype == "int32":
        return array
    return array.model_copy(update={"quantisation": quantisation_of(array.path, code)})


def _version(config: ExtractActivationsConfig, *, quantised: bool) -> Literal[1, 2, 3]:
    """Return the earliest version of the manifest whose readers read such a store right."""
    if config.keep is not None or config.derive:
        return 3
    return 2 if quantised or config.codec != "none" else 1

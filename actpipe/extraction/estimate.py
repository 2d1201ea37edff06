"""What an extraction will take: bytes, parts, memory."""

from __future__ import annotations

import math
from dataclasses import dataclass

from actpipe.extraction.worker import LOGITS_AT_ONCE
from actpipe.hooks import ModelShape
from actpipe.planning import count_parts, format_bytes
from actpipe.records import Finding
from actpipe.schemas.manifest import ShapeRecord, StoreManifest
from actpipe.schemas.recipe import ExtractActivationsConfig
from actpipe.schemas.reducing import ReduceActivationsConfig
from actpipe.stores import encoding
from actpipe.stores.dtypes import numpy_dtype

_PROCESS_BYTES = 1_000 * 10**6
"""Python with torch and transformers loaded, and the margin of the allocator."""


def row_bytes(manifest: StoreManifest) -> int:
    """Return the bytes of one token in all arrays together, before compression."""
    return round(sum(map(encoding.row_bytes, manifest.arrays)))


@dataclass(frozen=True)
class PassLoad:
    """What one forward pass carries, as far as its memory depends on it."""

    batch_tokens: int
    """Tokens of the batch, padding included; at least those of one sequence."""
    context_length: int
    chunk_tokens: int | None = None
    """Tokens of each sequence in one pass, where keys and values are carried over; None where it is whole."""
    looks_at_keys: bool = False
    """Whether scores or patterns are read."""
    metrics: bool = False
    """Whether logits are computed."""

    @classmethod
    def of(
        cls, config: ExtractActivationsConfig | ReduceActivationsConfig, context_length: int, *, looks_at_keys: bool
    ) -> PassLoad:
        """Say what a stage's passes carry; where the size of batches is to be found yet, one sequence."""
        batch_tokens = context_length if config.batch_tokens == "auto" else max(config.batch_tokens, context_length)
        if isinstance(config, ReduceActivationsConfig):
            return cls(batch_tokens, context_length, looks_at_keys=looks_at_keys)
        return cls(batch_tokens, context_length, config.chunk_tokens, looks_at_keys, bool(config.metrics))

    @property
    def tokens_at_once(self) -> int:
        """Tokens of one pass."""
        if self.chunk_tokens is None:
            return self.batch_tokens
        return min(self.batch_tokens, max(1, self.batch_tokens // self.context_length) * self.chunk_tokens)


def working_bytes(shape: ModelShape | ShapeRecord, load: PassLoad) -> int:
    """Bound what one forward pass takes on its device beside the weights.

    The activations of a layer are counted twenty times d_model plus four times d_mlp in float32 (an
    expert's as four times d_model), scores and patterns three times over, logits three times, keys and
    values that are carried over once.
    """
    at_once = load.tokens_at_once
    held = 0 if load.chunk_tokens is None else sum(block.n_kv_heads * block.d_qk for block in shape.blocks)
    d_mlp = max(block.d_mlp or 4 * shape.d_model * block.n_experts_per_token for block in shape.blocks)
    n_heads = max(block.n_heads for block in shape.blocks)
    layer = 4 * at_once * (20 * shape.d_model + 4 * d_mlp)
    scores = 3 * 4 * at_once * n_heads * load.context_length if load.looks_at_keys else 0
    logits = 3 * 4 * max(LOGITS_AT_ONCE, shape.d_vocab) if load.metrics else 0
    return layer + 2 * 4 * load.batch_tokens * held + scores + logits


def peak_bytes(config: ExtractActivationsConfig, manifest: StoreManifest, model_bytes: int) -> int:
    """Bound the peak memory of an extraction in one process, weights included.

    What waits for the disk is counted once, beside the `working_bytes` of a pass.
    """
    looks_at_keys = any("key_position" in array.axes for array in manifest.arrays)
    load = PassLoad.of(config, manifest.context_length, looks_at_keys=looks_at_keys)
    largest = max(math.prod(array.row_shape) * numpy_dtype(array.dtype).itemsize for array in manifest.arrays)
    waiting = config.queue_bytes + 2 * largest * load.tokens_at_once
    sequences = 16 * manifest.rows_per_part
    if manifest.codec != "none":
        waiting += 2 * largest * manifest.rows_per_part
    return _PROCESS_BYTES + model_bytes + working_bytes(manifest.shape, load) + waiting + sequences


def estimate(
    config: ExtractActivationsConfig, manifest: StoreManifest, model_bytes: int, speed: tuple[float, str] | None
) -> Finding:
    """Say what an extraction will take.

    Args:
        config: Its settings.
        manifest: The store.
        model_bytes: Of the weights.
        speed: Tokens per second, and where they were measured; None where they were not.
    """
    per_token = row_bytes(manifest)
    n_parts = count_parts(manifest.n_rows, manifest.rows_per_part)
    largest = max(manifest.arrays, key=lambda array: math.prod(array.row_shape))
    chunk = math.prod(largest.row_shape) * numpy_dtype(largest.dtype).itemsize * manifest.rows_per_part
    rows = [
        ("arrays", f"{len(manifest.arrays)}", f"{per_token:,} bytes per token"),
        ("written", format_bytes(per_token * manifest.n_rows), f"{manifest.n_rows:,} tokens"),
        ("parts", f"{n_parts:,}", f"of {manifest.rows_per_part:,} tokens; largest chunk {format_bytes(chunk)}"),
        (
            "memory",
            format_bytes(peak_bytes(config, manifest, model_bytes)),
            f"at most, weights {format_bytes(model_bytes)}",
        ),
    ]
    if speed is not None:
        rate, where = speed
        rows.append(
            ("time", _duration(manifest.n_rows / rate), f"at {rate:,.0f} tokens/s, measured on one batch on {where}")
        )
    return Finding(f"Store: {manifest.corpus}", ("", "expected", ""), tuple(rows))


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"

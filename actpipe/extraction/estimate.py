"""What an extraction will take: bytes, parts, memory, and time measured on one batch."""

from __future__ import annotations

import math
import time

import torch

from actpipe.extraction.deriving import captured_hooks
from actpipe.extraction.worker import LOGITS_AT_ONCE
from actpipe.models.hooked_model import HookedModel
from actpipe.models.taps import UNEMBED_INPUT
from actpipe.planning import count_parts, format_bytes
from actpipe.records import Finding
from actpipe.schemas.manifest import StoreManifest
from actpipe.schemas.recipe import ExtractActivationsConfig
from actpipe.stores import encoding
from actpipe.stores.dtypes import numpy_dtype

_PROCESS_BYTES = 1_000 * 10**6
"""Python with torch and transformers loaded, and the margin of the allocator."""
_TIMED_TOKENS = 2048


def row_bytes(manifest: StoreManifest) -> int:
    """Return the bytes of one token in all arrays together, before compression."""
    return round(sum(map(encoding.row_bytes, manifest.arrays)))


def peak_bytes(config: ExtractActivationsConfig, manifest: StoreManifest, model_bytes: int) -> int:
    """Bound the peak memory of an extraction in one process, weights included.

    The activations of a layer are counted twenty times d_model plus four times d_mlp in float32 (an
    expert's as four times d_model), scores and patterns three times over, what waits for the disk
    once, logits three times, keys and values that are carried over once.
    """
    shape, context_length = manifest.shape, manifest.context_length
    batch_tokens = max(config.batch_tokens, context_length)
    held = 2 * 4 * batch_tokens * sum(block.n_kv_heads * block.d_qk for block in shape.blocks)
    if config.chunk_tokens is None:
        held = 0
    else:
        n_sequences = max(1, batch_tokens // context_length)
        batch_tokens = min(batch_tokens, n_sequences * config.chunk_tokens)
    d_mlp = max(block.d_mlp or 4 * shape.d_model * block.n_experts_per_token for block in shape.blocks)
    n_heads = max(block.n_heads for block in shape.blocks)
    layer = 4 * batch_tokens * (20 * shape.d_model + 4 * d_mlp)
    looks_at_keys = any("key_position" in array.axes for array in manifest.arrays)
    scores = 3 * 4 * batch_tokens * n_heads * context_length if looks_at_keys else 0
    largest = max(math.prod(array.row_shape) * numpy_dtype(array.dtype).itemsize for array in manifest.arrays)
    waiting = config.queue_bytes + 2 * largest * batch_tokens
    logits = 3 * 4 * max(LOGITS_AT_ONCE, shape.d_vocab) if config.metrics else 0
    sequences = 16 * manifest.rows_per_part
    if manifest.codec != "none":
        waiting += 2 * largest * manifest.rows_per_part
    return _PROCESS_BYTES + model_bytes + layer + held + scores + waiting + logits + sequences


def tokens_per_second(config: ExtractActivationsConfig, model: HookedModel, context_length: int) -> float:
    """Run one batch as the extraction will, without storing it, and return its speed (the better of two)."""
    names = [*model.select(captured_hooks(config)), *([UNEMBED_INPUT] if config.metrics else [])]
    length = min(context_length, config.chunk_tokens or context_length)
    n_sequences = max(1, min(_TIMED_TOKENS, config.batch_tokens) // length)
    ids = torch.zeros(n_sequences, length, dtype=torch.long, device=model.device)
    seconds = []

    def take(_: str, tensor: torch.Tensor) -> None:
        tensor.clone().cpu()

    with torch.inference_mode(), model.capture(names, take, stop=True) as capture:
        for _ in range(2):
            started = time.perf_counter()
            capture.run(ids)
            if config.metrics:
                model.unembed(torch.zeros(ids.numel(), model.shape.d_model, dtype=model.dtype, device=model.device))
            if model.device.type == "cuda":
                torch.cuda.synchronize(model.device)
            seconds.append(time.perf_counter() - started)
    return ids.numel() / min(seconds)


def estimate(config: ExtractActivationsConfig, manifest: StoreManifest, model: HookedModel) -> Finding:
    """Say what an extraction will take."""
    per_token = row_bytes(manifest)
    model_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.native.parameters())
    speed = tokens_per_second(config, model, manifest.context_length)
    n_parts = count_parts(manifest.n_rows, manifest.rows_per_part)
    largest = max(manifest.arrays, key=lambda array: math.prod(array.row_shape))
    chunk = math.prod(largest.row_shape) * numpy_dtype(largest.dtype).itemsize * manifest.rows_per_part
    rows = (
        ("arrays", f"{len(manifest.arrays)}", f"{per_token:,} bytes per token"),
        ("written", format_bytes(per_token * manifest.n_rows), f"{manifest.n_rows:,} tokens"),
        ("parts", f"{n_parts:,}", f"of {manifest.rows_per_part:,} tokens; largest chunk {format_bytes(chunk)}"),
        (
            "memory",
            format_bytes(peak_bytes(config, manifest, model_bytes)),
            f"at most, weights {format_bytes(model_bytes)}",
        ),
        (
            "time",
            _duration(manifest.n_rows / speed),
            f"at {speed:,.0f} tokens/s, measured on one batch on {model.device}",
        ),
    )
    return Finding(f"Store: {manifest.corpus}", ("", "expected", ""), rows)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"

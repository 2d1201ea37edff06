"""Caches activations with SAELens on request; run by the interpreter of its own environment.

    python sae_lens_worker.py MODEL TOKENS LAYER THREADS

Reads one empty folder per line, caches the output of the layer for all token rows into it, and answers
with the seconds of `CacheActivationsRunner.run` and the mean size of what it stored.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import warnings
from typing import Any

import numpy as np
import torch

warnings.simplefilter("ignore")
logging.disable(logging.WARNING)

BATCH = 32
"""Sequences per forward pass: 8,192 tokens of context 256, as on our side."""


def make_runner(model: str, tokens: Any, layer: str, folder: str) -> Any:
    from datasets import Dataset
    from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig
    from transformers import AutoConfig

    config = CacheActivationsRunnerConfig(
        dataset_path="tokens",
        model_name=model,
        model_class_name="AutoModelForCausalLM",
        model_batch_size=BATCH,
        hook_name=f"transformer.h.{layer}",
        d_in=AutoConfig.from_pretrained(model).n_embd,
        training_tokens=tokens.size,
        context_size=tokens.shape[1],
        new_cached_activations_path=folder,
        shuffle=False,
        device="cpu",
        prepend_bos=False,
        streaming=False,
        buffer_size_gb=0.05,
    )
    return CacheActivationsRunner(config, override_dataset=Dataset.from_dict({"tokens": tokens.tolist()}))


def main() -> None:
    from datasets import disable_progress_bars

    disable_progress_bars()
    model, path, layer, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    tokens = np.load(path)
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        runner = make_runner(model, tokens, layer, line.strip())
        started = time.perf_counter()
        dataset = runner.run()
        taken = time.perf_counter() - started
        stored = np.stack(dataset.with_format("numpy")[:4][f"transformer.h.{layer}"])
        print(json.dumps([taken, len(dataset), float(np.abs(stored, dtype=np.float64).mean())]), flush=True)


if __name__ == "__main__":
    main()

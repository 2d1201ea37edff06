"""Times TransformerLens on request; run by the interpreter of its own environment.

    python transformer_lens_worker.py MODEL BATCHES THREADS

Reads one JSON list of names per line (`null`: every hook point, `"no scores"`: every one but scores and
patterns), answers for each batch with the seconds of the bare transformers model and of `run_with_cache`.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

warnings.simplefilter("ignore")
logging.disable(logging.WARNING)
torch.set_grad_enabled(False)

SCORES = ("hook_attn_scores", "hook_pattern")


def names_filter(wanted: Any) -> Any:
    if wanted == "no scores":
        return lambda name: not name.endswith(SCORES)
    return wanted


def seconds(run: Callable[[torch.Tensor], Any], ids: torch.Tensor) -> float:
    started = time.perf_counter()
    run(ids)
    return time.perf_counter() - started


def main() -> None:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoModelForCausalLM

    folder, batches, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    native = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    bridge = TransformerBridge.boot_transformers(folder, device="cpu", dtype=torch.float32)
    bridge.eval()
    data = torch.from_numpy(np.load(batches))
    _, cache = bridge.run_with_cache(data[0], names_filter="blocks.2.hook_resid_post")
    print(json.dumps(float(cache["blocks.2.hook_resid_post"].double().abs().mean())), flush=True)
    for line in sys.stdin:
        runs = [
            partial(native, use_cache=False),
            partial(bridge.run_with_cache, names_filter=names_filter(json.loads(line)), return_cache_object=False),
        ]
        native(data[0], use_cache=False)
        answer = []
        for number, ids in enumerate(data):
            taken = [0.0, 0.0]
            for which in (1, 0) if number % 2 else (0, 1):
                taken[which] = seconds(runs[which], ids)
            answer.append(taken)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()

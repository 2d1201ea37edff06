"""Takes epochs of activations with another library on request; run by the interpreter of its own environment.

    python feed_worker.py sae_lens|dictionary_learning FOLDER HOOK BATCH

FOLDER holds `model/`, `ids.npy` (sequence, position) and `activations.npy` (sequence, position, d_model) of HOOK.
For each line that comes in it takes one epoch and answers with rows per second.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

warnings.simplefilter("ignore")
torch.set_grad_enabled(False)


def sae_lens(folder: Path, hook: str, batch: int) -> Callable[[], Iterator[torch.Tensor]]:
    """Write the cache as `CacheActivationsRunner` does, and read it as the training of an SAE does."""
    from datasets import Array2D, Dataset, Features, Sequence, Value
    from sae_lens import ActivationsStore

    ids, activations = np.load(folder / "ids.npy"), np.load(folder / "activations.npy", mmap_mode="r")
    n_sequences, context, d_model = activations.shape
    features = Features(
        {hook: Array2D((context, d_model), "float32"), "token_ids": Sequence(Value("int32"), length=context)}
    )
    columns = {hook: list(activations), "token_ids": torch.from_numpy(ids).to(torch.int32)}
    Dataset.from_dict(columns, features=features).save_to_disk(folder / "cached")

    def open_store() -> Iterator[torch.Tensor]:
        return ActivationsStore(
            model=None,
            dataset=None,
            streaming=False,
            hook_name=hook,
            hook_head_index=None,
            context_size=context,
            d_in=d_model,
            n_batches_in_buffer=20,
            total_training_tokens=n_sequences * context,
            store_batch_size_prompts=32,
            train_batch_size_tokens=batch,
            prepend_bos=False,
            normalize_activations="none",
            device=torch.device("cpu"),
            dtype="float32",
            cached_activations_path=str(folder / "cached"),
        )

    return open_store


def dictionary_learning(folder: Path, hook: str, batch: int) -> Callable[[], Iterator[torch.Tensor]]:
    """Run the model on the same tokens, and mix what its buffer holds."""
    from dictionary_learning.buffer import ActivationBuffer
    from nnsight import LanguageModel

    ids = np.load(folder / "ids.npy")
    model = LanguageModel(str(folder / "model"), device_map="cpu", dispatch=True)
    pad = model.tokenizer.pad  # it is given settings that texts need and ids do not
    model.tokenizer.pad = lambda inputs, **_: pad(inputs, return_tensors="pt")
    layer = model.transformer.h[int(hook.split(".")[1])]

    def open_buffer() -> Iterator[torch.Tensor]:
        def sequences() -> Iterator[list[int]]:
            while True:
                yield from ids.tolist()

        return ActivationBuffer(
            sequences(),
            model,
            layer,
            d_submodule=model.config.n_embd,
            n_ctxs=128,
            ctx_len=ids.shape[1],
            refresh_batch_size=16,
            out_batch_size=batch,
            device="cpu",
        )

    return open_buffer


def main() -> None:
    name, folder, hook, batch = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    opened = {"sae_lens": sae_lens, "dictionary_learning": dictionary_learning}[name](folder, hook, batch)
    n_batches = np.load(folder / "ids.npy").size // batch
    stream = iter(opened())
    mean = float(np.mean([float(next(stream).double().abs().mean()) for _ in range(n_batches)]))
    print(json.dumps({"mean": mean}), flush=True)
    for _ in sys.stdin:
        started = time.perf_counter()
        rows = sum(len(next(stream)) for _ in range(n_batches))
        print(json.dumps({"rows_per_second": rows / (time.perf_counter() - started)}), flush=True)


if __name__ == "__main__":
    main()

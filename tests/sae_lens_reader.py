"""Reads a cache with SAELens' own ActivationsStore: FOLDER HOOK CONTEXT D_IN RESULT; run by its interpreter."""

from __future__ import annotations

import sys
import warnings

import numpy as np

warnings.simplefilter("ignore")


def main() -> None:
    import torch
    from datasets import load_from_disk
    from sae_lens.training.activations_store import ActivationsStore
    from transformer_lens.hook_points import HookedRootModule

    folder, hook, context, d_in, result = sys.argv[1:]
    store = ActivationsStore(
        model=HookedRootModule(),
        dataset=None,
        streaming=False,
        hook_name=hook,
        hook_head_index=None,
        context_size=int(context),
        d_in=int(d_in),
        n_batches_in_buffer=2,
        total_training_tokens=1,
        store_batch_size_prompts=1,
        train_batch_size_tokens=int(context),
        prepend_bos=False,
        normalize_activations="none",
        device=torch.device("cpu"),
        dtype="float32",
        cached_activations_path=folder,
    )
    batches = [store.get_raw_llm_batch() for _ in range(len(load_from_disk(folder)))]
    activations, ids = (torch.cat(values).numpy() for values in zip(*batches, strict=True))
    np.savez(result, activations=activations, token_ids=ids)


main()

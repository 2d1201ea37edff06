"""Run by torchrun in two processes: compares a model that they share with the whole one, and prints what differs."""

from __future__ import annotations

import json
import sys
import warnings

import torch
import torch.distributed as dist
from transformers.utils import logging

from actpipe import HookedModel
from actpipe.errors import ActpipeError

STREAM = "blocks.1.hook_resid_pre"


def message_of(action):
    try:
        action()
    except ActpipeError as error:
        return str(error)
    return ""


def main(folder):
    plain = HookedModel.from_pretrained(folder, dtype="float32", device="cpu")
    split = HookedModel.from_pretrained(folder, dtype="float32", tensor_parallel=True)
    ids = torch.randint(0, plain.shape.d_vocab, (3, 12), generator=torch.Generator().manual_seed(0))
    names = list(split.hook_points)
    with torch.inference_mode():
        (logits, cache), (wanted, whole) = (model.run_with_cache(ids, names=names) for model in (split, plain))
        halved = [(STREAM, lambda stream, point: stream / 2)]
        edited, wanted_edited = (model.run_with_hooks(ids, fwd_hooks=halved) for model in (split, plain))
    found = {
        "offered": names,
        "withheld": sorted(set(plain.hook_points) - set(names)),
        "differ": [name for name in names if not torch.allclose(cache[name], whole[name], atol=1e-5)],
        "logits": torch.allclose(logits, wanted, atol=1e-5),
        "edited": torch.allclose(edited, wanted_edited, atol=1e-5) and not torch.allclose(edited, logits, atol=1e-3),
        "refusal": message_of(lambda: split.run_with_cache(ids, names=["blocks.0.attn.hook_q"])),
        "weights": message_of(lambda: split.weights["blocks.0.attn.W_Q"]),
    }
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    if dist.get_rank() == 0:
        print(json.dumps(everyone))
    dist.destroy_process_group()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    main(sys.argv[1])

"""A model that processes share shows what is whole in each of them, and refuses the rest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import MODELS

from actpipe import HookedModel
from actpipe.errors import ModelLoadError

WORKER = Path(__file__).parent.parent / "tensor_parallel_worker.py"


@pytest.fixture(scope="module")
def findings():
    command = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(WORKER),
        str(MODELS / "llama"),
    ]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_what_is_offered_is_what_the_whole_model_has(findings):
    assert len(findings) == 2
    for found in findings:
        assert found["differ"] == []
        assert found["logits"]
        assert found["edited"]
        assert found["offered"] == findings[0]["offered"]


def test_the_stream_is_offered_and_what_lies_in_pieces_is_not(findings):
    offered, withheld = (set(findings[0][name]) for name in ("offered", "withheld"))

    for layer in range(2):
        block = f"blocks.{layer}."
        stream = {"hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out"}
        assert {block + kind for kind in (*stream, "ln1.hook_scale", "ln2.hook_normalized")} <= offered
        pieces = {"attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_z", "attn.hook_pattern", "mlp.hook_post"}
        assert {block + kind for kind in pieces} <= withheld


def test_a_name_in_pieces_and_weights_are_refused_with_the_reason(findings):
    for found in findings:
        assert "blocks.0.attn.hook_q is not offered of this model: each process has a piece" in found["refusal"]
        assert "cannot be read as plain numbers" in found["weights"]


def test_one_process_alone_cannot_split_a_model(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ModelLoadError, match="torchrun --nproc-per-node"):
        HookedModel.from_pretrained(str(MODELS / "llama"), tensor_parallel=True)


@pytest.mark.parametrize(
    ("model", "processes", "message"), [("gpt2", "2", "no plan for splitting GPT2LMHeadModel"), ("llama", "3", "heads")]
)
def test_what_cannot_be_split_is_refused_before_it_is_loaded(model, processes, message, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", processes)
    with pytest.raises(ModelLoadError, match=message):
        HookedModel.from_pretrained(str(MODELS / model), tensor_parallel=True)


@pytest.mark.parametrize("settings", [{"device": "cpu"}, {"device_map": "auto"}, {"convention": "processed"}], ids=str)
def test_what_splitting_excludes_is_refused(settings):
    with pytest.raises(ModelLoadError, match="places it by itself"):
        HookedModel.from_pretrained(str(MODELS / "llama"), tensor_parallel=True, **settings)

"""What the benchmarks measure on: one model, made on the spot, and the shipped text."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SPEECHES = ROOT / "workflows/data/tinyshakespeare_speeches.parquet"
TOKENIZER = ROOT / "workflows/data/induction-2l"
SCRATCH = ROOT / "runs"
LAYERS, D_MODEL, CONTEXT = 6, 512, 256


def make_model(folder: Path) -> Path:
    """Save a GPT-2 of the benchmarks' size with random weights and the shipped tokenizer."""
    import torch
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=512, n_positions=CONTEXT, n_embd=D_MODEL, n_layer=LAYERS, n_head=8, bos_token_id=0, eos_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)
    return folder

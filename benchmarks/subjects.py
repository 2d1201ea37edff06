"""What the benchmarks measure on: one model, made on the spot, and the shipped text."""

from __future__ import annotations

import statistics
import subprocess
import sys
from importlib.metadata import version
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


def ready_environment(package: str, release: str) -> Path:
    """Return the interpreter of an environment with a release of a package, and our torch and transformers."""
    environment = ROOT / "benchmarks/.envs" / f"{package}-{release}"
    python, done = environment / "bin/python", environment / ".ready"
    if not done.is_file():
        print(f"installing {package} {release} into {environment}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", environment], check=True)
        pins = [f"{name}=={version(name).partition('+')[0]}" for name in ("torch", "transformers")]
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, f"{package}~={release}.0", *pins], check=True)
        done.touch()
    return python


def spread(values: list[float]) -> str:
    """Return the median, and the quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:6.3f} ({low:.2f} to {high:.2f})"

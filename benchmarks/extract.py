"""Extraction end to end against the bare model on the same batches.

    python benchmarks/extract.py            speed, then memory (about half an hour on two cores)
    python benchmarks/extract.py speed      speed only
    python benchmarks/extract.py memory     memory only

Speed: tokens per second of `actpipe.run_recipe` (tokenizing, loading, proving the hooks, forward
passes, writing with fsync, commits: all of it) over that of the bare transformers model cut off
after the same layer, run on the same batches, whose inputs are ready in memory and whose outputs
are thrown away. Both in one process, in turn, the order swapped every round; medians and ratios.

Memory: peak resident memory of a process that extracts 100,000 and 1,000,000 tokens.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

from subjects import CONTEXT, D_MODEL, LAYERS, ROOT, SCRATCH, SPEECHES, make_model

BATCH_TOKENS = 8192


def make_corpus(folder: Path, copies: int) -> Path:
    """Write the speeches as JSON lines, several times over."""
    import pyarrow.parquet as pq

    rows = pq.read_table(SPEECHES, columns=["text"]).to_pylist()
    path = folder / "speeches.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows * copies))
    return path


def make_recipe(model: Path, corpus: Path, hooks: list[str], max_tokens: int) -> dict:
    return {
        "model": {"name": str(model), "dtype": "float32", "device": "cpu"},
        "stages": [
            {
                "stage": "tokenize_text",
                "dataset": {"path": str(corpus)},
                "context_length": CONTEXT,
                "max_tokens": max_tokens,
            },
            {"stage": "extract_activations", "hooks": hooks, "dtype": "float16", "batch_tokens": BATCH_TOKENS},
        ],
    }


def quiet():
    from rich.console import Console

    from actpipe.telemetry import Telemetry

    return Telemetry(Console(quiet=True))


class Bare:
    """The transformers model, cut off after a layer, on batches that are ready."""

    def __init__(self, model: Path, run: Path, layers: int) -> None:
        import torch
        from transformers import AutoModel

        from actpipe.stores.layout import RunFolder
        from actpipe.stores.token_table import TokenTable
        from actpipe.text.batching import make_batches

        self.model = AutoModel.from_pretrained(model, dtype=torch.float32).eval()
        self.model.h = self.model.h[:layers]
        self.model.ln_f = torch.nn.Identity()
        self.batches, self.n_tokens = [], 0
        for batch in make_batches(TokenTable(RunFolder(run)).read_sequences(), BATCH_TOKENS):
            ids = torch.zeros(len(batch.sequences), batch.width, dtype=torch.long)
            for number, sequence in enumerate(batch.sequences):
                ids[number, : len(sequence.ids)] = torch.from_numpy(sequence.ids)
            self.batches.append(ids)
            self.n_tokens += batch.n_tokens

    def __call__(self) -> float:
        """Return tokens per second of one pass over all batches."""
        import torch

        started = time.perf_counter()
        with torch.inference_mode():
            for ids in self.batches:
                self.model(input_ids=ids, use_cache=False)
        return self.n_tokens / (time.perf_counter() - started)


def measure_speed(n_tokens: int, rounds: int) -> None:
    """Print tokens per second of both and their ratio, for three choices of hooks."""
    from actpipe import run_recipe

    choices = {
        "resid_post of the last layer": (["blocks.5.hook_resid_post"], 6),
        "resid_post of the middle layer": (["blocks.2.hook_resid_post"], 3),
        "resid_post of all layers and z": (["blocks.*.hook_resid_post", "blocks.*.attn.hook_z"], 6),
    }
    print(f"speed: {LAYERS} layers, d_model {D_MODEL}, context {CONTEXT}, {n_tokens:,} tokens, float16 on disk")
    print(f"{'stored':34} {'bare tok/s':>11} {'actpipe tok/s':>14} {'ratio':>7}  of {rounds} rounds: min, max")
    with tempfile.TemporaryDirectory(dir=SCRATCH) as scratch:
        folder = Path(scratch)
        model, corpus = make_model(folder / "model"), make_corpus(folder, 1)
        for title, (hooks, layers) in choices.items():
            recipe = make_recipe(model, corpus, hooks, n_tokens)

            def extract(number: int, recipe: dict = recipe) -> float:
                out = folder / f"run-{number}"
                started = time.perf_counter()
                run_recipe(recipe, out=out, telemetry=quiet())
                seconds = time.perf_counter() - started
                if number:
                    subprocess.run(["rm", "-rf", out], check=True)
                return n_tokens / seconds

            extract(0)
            bare = Bare(model, folder / "run-0", layers)
            subprocess.run(["rm", "-rf", folder / "run-0"], check=True)
            bare()
            ours, theirs = [], []
            for number in range(1, rounds + 1):
                if number % 2:
                    theirs.append(bare())
                    ours.append(extract(number))
                else:
                    ours.append(extract(number))
                    theirs.append(bare())
            ratios = [mine / other for mine, other in zip(ours, theirs, strict=True)]
            print(
                f"{title:34} {statistics.median(theirs):11,.0f} {statistics.median(ours):14,.0f} "
                f"{statistics.median(ratios):7.3f}  {min(ratios):.3f}, {max(ratios):.3f}",
                flush=True,
            )


def measure_memory() -> None:
    """Print the peak resident memory of extracting two lengths, each in a process of its own."""
    print(f"memory: {LAYERS} layers, d_model {D_MODEL}, context {CONTEXT}, resid_post of all layers, float16")
    peaks = {}
    with tempfile.TemporaryDirectory(dir=SCRATCH) as scratch:
        folder = Path(scratch)
        model, corpus = make_model(folder / "model"), make_corpus(folder, 2)
        for n_tokens in (100_000, 1_000_000):
            recipe = make_recipe(model, corpus, ["blocks.*.hook_resid_post"], n_tokens)
            out = folder / f"run-{n_tokens}"
            code = (
                "import json, resource, sys; sys.path.insert(0, sys.argv[3])\n"
                "import extract; from actpipe import run_recipe\n"
                "run_recipe(json.loads(sys.argv[1]), out=sys.argv[2], telemetry=extract.quiet())\n"
                "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
            )
            command = [sys.executable, "-c", code, json.dumps(recipe), str(out), str(ROOT / "benchmarks")]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            peaks[n_tokens] = int(output.split()[-1]) * 1024
            subprocess.run(["rm", "-rf", out], check=True)
            print(f"{n_tokens:>11,} tokens: peak {peaks[n_tokens] / 1e6:,.0f} MB", flush=True)
    print(f"ratio {peaks[1_000_000] / peaks[100_000]:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["speed", "memory", "all"], default="all")
    parser.add_argument("--tokens", type=int, default=65_536, help="tokens per round")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    SCRATCH.mkdir(exist_ok=True)
    if arguments.what in ("speed", "all"):
        measure_speed(arguments.tokens, arguments.rounds)
    if arguments.what in ("memory", "all"):
        measure_memory()


if __name__ == "__main__":
    main()

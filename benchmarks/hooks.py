"""What hooks cost over the bare forward pass, beside TransformerLens' `run_with_cache`.

    python benchmarks/hooks.py              both (some minutes on two cores)
    python benchmarks/hooks.py --alone      without TransformerLens

Each side is measured against the bare transformers model in its own process, on the same batches
with as many threads: a batch by the one, then by the other, the order swapped every time, and one
ratio for each such pair. TransformerLens is installed into an environment of its own below
`benchmarks/.envs` and measured by a worker that waits while the other side runs. Medians of ratios,
with the middle half of them. `less copies`: without the time that copying the same bytes takes by
itself, into memory that is there already.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from subjects import CONTEXT, D_MODEL, LAYERS, ROOT, SCRATCH, make_model, ready_environment, spread

TRANSFORMER_LENS = "4.3"
WORKER = ROOT / "benchmarks/transformer_lens_worker.py"
SCORES = ("hook_attn_scores", "hook_pattern")
N_BATCHES, SEQUENCES = 4, 4


Measured = list[dict[str, float]]
"""For each batch, seconds of `bare`, `hooked` and, on our side, `copies`."""


class Ours:
    """`HookedModel.run_with_cache`."""

    def __init__(self, folder: Path, batches: Any) -> None:
        import torch

        from actpipe import HookedModel

        self.model = HookedModel.from_pretrained(str(folder), dtype="float32", device="cpu")
        self.batches = [torch.from_numpy(ids) for ids in batches]

    def names(self, wanted: Any) -> list[str]:
        """Return the names behind what is asked for."""
        if isinstance(wanted, list):
            return wanted
        return [n for n in self.model.select(["*"]) if wanted is None or not n.endswith(SCORES)]

    def n_bytes(self, wanted: Any) -> int:
        """Return the bytes that one batch of it takes."""
        _, cache = self.model.run_with_cache(self.batches[0], names=self.names(wanted))
        return sum(tensor.nbytes for tensor in cache.values())

    def checksum(self) -> float:
        """Return a number that both sides must agree on."""
        _, cache = self.model.run_with_cache(self.batches[0], names=["blocks.2.hook_resid_post"])
        return float(cache["blocks.2.hook_resid_post"].double().abs().mean())

    def __call__(self, wanted: Any) -> Measured:
        """Measure one round."""
        names = self.names(wanted)
        self.bare(self.batches[0])  # the other side ran meanwhile, and its data is in the caches
        return [self.measure(ids, names, hooked_first=bool(number % 2)) for number, ids in enumerate(self.batches)]

    def measure(self, ids: Any, names: list[str], *, hooked_first: bool) -> dict[str, float]:
        """Measure one batch."""
        taken, tensors = {}, []
        for what in ("hooked", "bare") if hooked_first else ("bare", "hooked"):
            if what == "bare":
                taken[what] = seconds(lambda: self.bare(ids))[0]
            else:
                taken[what], (_, cache) = seconds(lambda: self.model.run_with_cache(ids, names=names))
                tensors = list(cache.values())
                del cache
        for _ in range(2):  # the first gets the memory, the second is measured
            taken["copies"] = seconds(lambda: [tensor.clone() for tensor in tensors])[0]
        return taken

    def bare(self, ids: Any) -> Any:
        """Run the model as transformers does."""
        import torch

        with torch.no_grad():
            return self.model.native(input_ids=ids, use_cache=False)


def seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    """Return seconds and result."""
    started = time.perf_counter()
    result = run()
    return time.perf_counter() - started, result


class Theirs:
    """TransformerLens in a process of its own, which waits for requests."""

    def __init__(self, folder: Path, batches: Path, threads: int) -> None:
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(
            [ready_environment("transformer-lens", TRANSFORMER_LENS), WORKER, folder, batches, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.checksum = float(self.answer())

    def answer(self) -> Any:
        """Return the worker's next line."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("the TransformerLens worker ended early; its error is above")
        return json.loads(line)

    def __call__(self, wanted: Any) -> Measured:
        """Measure one round."""
        assert self.process.stdin is not None
        print(json.dumps(wanted), file=self.process.stdin, flush=True)
        return [{"bare": bare, "hooked": hooked} for bare, hooked in self.answer()]

    def close(self) -> None:
        """Let the worker end."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


CHOICES: dict[str, Any] = {
    "resid_post of one layer": ["blocks.2.hook_resid_post"],
    "resid_post of all layers": [f"blocks.{layer}.hook_resid_post" for layer in range(LAYERS)],
    "pattern of one layer": ["blocks.2.attn.hook_pattern"],
    "all but scores and patterns": "no scores",
    "all": None,
}


@contextmanager
def sides(alone: bool, threads: int) -> Iterator[tuple[Ours, Theirs | None]]:
    """Make the model and the batches, and start both sides on them."""
    import numpy as np

    with tempfile.TemporaryDirectory(dir=SCRATCH) as scratch:
        folder = make_model(Path(scratch) / "model")
        batches = np.random.default_rng(0).integers(0, 512, (N_BATCHES, SEQUENCES, CONTEXT))
        np.save(Path(scratch) / "batches.npy", batches)
        ours = Ours(folder, batches)
        theirs = None if alone else Theirs(folder, Path(scratch) / "batches.npy", threads)
        try:
            if theirs is not None and abs(theirs.checksum / ours.checksum() - 1) > 1e-5:
                raise SystemExit(f"the two disagree: {theirs.checksum} and {ours.checksum()}")
            yield ours, theirs
        finally:
            if theirs is not None:
                theirs.close()


def show(title: str, n_bytes: int, ours: Measured, theirs: Measured) -> None:
    """Print one row of the table."""
    hooked = [pair["hooked"] / pair["bare"] for pair in ours]
    net = [(pair["hooked"] - pair["copies"]) / pair["bare"] for pair in ours]
    other = [pair["hooked"] / pair["bare"] for pair in theirs]
    row = f"{title:28} {n_bytes / 1e6:7,.0f} MB {spread(hooked)} {statistics.median(net):11.3f}"
    print(f"{row}    {spread(other)}" if other else row, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--alone", action="store_true", help="leave TransformerLens out")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    SCRATCH.mkdir(exist_ok=True)
    import torch

    torch.set_num_threads(arguments.threads)
    print(
        f"hooks: {LAYERS} layers, d_model {D_MODEL}, batches of {SEQUENCES} x {CONTEXT} tokens, float32, "
        f"{arguments.threads} threads, medians of {arguments.rounds} rounds (quartiles)"
    )
    with sides(arguments.alone, arguments.threads) as (ours, theirs):
        results: dict[str, tuple[Measured, Measured]] = {title: ([], []) for title in CHOICES}
        for number in range(arguments.rounds + 1):
            print(f"round {number} of {arguments.rounds}", file=sys.stderr, flush=True)
            for title, wanted in CHOICES.items():
                mine, other = ours(wanted), theirs(wanted) if theirs is not None else None
                if number:  # the first round warms up
                    results[title][0].extend(mine)
                    results[title][1].extend(other or [])
        print(f"{'run_with_cache of':28} {'a batch':>10} {'over bare':>22} {'less copies':>11}", end="")
        print("" if arguments.alone else f"    {f'TransformerLens {TRANSFORMER_LENS}':>22}")
        for title, (mine, others) in results.items():
            show(title, ours.n_bytes(CHOICES[title]), mine, others)


if __name__ == "__main__":
    main()

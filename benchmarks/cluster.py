"""Workers of a Dask cluster against one, and what the scheduler costs.

    python benchmarks/cluster.py                 all of them (about twenty minutes on two cores)
    python benchmarks/cluster.py scaling         two workers against one, and one against no cluster
    python benchmarks/cluster.py scheduler       100,000 parts that do nothing
    python benchmarks/cluster.py records         what commit records take

Scaling: tokens per second of extracting one residual layer, every process computing with one thread: by this process
alone, by one worker, by two workers, in turn, the order turned every round; medians and ratios. Timed is the
extraction, from handing out the first part to the last commit; starting the cluster is not, since the tokenizing before
it has started it already, but loading the model is.

Scheduler: time per part of `DaskEngine.run_parts` with two workers that do nothing at all: submitting, running,
reporting, and all bookkeeping. A run's own parts take seconds.

Records: bytes of a commit record for each array of a small run, and the time to list 100,000 records in a folder.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from subjects import CONTEXT, SPEECHES, make_model

LAYER = 3
ENGINES = {
    "one process": {"kind": "process"},
    "one worker": {"kind": "dask", "workers": 1, "threads": 1},
    "two workers": {"kind": "dask", "workers": 2, "threads": 1},
}


def make_recipe(model: Path, engine: dict, max_tokens: int) -> dict:
    return {
        "model": {"name": str(model), "dtype": "float32", "device": "cpu"},
        "engine": engine,
        "stages": [
            {
                "stage": "tokenize_text",
                "dataset": {"path": str(SPEECHES)},
                "context_length": CONTEXT,
                "max_tokens": max_tokens,
            },
            {
                "stage": "extract_activations",
                "hooks": [f"blocks.{LAYER}.hook_resid_post"],
                "rows_per_part": 2048 // CONTEXT * CONTEXT,
                "batch_tokens": 2048,
            },
        ],
    }


def quiet():
    from rich.console import Console

    from actpipe.telemetry import Telemetry

    return Telemetry(Console(quiet=True))


def seconds_of(recipe: dict, out: Path) -> float:
    """Run a recipe, and return the time of its extraction."""
    from actpipe.running import run_recipe

    run_recipe(recipe, out=out, telemetry=quiet())
    events = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    (extraction,) = (event for event in events if event.get("what") == "extract main" and "finished" in event["event"])
    return extraction["seconds"]


def scaling(rounds: int, max_tokens: int) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    times: dict[str, list[float]] = {name: [] for name in ENGINES}
    with tempfile.TemporaryDirectory() as scratch:
        model = make_model(Path(scratch) / "model")
        for number in range(rounds):
            names = list(ENGINES)
            for name in names[number % 3 :] + names[: number % 3]:
                recipe = make_recipe(model, ENGINES[name], max_tokens)
                times[name].append(seconds_of(recipe, Path(scratch) / f"{number}-{name}"))
    print(f"\nextracting {max_tokens:,} tokens, one residual layer, one thread per process; medians of {rounds}")
    for name, seconds in times.items():
        print(f"{name:12}  {max_tokens / statistics.median(seconds):10,.0f} tokens/s")
    for one, other in (("one worker", "two workers"), ("one process", "one worker")):
        ratios = [a / b for a, b in zip(times[one], times[other], strict=True)]
        print(f"{other} / {one}: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


class Nothing:
    """Parts that are done at once."""

    @contextmanager
    def open_worker(self, context, meter) -> Iterator:
        """Give what does a part."""
        from actpipe.streaming import already_done

        del context
        yield lambda part: (meter.advance(part.n_rows), already_done())[1]


def scheduler(n_parts: int) -> None:
    from actpipe.planning import plan_parts
    from actpipe.running import prepare

    with tempfile.TemporaryDirectory() as scratch:
        recipe = make_recipe(make_model(Path(scratch) / "model"), ENGINES["two workers"], CONTEXT)
        _, context = prepare(recipe, Path(scratch) / "run", (), quiet())
        with closing(context.engine), context.telemetry.progress("parts", None, "rows") as meter:
            context.engine.run_parts(plan_parts(100, 1), Nothing(), context, meter)  # starts the cluster
            cpu, started = time.process_time(), time.perf_counter()
            context.engine.run_parts(plan_parts(n_parts, 1), Nothing(), context, meter)
            seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    print(f"\n{n_parts:,} parts that do nothing, two workers: {1000 * seconds / n_parts:.2f} ms per part,")
    print(f"of which this process (client and scheduler) computes {1000 * cpu / n_parts:.2f} ms")


def records(n_parts: int) -> None:
    from actpipe.running import run_recipe
    from actpipe.stores.layout import RunFolder
    from actpipe.stores.writing import committed_parts, read_manifest

    with tempfile.TemporaryDirectory() as scratch:
        folder = RunFolder(Path(scratch) / "run")
        model = make_model(Path(scratch) / "model")
        run_recipe(make_recipe(model, ENGINES["one process"], 8 * 2048), out=folder.root, telemetry=quiet())
        sizes = [path.stat().st_size for path in folder.commits.glob("part-*.json")]
        per_array = statistics.mean(sizes) / len(read_manifest(folder).arrays)
        for number in range(len(sizes), n_parts):
            folder.part_commit(number).touch()
        times = []
        for _ in range(5):
            started = time.perf_counter()
            assert len(committed_parts(folder)) == n_parts
            times.append(time.perf_counter() - started)
    print(f"\na commit record takes {per_array:.0f} bytes for each array")
    print(f"listing {n_parts:,} of them takes {statistics.median(times):.2f} s, median of five")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("scaling", "scheduler", "records"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=131_072)
    parser.add_argument("--parts", type=int, default=100_000)
    options = parser.parse_args()
    if options.what in (None, "scaling"):
        scaling(options.rounds, options.tokens)
    if options.what in (None, "scheduler"):
        scheduler(options.parts)
    if options.what in (None, "records"):
        records(options.parts)


if __name__ == "__main__":
    main()

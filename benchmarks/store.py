"""What the store costs: writing, writing beside the forward pass, codecs, and SAELens' cache.

    python benchmarks/store.py              all four (about ten minutes on two cores)
    python benchmarks/store.py write        one of: write, forward, codecs, saelens

Every comparison is interleaved in one process (SAELens waits in its own), each side's files are removed
before its next turn, the first round warms up, and what is printed are medians of the rounds with
quartiles.

write: rows that are in memory, in batches of 8,192, to the same disk: ours with checksums and commit
    records, `numpy.tofile` of one file per part, and zarr-python writing the same chunks uncompressed.
    Policy `none`: nobody forces anything to the disk. Policy `commit`: every file is forced once it is
    whole, and the folders that name it, by fsync, on every side.
forward: extraction with a writer against extraction whose rows are thrown away, all else the same.
codecs: parts of real activations (a trained model on real text) through each codec and element type.
saelens: `CacheActivationsRunner.run` against the extraction of the same layer of the same model over the
    same tokens in float32, both with the model in memory and stopped after that layer.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from extract import BATCH_TOKENS, make_corpus, make_recipe, quiet
from store_files import POLICIES, measure_codecs, measure_write, ratios, rounds_of
from subjects import CONTEXT, D_MODEL, LAYERS, ROOT, SCRATCH, make_model, ready_environment

SAE_LENS = "6.54"
WORKER = ROOT / "benchmarks/sae_lens_worker.py"


class Extraction:
    """The parts of one extraction, again and again, with the model and the token table in memory."""

    def __init__(self, folder: Path, hooks: list[str], dtype: str, n_tokens: int) -> None:
        from actpipe.schemas.recipe import ExtractActivationsConfig

        from actpipe import HookedModel, run_recipe
        from actpipe.stores.layout import RunFolder
        from actpipe.stores.writing import read_manifest

        self.model_folder, corpus = make_model(folder / "model"), make_corpus(folder, 1)
        recipe = make_recipe(self.model_folder, corpus, hooks, n_tokens)
        recipe["stages"][1] |= {"dtype": dtype, "rows_per_part": BATCH_TOKENS}
        run_recipe(recipe, out=folder / "first", telemetry=quiet())
        self.tokens = RunFolder(folder / "first")
        self.manifest = read_manifest(self.tokens)
        self.config = ExtractActivationsConfig(hooks=tuple(hooks), dtype=dtype, batch_tokens=BATCH_TOKENS)
        self.model = HookedModel.from_pretrained(str(self.model_folder), dtype="float32", device="cpu")

    def __call__(self, folder: Path, policy: Any, *, store: bool = True) -> float:
        """Extract everything, into a store or into nothing; return the seconds."""
        from actpipe.extraction.worker import ExtractionWorker
        from actpipe.planning import plan_parts
        from actpipe.stores.layout import RunFolder
        from actpipe.stores.writing import create_store
        from actpipe.telemetry import Meter

        run = RunFolder(folder)
        for path in (self.tokens.documents, self.tokens.sequences, self.tokens.token_commit):
            target = folder / path.relative_to(self.tokens.root)
            target.parent.mkdir(exist_ok=True)
            shutil.copy(path, target)
        create_store(run, self.manifest)
        config = self.config.model_copy(update={"fsync": policy})
        started = time.perf_counter()
        opened = ExtractionWorker.open(
            config, self.model, run, self.manifest, Meter("", None, "tokens"), None if store else lambda _: Nowhere()
        )
        with opened as worker:
            for part in plan_parts(self.manifest.n_rows, self.manifest.rows_per_part):
                worker(part)
        return time.perf_counter() - started


class Nowhere:
    """Takes the rows of a part and throws them away."""

    def write(self, _array: str, _first_row: int, rows: Any) -> int:
        """Say that they were written."""
        return rows.nbytes

    def mark(self) -> None:
        """Nothing is there to keep."""

    def undo(self) -> None:
        """Nothing is there to take back."""

    def commit(self) -> None:
        """Nothing is there to commit."""

    def abandon(self) -> None:
        """Nothing is there to abandon."""


def with_processor_time(extract: Callable[[Path], float], folder: Path) -> tuple[float, float]:
    """Return the seconds, and those of all threads together: other work on the machine disturbs these less."""
    started = time.process_time()
    return extract(folder), time.process_time() - started


def measure_forward(rounds: int, scratch: Path, n_tokens: int = 16_384) -> None:
    print(f"forward: {LAYERS} layers, d_model {D_MODEL}, {n_tokens:,} tokens, float16, medians of {rounds} rounds")
    print(f"{'stored':26} {'MB':>5} {'policy':7} {'time over storing nothing':26} processor time over it")
    choices = {
        "resid_post of all layers": ["blocks.*.hook_resid_post"],
        "resid_post, z and mlp_out": ["blocks.*.hook_resid_post", "blocks.*.attn.hook_z", "blocks.*.hook_mlp_out"],
    }
    for title, hooks in choices.items():
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            extraction = Extraction(Path(folder), hooks, "float16", n_tokens)
            sides = {"nothing": partial(with_processor_time, partial(extraction, policy="none", store=False))}
            sides |= {policy: partial(with_processor_time, partial(extraction, policy=policy)) for policy in POLICIES}
            taken = rounds_of(sides, scratch / "turn", rounds)
            written = 2 * n_tokens * D_MODEL * sum(LAYERS if "*" in hook else 1 for hook in hooks) / 1e6
            for policy in POLICIES:
                ours, nothing = zip(*taken[policy], strict=True), zip(*taken["nothing"], strict=True)
                shown = [ratios(mine, other) for mine, other in zip(ours, nothing, strict=True)]
                print(f"{title:26} {written:5,.0f} {policy:7} {shown[0]:26} {shown[1]}", flush=True)


@contextmanager
def sae_lens(model: Path, tokens: Path, layer: int, threads: int) -> Iterator[Callable[[Path], list[float]]]:
    """Start SAELens in a process of its own, which waits for requests."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen(
        [ready_environment("sae-lens", SAE_LENS), WORKER, model, tokens, str(layer), str(threads)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdin is not None
    assert process.stdout is not None

    def answer() -> Any:
        line = process.stdout.readline()  # type: ignore[union-attr]
        if not line:
            raise SystemExit("the SAELens worker ended early; its error is above")
        return json.loads(line)

    def cache(folder: Path) -> list[float]:
        print(folder / "cache", file=process.stdin, flush=True)
        return answer()

    try:
        answer()
        yield cache
    finally:
        process.stdin.close()
        process.wait()


def measure_sae_lens(rounds: int, scratch: Path) -> None:
    for layer in (0, 2):
        compare_with_sae_lens(rounds, scratch, layer)


def compare_with_sae_lens(rounds: int, scratch: Path, layer: int, n_tokens: int = 32_768) -> None:
    import torch

    from actpipe.stores.layout import RunFolder
    from actpipe.stores.reading import ActivationStore
    from actpipe.stores.token_table import TokenTable

    print(f"saelens: resid_post of layer {layer} of {LAYERS}, d_model {D_MODEL}, {n_tokens:,} tokens, float32")
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        folder = Path(name)
        extraction = Extraction(folder, [f"blocks.{layer}.hook_resid_post"], "float32", n_tokens)
        ids = np.stack([s.ids for s in TokenTable(extraction.tokens).read_sequences() if len(s.ids) == CONTEXT])
        np.save(folder / "tokens.npy", ids)
        means: dict[str, float] = {}

        def ours(run: Path, policy: str) -> float:
            taken = extraction(run, policy)
            first = ActivationStore(RunFolder(run)).array(f"blocks.{layer}.hook_resid_post").read(0, 4 * CONTEXT)
            means["ours"] = float(np.abs(first, dtype=np.float64).mean())
            return taken

        with sae_lens(extraction.model_folder, folder / "tokens.npy", layer, torch.get_num_threads()) as cache:

            def theirs(run: Path) -> float:
                taken, n_sequences, means["theirs"] = cache(run)
                if n_sequences != len(ids):
                    raise SystemExit(f"SAELens stored {n_sequences} of {len(ids)} sequences")
                return taken

            sides = {"SAELens": theirs} | {p: lambda run, policy=p: ours(run, policy) for p in POLICIES}
            taken = rounds_of(sides, scratch / "turn", rounds)
        if abs(means["ours"] / means["theirs"] - 1) > 1e-4:
            raise SystemExit(f"the two disagree: {means}")
    speed = {side: [n_tokens / seconds for seconds in values] for side, values in taken.items()}
    print(f"SAELens {SAE_LENS}, nothing forced to the disk: {statistics.median(speed['SAELens']):,.0f} tokens/s")
    for policy in POLICIES:
        middle = statistics.median(speed[policy])
        print(f"actpipe, fsync {policy}: {middle:,.0f} tokens/s, {ratios(speed[policy], speed['SAELens'])} times")


MEASURES = {
    "write": measure_write,
    "forward": measure_forward,
    "codecs": measure_codecs,
    "saelens": measure_sae_lens,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=[*MEASURES, "all"], default="all")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    SCRATCH.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=SCRATCH) as scratch:
        for name, measure in MEASURES.items():
            if arguments.what in (name, "all"):
                print(f"\nload average {os.getloadavg()[0]:.1f}", file=sys.stderr)
                measure(arguments.rounds, Path(scratch))


if __name__ == "__main__":
    main()

"""How fast the feed is, beside the ways there are to read activations for training.

    python benchmarks/feed.py               everything (about a quarter of an hour on two cores)
    python benchmarks/feed.py batches       shuffled batches beside fancy indexing and zarr
    python benchmarks/feed.py blocks        an epoch in blocks beside a sequential read, from the disk
    python benchmarks/feed.py others        epochs beside SAELens, dictionary_learning and safetensors
    python benchmarks/feed.py remote        an epoch from an object store, with and without fetching ahead

Everything is measured in turn within one round, the order turning with the rounds; medians with quartiles, and
medians of the ratios within a round. `blocks`: both sides run in a process whose memory, the file pages that it reads
included, a control group bounds to 0.6 of the data where the system allows that (the title says so), and begin with
files that are not in the page cache (posix_fadvise DONTNEED). `others`: one layer of one model over the same tokens,
float32. SAELens reads back activations in its own format, its default mixing; dictionary_learning has none and runs
the model; both live in environments of their own below `benchmarks/.envs` and are measured by a worker that waits
while the others run. `remote`: moto's S3 server on loopback, in a process of its own, begins each answer 100 ms late;
no chunk is on this machine when an epoch begins.
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
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from actpipe.schemas.manifest import ArrayManifest, ModelIdentity, StoreManifest
from feed_remote import forget_chunks, nothing_ahead, object_store
from subjects import CONTEXT, D_MODEL, ROOT, SCRATCH, make_model

from actpipe import ActivationLoader, HookedModel
from actpipe.extraction.layout import record_shape
from actpipe.hooks import BlockShape, ModelShape
from actpipe.planning import plan_parts
from actpipe.stores.layout import RunFolder
from actpipe.stores.reading import ActivationStore
from actpipe.stores.remote import local_folder
from actpipe.stores.writing import PartWriter, create_store

HOOK = "blocks.2.hook_resid_post"
BATCH = 4096
WIDE = 768
BOUNDED = ROOT / "benchmarks/feed_bounded.py"
WORKER = ROOT / "benchmarks/feed_worker.py"
REQUIREMENTS = {"sae_lens": "sae-lens==6.54.12", "dictionary_learning": "dictionary_learning==0.1.0"}
Side = Callable[[], float]
"""Measures once and returns rows per second."""


def make_store(folder: Path, blocks: Iterator[np.ndarray], n_rows: int, rows_per_part: int) -> ActivationStore:
    """Write a store of one array, a part at a time."""
    first = next(blocks)
    block = BlockShape(n_heads=1, n_kv_heads=1, d_head=1, d_qk=1, d_mlp=1, mlp="plain")
    shape = ModelShape(
        d_model=first.shape[1], d_vocab=512, n_ctx=CONTEXT, norm="LN", learned_positions=True, blocks=(block,) * 6
    )
    path = f"activations/{HOOK}"
    manifest = StoreManifest(
        corpus="main",
        n_rows=n_rows,
        rows_per_part=rows_per_part,
        context_length=CONTEXT,
        model=ModelIdentity(name="benchmark", revision=None, family="gpt2", fingerprint="0" * 64, dtype="float32"),
        shape=record_shape(shape),
        arrays=(ArrayManifest(path=path, dtype=first.dtype.name, row_shape=first.shape[1:], axes=("row", "d_model")),),
    )
    folder.mkdir(exist_ok=True)
    create_store(RunFolder(folder), manifest)
    for part in plan_parts(n_rows, rows_per_part):
        rows = first if part.index == 0 else next(blocks)
        writer = PartWriter(RunFolder(folder), manifest, part, fsync=True)
        writer.write(path, part.row_start, rows)
        writer.commit()
    return ActivationStore(RunFolder(folder))


def random_parts(n_rows: int, rows_per_part: int) -> Iterator[np.ndarray]:
    """Yield rows as they could be stored, part by part."""
    rng = np.random.default_rng(0)
    for part in plan_parts(n_rows, rows_per_part):
        yield rng.standard_normal((part.n_rows, WIDE), np.float32).astype(np.float16)


def seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def compare(title: str, sides: dict[str, Side], rounds: int, row_bytes: int) -> None:
    """Measure the sides in turn and print them; ratios are those of the first over each."""
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for number in range(rounds + 1):
        print(f"{title}: round {number} of {rounds}", file=sys.stderr, flush=True)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            speed = sides[name]()
            if number:  # the first round warms up
                speeds[name].append(speed)
    print(f"\n{title}\n{'':44} {'rows/s':>12} {'':22} {'MB/s':>8} {'feed / it':>10}")
    for name in names:
        low, middle, high = statistics.quantiles(speeds[name], n=4)
        ratio = statistics.median(a / b for a, b in zip(speeds[names[0]], speeds[name], strict=True))
        spread = f"({low:,.0f} to {high:,.0f})"
        print(f"{name:44} {middle:12,.0f} {spread:>24} {middle * row_bytes / 1e6:6,.0f} {ratio:10.2f}")


def epochs(loader: ActivationLoader, n_batches: int) -> Side:
    """Return a side that takes some batches of a feed."""

    def measure() -> float:
        def take() -> None:
            for number, _ in enumerate(loader, 1):
                if number == n_batches:
                    return

        return BATCH * n_batches / seconds(take)

    return measure


def batches(folder: Path, n_rows: int, rounds: int) -> None:
    """Shuffled batches, from the page cache."""
    import zarr

    store = make_store(folder / "run", random_parts(n_rows, 65_536), n_rows, 65_536)
    one = np.lib.format.open_memmap(folder / "one.npy", mode="w+", dtype=np.float16, shape=(n_rows, WIDE))
    for part in range(store.n_parts):
        one[part * 65_536 : (part + 1) * 65_536] = store.array(HOOK).part(part)
    one.flush()
    array = zarr.open_group(store.folder.store, mode="r")[f"activations/{HOOK}"]
    rng = np.random.default_rng(1)

    def indexing(take: Callable[[np.ndarray], np.ndarray], n_batches: int) -> Side:
        def measure() -> float:
            order = rng.permutation(n_rows)[: n_batches * BATCH].reshape(n_batches, BATCH)

            def go() -> None:
                for rows in order:
                    torch.from_numpy(take(rows))

            return BATCH * n_batches / seconds(go)

        return measure

    sides = {
        "feed, shuffle='rows', no reading ahead": epochs(ActivationLoader(store, HOOK, BATCH, read_ahead=0), 64),
        "feed, shuffle='rows'": epochs(ActivationLoader(store, HOOK, BATCH), 64),
        "feed, shuffle='blocks'": epochs(ActivationLoader(store, HOOK, BATCH, "blocks"), 64),
        "one memory-mapped array, fancy indexing": indexing(lambda rows: one[rows], 64),
        "zarr, oindex": indexing(lambda rows: array.oindex[rows], 1),
    }
    compare(f"batches of {BATCH:,} random rows, {n_rows:,} rows of {WIDE} float16", sides, rounds, 2 * WIDE)


def blocks(folder: Path, n_rows: int, rounds: int, share: float = 0.6) -> None:
    """A whole epoch in blocks, in less memory than the data takes."""
    store = make_store(folder / "run", random_parts(n_rows, 65_536), n_rows, 65_536)
    n_bytes = 2 * WIDE * n_rows
    max_bytes = int(share * n_bytes)
    worker = Worker(sys.executable, BOUNDED, store.folder.root, HOOK, str(BATCH), str(max_bytes))
    bound = (
        f"in a process that with its file pages may take {max_bytes / 1e9:.2f} GB (memory control group)"
        if worker.ready["bounded"]
        else "memory not bounded: this system allows no control group"
    )
    title = f"an epoch from the disk, {n_rows:,} rows of {WIDE} float16, {n_bytes / 1e9:.2f} GB, {bound}"
    used: dict[str, list[float]] = {"feed": [], "sequential": []}

    def side(request: str) -> float:
        answer = worker.ask(request)
        used[request].append(answer["processor_seconds"] / (n_bytes / 1e9))
        return answer["rows_per_second"]

    try:
        sides = {
            "feed, shuffle='blocks'": lambda: side("feed"),
            "sequential read of the files": lambda: side("sequential"),
        }
        compare(title, sides, rounds, 2 * WIDE)
        for request, values in used.items():
            print(f"processor seconds per GB, all threads, {request}: {statistics.median(values[1:]):.2f}")
    finally:
        worker.close()


def remote(folder: Path, rounds: int, n_parts: int = 32, rows_per_part: int = 4096) -> None:
    """A whole epoch of a run of which no chunk is on this machine."""
    n_rows = n_parts * rows_per_part
    with object_store(folder / "cache", 0.1) as url:
        store = make_store(local_folder(url), random_parts(n_rows, rows_per_part), n_rows, rows_per_part)
        orders = {
            "shuffle='blocks', a part each": (
                "blocks",
                {"block_rows": rows_per_part, "buffer_rows": 4 * rows_per_part},
            ),
            "shuffle='rows'": ("rows", {}),
        }

        def epoch(shuffle: str, options: dict[str, int], ahead: AbstractContextManager[None]) -> float:
            forget_chunks(store.folder.store)
            with ahead:
                return n_rows / seconds(
                    lambda: [None for _ in ActivationLoader(store, HOOK, BATCH, shuffle, **options)]
                )

        for title, order in orders.items():
            sides = {
                "fetching ahead": lambda order=order: epoch(*order, nullcontext()),
                "each chunk when it is needed": lambda order=order: epoch(*order, nothing_ahead()),
            }
            size = f"{n_parts} chunks of {2e-6 * WIDE * rows_per_part:.1f} MB"
            compare(f"an epoch from S3 that answers 0.1 s late, {title}, {size}", sides, rounds, 2 * WIDE)


def ready_environment(name: str) -> Path:
    """Return the interpreter of an environment with one of the others and our torch and transformers."""
    folder = ROOT / "benchmarks/.envs" / REQUIREMENTS[name].replace("==", "-").replace("_", "-")
    python, done = folder / "bin/python", folder / ".ready"
    if not done.is_file():
        print(f"installing {REQUIREMENTS[name]} into {folder}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        pins = [f"{library}=={version(library).partition('+')[0]}" for library in ("torch", "transformers")]
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, REQUIREMENTS[name], *pins], check=True)
        # a torchvision of another torch keeps transformers from being imported, and nobody here looks at images
        subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", "torchvision"], check=True)
        done.touch()
    return python


class Worker:
    """Measures in a process of its own, which waits for requests."""

    def __init__(self, *arguments: str | Path) -> None:
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        self.process = subprocess.Popen(
            arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.ready = self._answer()

    def __call__(self, request: str = "") -> float:
        """Measure an epoch and return rows per second."""
        return self.ask(request)["rows_per_second"]

    def ask(self, request: str) -> dict[str, float]:
        """Measure an epoch and return everything that was measured."""
        assert self.process.stdin is not None
        print(request, file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, float]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit(f"{self.process.args[2]} ended early; its error is above")

    def close(self) -> None:
        """Let it end."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


class Shards(torch.utils.data.Dataset):
    """Rows of safetensors files, by number."""

    def __init__(self, folder: Path, activations: np.ndarray, rows_per_shard: int) -> None:
        from safetensors.torch import load_file, save_file

        folder.mkdir()
        self.rows_per_shard, self.n_rows, self.shards = rows_per_shard, len(activations), []
        for start in range(0, self.n_rows, rows_per_shard):
            path = folder / f"{start}.safetensors"
            save_file({"rows": torch.from_numpy(activations[start : start + rows_per_shard])}, path)
            self.shards.append(load_file(path)["rows"])

    def __len__(self) -> int:
        return self.n_rows

    def __getitem__(self, row: int) -> torch.Tensor:
        return self.shards[row // self.rows_per_shard][row % self.rows_per_shard]


def others(folder: Path, n_sequences: int, rounds: int) -> None:
    """Epochs over the activations of one layer."""
    folder.mkdir(exist_ok=True)
    model = HookedModel.from_pretrained(str(make_model(folder / "model")), dtype="float32", device="cpu")
    ids = np.random.default_rng(0).integers(1, 512, (n_sequences, CONTEXT))
    activations = np.empty((n_sequences, CONTEXT, D_MODEL), np.float32)
    for start in range(0, n_sequences, 16):
        _, cache = model.run_with_cache(torch.from_numpy(ids[start : start + 16]), names=[HOOK])
        activations[start : start + 16] = cache[HOOK].numpy()
    np.save(folder / "ids.npy", ids)
    np.save(folder / "activations.npy", activations)
    rows = activations.reshape(-1, D_MODEL)
    n_rows = len(rows)
    parts = (rows[part.row_start : part.row_stop] for part in plan_parts(n_rows, 16_384))
    store = make_store(folder / "run", parts, n_rows, 16_384)
    shards = Shards(folder / "shards", rows, 16_384)
    workers = {name: Worker(ready_environment(name), WORKER, name, folder, HOOK, str(BATCH)) for name in REQUIREMENTS}

    def through(loader: torch.utils.data.DataLoader) -> Side:
        return lambda: n_rows / seconds(lambda: [None for _ in loader])

    sides = {
        "feed, shuffle='rows'": through(ActivationLoader(store, HOOK, BATCH)),
        "feed, shuffle='blocks'": through(ActivationLoader(store, HOOK, BATCH, "blocks", buffer_rows=32_768)),
        "SAELens 6.54, cached activations": workers["sae_lens"],
        "safetensors, DataLoader, 2 workers": through(
            torch.utils.data.DataLoader(shards, batch_size=BATCH, shuffle=True, num_workers=2)
        ),
        "dictionary_learning 0.1, runs the model": workers["dictionary_learning"],
    }
    try:
        for name, worker in workers.items():
            if abs(worker.ready["mean"] / float(np.abs(rows).mean(dtype=np.float64)) - 1) > 1e-3:
                raise SystemExit(f"{name} gives other activations: {worker.ready}")
        title = f"an epoch of {n_rows:,} rows of {D_MODEL} float32, batches of {BATCH:,}"
        compare(title, sides, rounds, 4 * D_MODEL)
    finally:
        for worker in workers.values():
            worker.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", nargs="?", choices=["batches", "blocks", "others", "remote"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=800_000, help="rows of `batches`; twice as many in `blocks`")
    parser.add_argument("--sequences", type=int, default=512, help="sequences of `others`")
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error("quartiles want --rounds of at least 2")
    warnings.simplefilter("ignore")
    SCRATCH.mkdir(exist_ok=True)
    choices = {
        "batches": lambda folder: batches(folder, arguments.rows, arguments.rounds),
        "blocks": lambda folder: blocks(folder, 2 * arguments.rows, arguments.rounds),
        "others": lambda folder: others(folder, arguments.sequences, arguments.rounds),
        "remote": lambda folder: remote(folder, arguments.rounds),
    }
    for name in [arguments.which] if arguments.which else choices:
        with tempfile.TemporaryDirectory(dir=SCRATCH) as folder:
            choices[name](Path(folder))


if __name__ == "__main__":
    main()

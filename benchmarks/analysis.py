"""What the analyses cost, beside what the hardware can do with the same bytes.

    python benchmarks/analysis.py           all four (a few minutes on two cores)
    python benchmarks/analysis.py moments   one of: moments, attribution, memory, scaling

Every comparison is interleaved in one process, the first round warms up, and what is printed are medians of the
rounds with quartiles. Files are in the page cache.

moments: mean, and covariance, of a stored layer in blocks under Dask, against numpy reading the same bytes from
    memory maps (every byte is copied into a buffer once); the covariance against its matrix products too.
attribution: the logits of next tokens attributed to every component and head, reading included, against torch
    doing the same contractions, or their matrix products alone, on tensors that are in memory already.
memory: peak memory of a process of its own beyond what it had before, by `block_bytes`, one worker; pages of the
    mapped store, which the system takes back at will, are not counted.
scaling: covariance of half of the rows and of all, on 1 and on 2 workers.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dask
import numpy as np
import torch
from extract import make_corpus, make_recipe, quiet
from subjects import D_MODEL, LAYERS, SCRATCH, make_model, spread

HOOK = "blocks.0.hook_resid_post"
BLOCK_BYTES, TILE_ROWS = 64 * 2**20, 1024


@dataclass(frozen=True)
class Sums:
    """Count, sums and products of rows; they add up."""

    count: int
    total: np.ndarray
    products: np.ndarray | None

    def __add__(self, other: Sums) -> Sums:
        products = None if self.products is None else self.products + other.products
        return Sums(self.count + other.count, self.total + other.total, products)


def sums_of(block: Any, *, products: bool) -> Sums:
    rows = block.read(HOOK)
    tiles = [rows[start : start + TILE_ROWS].sum(0) for start in range(0, len(rows), TILE_ROWS)]
    total = np.sum(tiles, axis=0, dtype=np.float64)  # float32 within a tile, float64 between them
    wide = torch.from_numpy(rows)
    return Sums(len(rows), total, (wide.T @ wide).double().numpy() if products else None)


def moments(store: Any, *, products: bool, share: float = 1.0) -> Sums:
    """Sum the first rows of a layer, block by block under Dask."""
    from actpipe.jobs.blocks import even_blocks, map_and_sum

    blocks = even_blocks(store, [HOOK], BLOCK_BYTES // (4 if products else 1))
    return map_and_sum(lambda block: sums_of(block, products=products), blocks[: int(len(blocks) * share)])


def read_maps(store: Any) -> None:
    """Copy every byte of the layer out of its maps, part by part."""
    array = store.array(HOOK)
    buffer = np.empty((array.rows_per_part, *array.shape[1:]), array.dtype)
    for index in range(store.n_parts):
        part = array.part(index)
        np.copyto(buffer[: len(part)], part)


def timed(sides: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Run the sides in turn, the first round to warm up; return the seconds of each round."""
    taken: dict[str, list[float]] = {side: [] for side in sides}
    for round_number in range(rounds + 1):
        for side, run in sides.items():
            started = time.perf_counter()
            run()
            if round_number:
                taken[side].append(time.perf_counter() - started)
    return taken


def ratio(one: list[float], other: list[float]) -> str:
    return spread([a / b for a, b in zip(one, other, strict=True)])


def make_store(folder: Path, hooks: list[str], n_tokens: int) -> Any:
    import actpipe

    model, corpus = make_model(folder / "model"), make_corpus(folder, -(-n_tokens // 300_000))
    recipe = make_recipe(model, corpus, hooks, n_tokens)
    recipe["stages"][1] |= {"dtype": "float32", "rows_per_part": 16_384}
    actpipe.run_recipe(recipe, out=folder / "run", telemetry=quiet())
    return actpipe.open_store(folder / "run")


def measure_moments(rounds: int, scratch: Path) -> None:
    store = make_store(scratch, [HOOK], 262_144)
    rows = torch.from_numpy(store.array(HOOK).read(0, 8192).copy())
    size = store.n_rows * D_MODEL * 4 / 1e6
    sides = {
        "read": lambda: read_maps(store),
        "mean": lambda: moments(store, products=False),
        "covariance": lambda: moments(store, products=True),
        "products": lambda: [rows.T @ rows for _ in range(store.n_rows // len(rows))],
    }
    taken = timed(sides, rounds)
    print(f"moments: {size:,.0f} MB of float32, read at {size / statistics.median(taken['read']):,.0f} MB/s")
    print(f"mean         {ratio(taken['read'], taken['mean'])} of the speed of reading")
    print(f"covariance   {ratio(taken['read'], taken['covariance'])} of the speed of reading", flush=True)
    print(f"covariance   {ratio(taken['products'], taken['covariance'])} of the speed of torch's products in memory")


ATTRIBUTED = ["hook_embed", "hook_pos_embed", "blocks.*.hook_attn_out", "blocks.*.hook_mlp_out"]
ATTRIBUTED += ["blocks.*.attn.hook_z", "ln_final.hook_scale"]


def attribution_weights(folder: Path) -> Any:
    from actpipe import HookedModel
    from actpipe.lenses import attribution_weights

    return attribution_weights(HookedModel.from_pretrained(str(folder / "model"), dtype="float32", device="cpu"))


def measure_attribution(rounds: int, scratch: Path) -> None:
    from actpipe.compute.attribution import next_tokens
    from actpipe.jobs.attribution import attribute_store

    store = make_store(scratch, ATTRIBUTED, 16_384)
    weights = attribution_weights(scratch)
    ids, sequence = (store.array(f"tokens/{name}").read(0, store.n_rows) for name in ("input_ids", "sequence"))
    targets = np.maximum(next_tokens(ids.astype(np.int64), sequence.astype(np.int64), store.n_rows), 0)
    directions = torch.from_numpy(weights.unembedding.directions)[torch.from_numpy(targets)]
    z = [
        torch.from_numpy(np.array(store.array(f"blocks.{i}.attn.hook_z").read(0, store.n_rows))) for i in range(LAYERS)
    ]
    written = [
        torch.from_numpy(np.array(store.array(name).read(0, store.n_rows)))
        for name in store.hook_names
        if name.endswith(("hook_embed", "hook_pos_embed", "_out"))
    ]
    W_O = [torch.from_numpy(layer.W.reshape(-1, D_MODEL)).T.contiguous() for layer in weights.attention]

    def contract() -> None:
        for values, matrix in zip(z, W_O, strict=True):
            torch.einsum("rhd,rhd->rh", values, (directions @ matrix).view(values.shape))
        for values in written:
            torch.einsum("rd,rd->r", values, directions)

    def multiply() -> None:
        for matrix in W_O:
            _ = directions @ matrix

    sides = {
        "products": multiply,
        "torch": contract,
        "actpipe": lambda: attribute_store(store, weights, block_bytes=256 * 2**20),
    }
    sides["small blocks"] = lambda: attribute_store(store, weights, block_bytes=32 * 2**20)
    taken = timed(sides, rounds)
    n_heads = LAYERS * store.shape.n_heads
    print(f"attribution: {store.n_rows:,} rows to {len(written)} components and {n_heads} heads, d_model {D_MODEL}")
    print(f"torch on tensors in memory: {statistics.median(taken['torch']):.2f} s")
    for side in ("actpipe", "small blocks"):
        print(f"{side:12} {ratio(taken['torch'], taken[side])} of the speed of torch", flush=True)
        print(f"{side:12} {ratio(taken['products'], taken[side])} of that of its matrix products alone", flush=True)


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def print_peak(scratch: Path, block_bytes: int) -> None:
    """Attribute in this process, and print by how many bytes its own memory grew at most."""
    import actpipe
    from actpipe.jobs.attribution import attribute_store

    store, weights = actpipe.open_store(scratch / "run"), attribution_weights(scratch)
    with dask.config.set(scheduler="synchronous"):
        attribute_store(store, weights, block_bytes=2**20)
        before, peak, over = anonymous_bytes(), 0, threading.Event()

        def watch() -> None:
            nonlocal peak
            while not over.wait(0.001):
                peak = max(peak, anonymous_bytes())

        watcher = threading.Thread(target=watch)
        watcher.start()
        attribute_store(store, weights, block_bytes=block_bytes)
        over.set()
        watcher.join()
    print(peak - before)


def measure_memory(_rounds: int, scratch: Path) -> None:
    store = make_store(scratch, ATTRIBUTED, 16_384)
    print(f"memory: attribution of {store.n_rows:,} rows, one worker, largest of 3 processes")
    for mebibytes in (32, 128, 512):
        command = [sys.executable, __file__, "peak", "--store", scratch, "--block-bytes", str(mebibytes * 2**20)]
        peaks = [int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) for _ in range(3)]
        print(f"block_bytes {mebibytes:4} MiB: peak {max(peaks) / 2**20:6.0f} MiB", flush=True)


def measure_scaling(rounds: int, scratch: Path) -> None:
    store = make_store(scratch, [HOOK], 262_144)
    for workers in (1, 2):
        torch.set_num_threads(1)
        with dask.config.set(scheduler="threads", num_workers=workers):
            sides = {
                "half": lambda: moments(store, products=True, share=0.5),
                "all": lambda: moments(store, products=True),
            }
            taken = timed(sides, rounds)
        doubled = ratio(taken["all"], taken["half"])
        print(
            f"scaling, {workers} worker{'s' * (workers > 1)}: twice the rows take {doubled} times as long", flush=True
        )


MEASURES = {
    "moments": measure_moments,
    "attribution": measure_attribution,
    "memory": measure_memory,
    "scaling": measure_scaling,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=[*MEASURES, "all", "peak"], default="all")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--store", type=Path, help="of `peak`, which `memory` starts in processes of their own")
    parser.add_argument("--block-bytes", type=int, default=BLOCK_BYTES)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if arguments.what == "peak":
        print_peak(arguments.store, arguments.block_bytes)
        return
    SCRATCH.mkdir(exist_ok=True)
    for name, measure in MEASURES.items():
        if arguments.what in (name, "all"):
            with tempfile.TemporaryDirectory(dir=SCRATCH) as scratch:
                measure(arguments.rounds, Path(scratch))


if __name__ == "__main__":
    main()

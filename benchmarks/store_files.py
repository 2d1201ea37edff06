"""Rows that are in memory into files: ours, numpy's and zarr's, and what codecs make of real activations."""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from extract import BATCH_TOKENS, make_recipe, quiet
from subjects import SCRATCH, SPEECHES, TOKENIZER, spread

POLICIES = ("none", "commit")


def rounds_of(sides: dict[str, Callable[[Path], Any]], folder: Path, rounds: int) -> dict[str, list[Any]]:
    """Give every side its turn in every round, each in a folder that is empty; return what they answer."""
    answers: dict[str, list[Any]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        names = list(sides)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            os.sync()
            answer = sides[name](folder)
            if number:  # the first round warms up
                answers[name].append(answer)
    shutil.rmtree(folder, ignore_errors=True)
    return answers


def ratios(ours: list[float], theirs: list[float]) -> str:
    """Return the median ratio of turns of the same round."""
    return spread([mine / other for mine, other in zip(ours, theirs, strict=True)])


def plan(arrays: dict[str, tuple[str, int, Any]], n_rows: int, rows_per_part: int, **more: Any) -> Any:
    """Return a manifest of arrays given as name -> (element type, width, quantisation)."""
    from actpipe.schemas.manifest import ArrayManifest, ModelIdentity, StoreManifest

    from actpipe.extraction.layout import record_shape
    from actpipe.hooks import BlockShape, ModelShape

    block = BlockShape(n_heads=1, n_kv_heads=1, d_head=1, d_qk=1, d_mlp=1, mlp="plain")
    shape = ModelShape(d_model=1, d_vocab=1, n_ctx=1, norm="LN", learned_positions=True, blocks=(block,))
    return StoreManifest(
        corpus="main",
        n_rows=n_rows,
        rows_per_part=rows_per_part,
        context_length=1,
        model=ModelIdentity(name="m", revision=None, family="f", fingerprint="0" * 64, dtype="float32"),
        shape=record_shape(shape),
        arrays=tuple(
            ArrayManifest(path=path, dtype=dtype, row_shape=(width,), axes=("row", "d_model"), quantisation=kept)
            for path, (dtype, width, kept) in arrays.items()
        ),
        **more,
    )


def write_ours(folder: Path, manifest: Any, arrays: dict[str, Any], policy: Any) -> float:
    """Write arrays as a run does; return the seconds."""
    from actpipe.planning import plan_parts
    from actpipe.stores.layout import RunFolder
    from actpipe.stores.writing import PartWriter, create_store

    run = RunFolder(folder)
    create_store(run, manifest)
    started = time.perf_counter()
    for part in plan_parts(manifest.n_rows, manifest.rows_per_part):
        writer = PartWriter(run, manifest, part, fsync=policy)
        for start in range(part.row_start, part.row_stop, BATCH_TOKENS):
            for name, rows in arrays.items():
                writer.write(name, start, rows[start : min(start + BATCH_TOKENS, part.row_stop)])
        writer.commit()
    return time.perf_counter() - started


def write_tofile(folder: Path, rows: Any, rows_per_part: int, policy: str) -> float:
    from actpipe.stores.layout import sync

    started = time.perf_counter()
    for part, start in enumerate(range(0, len(rows), rows_per_part)):
        with (folder / str(part)).open("wb") as file:
            rows[start : start + rows_per_part].tofile(file)
            if policy == "commit":
                os.fsync(file.fileno())
        if policy == "commit":
            sync(folder)
    return time.perf_counter() - started


def write_zarr(folder: Path, rows: Any, rows_per_part: int, policy: str) -> float:
    import zarr

    from actpipe.stores import bfloat16  # noqa: F401 - registers the element type
    from actpipe.stores.layout import sync

    dtype = rows.dtype.name
    array = zarr.create_array(
        folder / "a.zarr", shape=rows.shape, chunks=(rows_per_part, rows.shape[1]), dtype=dtype, compressors=None
    )
    started = time.perf_counter()
    for part, start in enumerate(range(0, len(rows), rows_per_part)):
        array[start : start + rows_per_part] = rows[start : start + rows_per_part]
        if policy == "commit":
            for path in (f"a.zarr/c/{part}/0", f"a.zarr/c/{part}", "a.zarr/c"):
                sync(folder / path)
    return time.perf_counter() - started


def measure_write(rounds: int, scratch: Path) -> None:
    import ml_dtypes

    print(f"write: 384 MiB per turn in parts of 96 MiB, medians of {rounds} rounds (quartiles)")
    print(f"{'rows':18} {'policy':7} {'ours MB/s':>10} {'tofile':>8} {'zarr':>6}   {'ours/tofile':24} ours/zarr")
    for width in (768, 4096):
        for dtype in (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)):
            rows_per_part = 96 * 2**20 // (2 * width)
            wide = np.random.default_rng(0).standard_normal((rows_per_part, width), dtype=np.float32)
            rows = np.tile(wide.astype(dtype), (4, 1))
            manifest = plan({"activations/x": (dtype.name, width, None)}, len(rows), rows_per_part)
            for policy in POLICIES:
                sides = {
                    "ours": lambda f: write_ours(f, manifest, {"activations/x": rows}, policy),  # noqa: B023
                    "tofile": lambda f: write_tofile(f, rows, rows_per_part, policy),  # noqa: B023
                    "zarr": lambda f: write_zarr(f, rows, rows_per_part, policy),  # noqa: B023
                }
                taken = rounds_of(sides, scratch / "turn", rounds)
                speed = {name: [rows.nbytes / 1e6 / s for s in seconds] for name, seconds in taken.items()}
                middle = {name: statistics.median(values) for name, values in speed.items()}
                print(
                    f"{dtype.name:9} d={width:<6} {policy:7} {middle['ours']:10,.0f} {middle['tofile']:8,.0f} "
                    f"{middle['zarr']:6,.0f}   {ratios(speed['ours'], speed['tofile']):24} "
                    f"{ratios(speed['ours'], speed['zarr'])}",
                    flush=True,
                )


def real_activations() -> dict[str, Any]:
    """Return activations of the shipped trained model on the shipped text, in float32."""
    from actpipe import open_store, run_recipe

    hooks = ["blocks.*.hook_resid_post", "blocks.*.attn.hook_z", "blocks.*.hook_mlp_out"]
    with tempfile.TemporaryDirectory(dir=SCRATCH) as folder:
        recipe = make_recipe(TOKENIZER, SPEECHES, hooks, 100_000)
        recipe["stages"][1]["dtype"] = "float32"
        recipe["stages"][0]["context_length"] = 128
        run_recipe(recipe, out=Path(folder) / "run", telemetry=quiet())
        store = open_store(Path(folder) / "run")
        return {name: store[name].compute().reshape(store.n_rows, -1) for name in store.hook_names}


def measure_codecs(rounds: int, scratch: Path) -> None:
    from actpipe.stores.encoding import quantisation_of
    from actpipe.stores.fidelity import read_fidelity
    from actpipe.stores.layout import RunFolder
    from actpipe.stores.reading import ActivationStore

    wide = {f"activations/{name}": rows for name, rows in real_activations().items()}
    n_rows, values = len(next(iter(wide.values()))), sum(rows.size for rows in wide.values())
    print(f"codecs: {len(wide)} arrays of a trained 2-layer model, {n_rows:,} tokens, medians of {rounds} rounds")
    print(
        f"{'type':13} {'codec':6} {'bytes/value':>11} {'of float16':>10} {'write Mvalues/s':>15} "
        f"{'read Mvalues/s':>14} {'relative error':>22} {'cosine':>9}"
    )
    for dtype, codec in (
        *((dtype, codec) for dtype in ("float16", "bfloat16") for codec in ("none", "zstd", "blosc")),
        *((dtype, codec) for dtype in ("int8", "float8_e4m3") for codec in ("none", "zstd")),
    ):
        code = dtype if dtype in ("int8", "float8_e4m3") else None
        arrays = wide if code else {name: cast(rows, dtype) for name, rows in wide.items()}
        kinds = {
            name: ("float32" if code else dtype, rows.shape[1], quantisation_of(name, code) if code else None)
            for name, rows in arrays.items()
        }
        manifest = plan(kinds, n_rows, 65_536, codec=codec, schema_version=2)
        reads, sizes, found = [], [], {}

        def turn(folder: Path) -> float:
            taken = write_ours(folder, manifest, arrays, "none")  # noqa: B023
            sizes.append(sum(path.stat().st_size for path in (folder / "store.zarr").rglob("c/**/*") if path.is_file()))  # noqa: B023
            store = ActivationStore(RunFolder(folder))
            started = time.perf_counter()
            for name in store.array_names:
                np.array(store.array(name).read(0, store.n_rows))
            reads.append(time.perf_counter() - started)  # noqa: B023
            found.update(read_fidelity(RunFolder(folder)))  # noqa: B023
            return taken

        taken = rounds_of({"ours": turn}, scratch / "turn", rounds)["ours"]
        stored = manifest.rows_per_part * -(-n_rows // manifest.rows_per_part) / n_rows  # the last part is filled up
        per_value = sizes[-1] / values / (stored if codec == "none" else 1)
        errors = [summary.relative_error for summary in found.values()]
        shown = f"{min(errors):.2%} to {max(errors):.2%}" if errors else "rounding to the type"
        cosine = f"{min(summary.cosine for summary in found.values()):.6f}" if found else ""
        print(
            f"{dtype:13} {codec:6} {per_value:11.3f} {per_value / 2:10.2f} "
            f"{values / 1e6 / statistics.median(taken):15,.0f} {values / 1e6 / statistics.median(reads[1:]):14,.0f} "
            f"{shown:>22} {cosine:>9}",
            flush=True,
        )


def cast(rows: Any, dtype: str) -> Any:
    from actpipe.stores.dtypes import numpy_dtype

    return rows.astype(numpy_dtype(dtype))

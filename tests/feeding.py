"""Small stores for tests of the feed, written without a model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from actpipe.schemas.manifest import ArrayManifest, ModelIdentity, StoreManifest

from actpipe.extraction.layout import record_shape
from actpipe.hooks import BlockShape, ModelShape
from actpipe.planning import plan_parts
from actpipe.stores.dtypes import numpy_dtype
from actpipe.stores.layout import RunFolder
from actpipe.stores.reading import ActivationStore
from actpipe.stores.writing import PartWriter, create_store

BLOCK = BlockShape(n_heads=2, n_kv_heads=2, d_head=2, d_qk=2, d_mlp=4, mlp="plain")
PRE, POST = "blocks.0.hook_resid_pre", "blocks.0.hook_resid_post"


def write_store(
    folder: Path, n_rows: int, rows_per_part: int, *, dtype: str = "float32", first: int = 0, codec: str = "none"
) -> ActivationStore:
    """Write a store whose row `i` holds `first + i` in PRE, minus that in POST, and token `i % 7`."""
    run = RunFolder(folder)
    arrays = {f"activations/{PRE}": 4, f"activations/{POST}": 4}
    manifest = StoreManifest(
        schema_version=1 if codec == "none" else 2,
        codec=codec,
        corpus="main",
        n_rows=n_rows,
        rows_per_part=rows_per_part,
        context_length=8,
        model=ModelIdentity(name="m", revision=None, family="f", fingerprint="0" * 64, dtype="float32"),
        shape=record_shape(
            ModelShape(d_model=4, d_vocab=7, n_ctx=8, norm="LN", learned_positions=True, blocks=(BLOCK,))
        ),
        arrays=(
            *(
                ArrayManifest(path=path, dtype=dtype, row_shape=(n,), axes=("row", "d_model"))
                for path, n in arrays.items()
            ),
            ArrayManifest(path="tokens/input_ids", dtype="int32", row_shape=(), axes=("row",)),
        ),
    )
    folder.mkdir(parents=True, exist_ok=True)
    create_store(run, manifest)
    values = (np.arange(n_rows)[:, None] + first + np.zeros(4)).astype(np.float32)
    contents = {
        f"activations/{PRE}": values.astype(numpy_dtype(dtype)),
        f"activations/{POST}": (-values).astype(numpy_dtype(dtype)),
        "tokens/input_ids": (np.arange(n_rows) % 7).astype(np.int32),
    }
    for part in plan_parts(n_rows, rows_per_part):
        writer = PartWriter(run, manifest, part, fsync=False)
        for path, array in contents.items():
            writer.write(path, part.row_start, array[part.row_start : part.row_stop])
        writer.commit()
    return ActivationStore(run)

"""Show what `actpipe plan` says of models of known sizes on devices given by hand; no weights are needed.

python benchmarks/placement.py            a table of models and devices
python benchmarks/placement.py 70B 8 80   the whole plan of one of them on 8 devices of 80 GB
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from actpipe.cli import new_console, print_finding
from actpipe.planning import Devices
from actpipe.records import Finding
from actpipe.running import plan_recipe
from actpipe.telemetry import Telemetry

SIZES: dict[str, dict[str, Any]] = {
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    "405B": {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128},
}
"""Of Llama 3.1 and 3.2."""
TOKENIZER = Path(__file__).parent.parent / "workflows" / "data" / "induction-2l"


def make_model(folder: Path, size: str) -> Path:
    """Write the configuration of a model, and some tokenizer."""
    model = folder / f"llama-{size}"
    shutil.copytree(TOKENIZER, model, ignore=shutil.ignore_patterns("*.safetensors", "config.json", "*.md"))
    config = {"model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8, "dtype": "bfloat16"}
    config |= {"max_position_embeddings": 131072, "tie_word_embeddings": size == "1B", **SIZES[size]}
    (model / "config.json").write_text(json.dumps(config))
    return model


def plan(folder: Path, size: str, devices: Devices) -> list[Finding]:
    """Plan to store the stream after every layer."""
    model = folder / f"llama-{size}"
    model = model if model.is_dir() else make_model(folder, size)
    stages = [
        {"stage": "tokenize_text", "synthetic": {"n_documents": 1000, "period": 512}, "context_length": 1024},
        {"stage": "extract_activations", "hooks": ["blocks.*.hook_resid_post"], "metrics": ["loss"]},
    ]
    recipe = {"model": {"name": str(model)}, "stages": stages}
    return plan_recipe(recipe, out=folder / "run", telemetry=Telemetry(Console(quiet=True)), devices=devices)


def overview(folder: Path) -> Finding:
    """Plan every size for some devices."""
    rows = []
    for size in SIZES:
        for n_devices, gigabytes in ((1, 24), (1, 80), (2, 80), (8, 24), (8, 40), (8, 80)):
            found = {row[0]: row[1] for row in plan(folder, size, Devices(n_devices, gigabytes * 10**9))[-1].rows}
            placement = f"{found['replicas']} x {found['devices per replica']}"
            offloaded = found.get("offloaded", "")
            rows.append((size, f"{n_devices} x {gigabytes} GB", placement, found["share of memory"], offloaded))
    return Finding(
        "Placements", ("model", "devices", "replicas x devices", "share of memory", "offloaded"), tuple(rows)
    )


def main() -> None:
    """Print a table, or one plan."""
    with tempfile.TemporaryDirectory() as folder:
        if len(sys.argv) == 4:
            size, n_devices, gigabytes = sys.argv[1:]
            findings = plan(Path(folder), size, Devices(int(n_devices), int(gigabytes) * 10**9))
        else:
            findings = [overview(Path(folder))]
        for finding in findings:
            print_finding(new_console(), finding)


if __name__ == "__main__":
    main()

"""What several tests use: where things are, small recipes, quiet runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

ROOT = Path(__file__).parent.parent
MODELS = ROOT / "tests" / "oracle" / "data"
INDUCTION = ROOT / "workflows" / "data" / "induction-2l"
SPEECHES = ROOT / "workflows" / "data" / "tinyshakespeare_speeches.parquet"

TEXTS = [
    "To be, or not to be, that is the question.",
    "Whether 'tis nobler in the mind to suffer the slings and arrows of outrageous fortune,",
    "or to take arms against a sea of troubles",
    "and by opposing end them.",
    "To die: to sleep; no more; and by a sleep to say we end the heart-ache",
    "and the thousand natural shocks that flesh is heir to, 'tis a consummation devoutly to be wish'd.",
]


def make_recipe(corpus: Path, model: Path = INDUCTION, **extract: Any) -> dict[str, Any]:
    """Return a small recipe as a dict: packed, context 32, one residual layer."""
    return {
        "model": {"name": str(model), "dtype": "float32", "device": "cpu"},
        "stages": [
            {"stage": "tokenize_text", "dataset": {"path": str(corpus)}, "context_length": 32},
            {
                "stage": "extract_activations",
                "hooks": ["blocks.0.hook_resid_post"],
                "rows_per_part": 64,
                "batch_tokens": 128,
                **extract,
            },
        ],
    }


def run(recipe: dict[str, Any], out: Path, **options: Any) -> Any:
    """Run a recipe quietly."""
    from actpipe.running import run_recipe
    from actpipe.telemetry import Telemetry

    return run_recipe(recipe, out=out, telemetry=Telemetry(Console(quiet=True)), **options)


def all_bytes(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder that is not a log, a lock or a report, by its relative path."""
    left_out = {"log.jsonl", ".lock", "report.html"}
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in left_out
    }


class WorkerAtHand:
    """What a stage gives an engine, with a worker that is there already."""

    def __init__(self, worker: Any) -> None:
        self.worker = worker

    @contextmanager
    def open_worker(self, context: Any, meter: Any) -> Iterator[Any]:
        yield self.worker

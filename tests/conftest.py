"""Tiny models, small corpora and finished runs; no network."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from support import TEXTS

hypothesis.settings.register_profile("actpipe", deadline=None)  # no assertion on time
hypothesis.settings.load_profile("actpipe")


@pytest.fixture(scope="session", autouse=True)
def _quiet_libraries() -> None:
    """Warnings of other packages at import time are not ours to mend."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import datasets
        import torch
        import transformers

    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Datasets are converted into a folder of the test session, not into the user's."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[[Iterable[dict[str, Any]]], Path]:
    """Write rows as JSON lines and return the file."""

    def write(rows: Iterable[dict[str, Any]], name: str = "corpus.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.fixture
def corpus(write_jsonl: Callable[..., Path]) -> Path:
    """Six short documents."""
    return write_jsonl([{"id": f"doc-{i}", "text": text, "line": i} for i, text in enumerate(TEXTS)])

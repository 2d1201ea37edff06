"""Open what a run has left: its stores and its results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy.typing as npt

from actpipe.describing import open_run
from actpipe.stores.layout import MAIN_CORPUS, RunFolder
from actpipe.stores.reading import ActivationStore
from actpipe.stores.results import Result, find_result
from actpipe.text.decoding import decode_ids


def open_store(run: str | Path, *, corpus: str = MAIN_CORPUS, partial: bool = False) -> ActivationStore:
    """Open the activation store of a run for reading.

    Args:
        run: The run folder.
        corpus: Which corpus of the run, where it has several.
        partial: Open it even where parts are missing; rows of those parts cannot be read.

    Raises:
        IncompleteStoreError: There is no such run or store, or it is not finished.
    """
    folder = open_run(Path(run)).corpus(corpus)
    store = ActivationStore(folder, decode=_decode)
    if not partial:
        store.require_complete()
    return store


def _decode(folder: RunFolder, ids: npt.NDArray[Any]) -> str:
    return decode_ids(folder.tokenizer, ids.tolist())


def open_results(run: str | Path, name: str, *, corpus: str = MAIN_CORPUS) -> Result:
    """Open a result of a run: `.dataset` is its arrays in xarray, `.table` its table in pandas.

    Args:
        run: The run folder.
        name: Name of the result, by default that of the stage that made it.
        corpus: Which corpus of the run, where it has several.

    Raises:
        IncompleteStoreError: There is no such run or result; names those that there are.
    """
    return find_result(open_run(Path(run)).corpus(corpus), name)

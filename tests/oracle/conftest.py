"""Models and stores of the recorded calls."""

from __future__ import annotations

import dask
import pytest
from recordings import FAMILIES, recorded, subject_of


@pytest.fixture(scope="module")
def no_threads():
    """Blocks this small cost less than handing them to threads."""
    with dask.config.set(scheduler="synchronous"):
        yield


@pytest.fixture(scope="module", params=FAMILIES)
def subject(request, tmp_path_factory):
    ids = recorded(request.param)[1]["ids"].astype(int)
    return subject_of(request.param, ids, tmp_path_factory.mktemp(request.param))

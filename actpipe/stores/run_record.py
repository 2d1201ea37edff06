"""Read `run.yaml`."""

from __future__ import annotations

import json

from ruamel.yaml import YAML

from actpipe.schemas.manifest import RunRecord
from actpipe.stores.layout import RunFolder


def read_record(folder: RunFolder) -> RunRecord:
    """Read a run's record: the resolved recipe, versions, identities."""
    return parse_record(folder.record.read_text(encoding="utf-8"))


def parse_record(text: str) -> RunRecord:
    """Return what a `run.yaml` says."""
    return RunRecord.from_json(json.dumps(YAML(typ="safe").load(text)))

"""Write the JSON Schemas of all contracts: `python -m actpipe.schemas.generate`."""

from __future__ import annotations

import json
from pathlib import Path

from actpipe.schemas.base import Contract
from actpipe.schemas.commit import Commit
from actpipe.schemas.interchange import ExportRecord
from actpipe.schemas.manifest import KeptRowsManifest, RunRecord, StoreManifest, TokenTableManifest
from actpipe.schemas.recipe import Recipe
from actpipe.schemas.results import ResultRecord

CONTRACTS: dict[str, type[Contract]] = {
    "recipe": Recipe,
    "run": RunRecord,
    "tokens": TokenTableManifest,
    "rows": KeptRowsManifest,
    "store": StoreManifest,
    "commit": Commit,
    "result": ResultRecord,
    "export": ExportRecord,
}
FOLDER = Path(__file__).parent / "v1"


def json_schema(contract: type[Contract]) -> str:
    """Return a contract's JSON Schema as text."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **contract.model_json_schema()}
    return json.dumps(schema, indent=2) + "\n"


def main() -> None:
    """Write every schema into `v1/`."""
    FOLDER.mkdir(exist_ok=True)
    for name, contract in CONTRACTS.items():
        (FOLDER / f"{name}.json").write_text(json_schema(contract), encoding="utf-8")


if __name__ == "__main__":
    main()

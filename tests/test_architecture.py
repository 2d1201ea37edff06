"""The arrows between the folders, the sizes of files, and what importing costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = {
    "transformers": {"actpipe/models"},
    "datasets": {"actpipe/text", "actpipe/interchange"},
    "tokenizers": {"actpipe/text"},
    "zarr": {"actpipe/stores"},
    "dask": {"actpipe/cluster", "actpipe/jobs", "actpipe/stores"},
    "distributed": {"actpipe/cluster"},
    "plotly": {"actpipe/report"},
    "jinja2": {"actpipe/report", "actpipe/text"},
    "prometheus_client": {"actpipe/metrics_server.py"},
}
"""Where each large dependency may be imported."""

ALL_OTHERS = {"models", "stores", "text", "jobs", "interchange", "extraction", "report", "stages", "telemetry", "stage"}

# Folder -> what of actpipe it must not import. Plain modules (errors, records, planning ...) are free for all.
FORBIDDEN = {
    "schemas": {"actpipe"},
    "actpipe/hooks": ALL_OTHERS,
    "actpipe/compute": ALL_OTHERS,
    "actpipe/models": {"stores", "text", "jobs", "interchange", "extraction", "report", "stages", "stage", "running"},
    "actpipe/stores": {"models", "text", "jobs", "interchange", "extraction", "report", "stages", "stage", "running"},
    "actpipe/text": {"models", "stores", "jobs", "interchange", "extraction", "report", "stages", "stage", "running"},
    "actpipe/feed": {"models", "text", "jobs", "interchange", "extraction", "report", "stages", "stage", "running"},
    "actpipe/jobs": {"models", "text", "interchange", "extraction", "report", "stages", "stage", "running"},
    "actpipe/cluster": {"models", "text", "interchange", "extraction", "report", "stages", "running"},
    "actpipe/interchange": {"models", "text", "jobs", "extraction", "report", "stages", "stage", "running"},
    "actpipe/extraction": {"interchange", "jobs", "report", "stages", "stage", "running"},
    "actpipe/report": {"models", "text", "jobs", "interchange", "extraction", "stages", "stage", "running"},
    "stages": {"stages", "running", "cli"},
    "workflows": {"actpipe"},
}
PURE = {"actpipe/hooks", "actpipe/compute"}
NOT_PURE = {"os", "pathlib", "time", "logging", "io", "shutil", "threading", "random", "datetime"}
SIZE_LIMIT = 400


def modules(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imports(path: Path, *, everywhere: bool = True) -> Iterator[str]:
    """Yield what a module imports, as dotted names; imports only for type checking are left out."""
    tree = ast.parse(path.read_text())
    guarded = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree) if everywhere else tree.body:
        if id(node) in guarded:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def all_modules() -> list[Path]:
    return [path for folder in ("actpipe", "stages", "schemas", "workflows") for path in modules(folder)]


@pytest.mark.parametrize("folder", sorted(FORBIDDEN))
def test_no_arrow_points_up(folder):
    wrong = []
    for path in modules(folder):
        for name in imports(path):
            pieces = name.split(".")
            if pieces[0] != "actpipe" or pieces[1:2] == ["schemas"]:
                continue
            if "actpipe" in FORBIDDEN[folder] or pieces[1] in FORBIDDEN[folder]:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")

    assert wrong == []


@pytest.mark.parametrize("library", sorted(HEAVY))
def test_large_dependencies_stay_in_their_folders(library):
    users = {
        path.relative_to(ROOT).as_posix()
        for path in all_modules()
        if any(name.split(".")[0] == library for name in imports(path))
    }

    assert users
    assert {user for user in users if not any(f"{user}/".startswith(f"{home}/") for home in HEAVY[library])} == set()


@pytest.mark.parametrize("folder", sorted(PURE))
def test_pure_folders_open_nothing(folder):
    used = {name.split(".")[0] for path in modules(folder) for name in imports(path)}

    assert used & NOT_PURE == set()


def test_schemas_need_pydantic_and_nothing_else():
    used = {name.split(".")[0] for path in modules("schemas") for name in imports(path)}

    assert used - set(sys.stdlib_module_names) == {"pydantic", "actpipe"}


@pytest.mark.parametrize("path", all_modules(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_stay_readable(path):
    assert len(path.read_text().splitlines()) <= SIZE_LIMIT


def test_importing_the_package_loads_nothing_large():
    large = ("torch", "transformers", "zarr", "dask", "pyarrow")
    code = f"import sys, actpipe; print([name for name in {large} if name in sys.modules])"

    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_opening_a_store_needs_no_torch():
    code = "import sys, actpipe; actpipe.open_store, actpipe.open_results; print('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_asking_for_the_status_needs_no_torch_and_serving_no_metrics_no_server():
    code = "import sys, actpipe.status, actpipe.telemetry; print({'torch', 'prometheus_client'} & {*sys.modules})"

    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_every_stage_is_registered_under_the_name_of_its_file():
    from actpipe.schemas.recipe import BUILT_IN_STAGES

    from actpipe.stage import find_stage

    files = {path.stem for path in modules("stages")} - {"__init__"}
    assert {config.model_fields["stage"].default for config in BUILT_IN_STAGES} == files
    assert {name for name in files if find_stage(name).__module__ == f"actpipe.stages.{name}"} == files


def test_the_command_line_has_these_flags_and_no_others():
    import typer.main

    from actpipe.cli import app

    group = typer.main.get_command(app)
    flags = {
        name: sorted(option for parameter in command.params for option in parameter.opts if option.startswith("--"))
        for name, command in group.commands.items()
    }
    assert flags == {
        "run": ["--log-format", "--metrics-host", "--metrics-port", "--out", "--scheduler", "--set"],
        "worker": ["--lifetime", "--name"],
        "plan": ["--device-memory", "--devices", "--out", "--set"],
        "hooks": ["--context", "--dtype", "--revision"],
        "check": ["--device", "--dtype", "--revision"],
        "info": [],
        "status": ["--json", "--watch"],
        "verify": ["--deep", "--recipe", "--seed", "--sequences"],
        "repair": ["--recipe"],
        "clean": ["--dry-run"],
        "export": ["--bfloat16", "--corpus", "--format", "--hook"],
        "import": ["--format", "--out"],
    }

"""The wheel holds everything and nothing else, and works from an empty folder."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile

import pytest
from support import ROOT

SHIPPED = ("pyproject.toml", "README.md", "LICENSE", "actpipe", "stages", "schemas", "workflows")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build the wheel from a clean copy; a stale build folder would ship deleted files."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in SHIPPED:
        path = ROOT / name
        ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(path, source / name, ignore=ignore) if path.is_dir() else shutil.copy(path, source)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", target, source]
    subprocess.run(build, check=True, capture_output=True)
    (built,) = target.glob("*.whl")
    return built


def test_it_installs_one_import_name(wheel):
    names = zipfile.ZipFile(wheel).namelist()

    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"actpipe"}


def test_it_holds_every_module_schema_recipe_and_data_file(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / "actpipe").rglob("*") if path.is_file()}
    for folder in ("stages", "schemas", "workflows"):
        files = [path for path in (ROOT / folder).rglob("*") if path.is_file()]
        expected |= {f"actpipe/{path.relative_to(ROOT).as_posix()}" for path in files}
    expected = {name for name in expected if "__pycache__" not in name and ".egg-info" not in name}

    assert expected - names == set()


def test_it_works_from_an_empty_folder(wheel, tmp_path):
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = (
        "import actpipe, pathlib, sys\n"
        f"assert pathlib.Path(actpipe.__file__).is_relative_to({str(site)!r}), actpipe.__file__\n"
        "from actpipe.stage import find_stage\n"
        "from actpipe.running import plan_recipe\n"
        "recipe = pathlib.Path(actpipe.__file__).parent / 'workflows' / 'quickstart.yaml'\n"
        "print(find_stage('tokenize_text').__module__, len(plan_recipe(recipe)))\n"
    )
    environment = {"PYTHONPATH": str(site), "PATH": ""}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    assert result.stdout == "actpipe.stages.tokenize_text 5\n", result.stderr


def test_stages_of_other_packages_are_found(tmp_path, corpus):
    site = tmp_path / "site"
    (site / "mine-1.0.dist-info").mkdir(parents=True)
    (site / "mine-1.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (site / "mine-1.0.dist-info/entry_points.txt").write_text("[actpipe.stages]\ncount_rows = mine:CountRows\n")
    (site / "mine.py").write_text(
        "from dataclasses import dataclass\n"
        "from typing import ClassVar, Literal\n"
        "from actpipe.schemas.base import StageConfig\n"
        "from actpipe.stores.token_table import TokenTable\n"
        "class CountRowsConfig(StageConfig):\n"
        "    stage: Literal['count_rows'] = 'count_rows'\n"
        "    factor: int = 1\n"
        "@dataclass(frozen=True)\n"
        "class CountRows:\n"
        "    config: CountRowsConfig\n"
        "    needs: ClassVar[tuple[str, ...]] = ('token_table',)\n"
        "    gives: ClassVar[str] = 'results'\n"
        "    def check(self, context): pass\n"
        "    def run(self, context):\n"
        "        print('rows', TokenTable(context.corpus(self.config)).manifest.n_rows * self.config.factor)\n"
    )
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {{name: {ROOT}/workflows/data/induction-2l}}\n"
        "stages:\n"
        f"  - {{stage: tokenize_text, dataset: {{path: {corpus}}}, context_length: 32, max_tokens: 64}}\n"
        "  - {stage: count_rows, factor: 3}\n"
    )
    environment = {"PYTHONPATH": str(site), "PATH": ""}
    command = [sys.executable, "-m", "actpipe", "run", recipe, "--out", tmp_path / "run"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert "rows 192\n" in result.stdout, result.stderr

    recipe.write_text(recipe.read_text().replace("factor", "factr"))
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert "line 4: stages[1].factr: unknown key; did you mean 'factor'" in result.stderr

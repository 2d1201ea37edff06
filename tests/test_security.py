"""Nothing that is read can carry code, and no name leads out of the run folder."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from actpipe.schemas.recipe import ModelConfig, Recipe
from support import INDUCTION, make_recipe

from actpipe.errors import ActpipeError
from actpipe.recipes import read_recipe_text
from actpipe.running import run_recipe
from actpipe.stores.cleaning import clear_abandoned
from actpipe.stores.layout import RunFolder

ROOT = Path(__file__).parent.parent
SOURCES = sorted(path for folder in ("actpipe", "stages", "schemas") for path in (ROOT / folder).rglob("*.py"))
RUNS_CODE = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "subprocess", "pty", "code", "runpy"}
CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load"}


def ways_to_run_code(text):
    """Yield what in a module could make code of data."""
    for node in ast.walk(ast.parse(text)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        yield from (name for name in names if name.split(".")[0] in RUNS_CODE)
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            given = {word.arg: ast.unparse(word.value) for word in node.keywords}
            if called in CALLS:
                yield called
            if called.endswith(("np.load", "numpy.load")) and given.get("allow_pickle") != "False":
                yield called
            if called == "YAML" and given.get("typ") == "'unsafe'":
                yield called


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from cloudpickle import loads",
        "torch.load(path, weights_only=False)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "YAML(typ='unsafe')",
        "eval(text)",
        "import subprocess",
    ],
)
def test_the_search_for_ways_to_run_code_finds_them(text):
    assert list(ways_to_run_code(text))


def test_no_module_makes_code_of_data():
    assert {str(path): found for path in SOURCES if (found := list(ways_to_run_code(path.read_text())))} == {}


def test_code_of_models_is_not_run_unless_asked_for():
    assert ModelConfig(name="gpt2").trust_remote_code is False


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system", "!!python/name:os.system", "!command"])
def test_a_recipe_makes_no_objects(tmp_path, tag):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {{name: {INDUCTION}}}\nstages:\n  - {tag} ['touch {tmp_path}/touched']\n")
    with pytest.raises(ActpipeError):
        run_recipe(recipe, out=tmp_path / "run")
    with pytest.raises(ActpipeError):
        read_recipe_text(recipe)
    assert not (tmp_path / "touched").exists()
    assert not (tmp_path / "run").exists()


def test_no_setting_of_a_recipe_is_a_command():
    words = {"command", "shell", "script", "exec", "python", "hook_script", "prologue", "extra", "directives"}
    settings = set()

    def collect(schema):
        if isinstance(schema, dict):
            settings.update(schema.get("properties", {}))
            for value in schema.values():
                collect(value)
        elif isinstance(schema, list):
            for value in schema:
                collect(value)

    collect(Recipe.model_json_schema())
    assert {"queue", "account", "interface", "image", "walltime"} <= settings
    assert not settings & words


@pytest.mark.parametrize(
    "value", ["a; touch x", "a b", "$(touch x)", "a\nb", "-o", "`x`", "a'b", 'a"b', "a|b", "a&b", ""]
)
@pytest.mark.parametrize(
    "setting", ["slurm.queue", "slurm.account", "slurm.interface", "slurm.memory", "slurm.walltime"]
)
def test_what_reaches_a_job_script_is_one_word(corpus, tmp_path, setting, value):
    recipe = make_recipe(corpus)
    recipe["engine"] = {"kind": "dask", "slurm": {setting.split(".")[1]: value}}
    with pytest.raises(ActpipeError, match=setting.split(".")[1]):
        run_recipe(recipe, out=tmp_path / "run")


@pytest.mark.parametrize("name", ["..", "../up", "/etc", "a/b", "a\\b", ".hidden", "a\n", "C:x", "", "ü", "a" * 65])
@pytest.mark.parametrize("what", ["corpus", "result"])
def test_names_stay_in_the_run_folder(corpus, tmp_path, name, what):
    recipe = make_recipe(corpus)
    if what == "corpus":
        recipe["stages"][0]["corpus"] = name
    else:
        recipe["stages"].append({"stage": "summarize_metrics", "name": name})
    with pytest.raises(ActpipeError, match="corpus" if what == "corpus" else "name"):
        run_recipe(recipe, out=tmp_path / "run")
    assert {path.name for path in tmp_path.iterdir()} <= {corpus.name}


def test_clearing_up_follows_no_link_out_of_the_folder(tmp_path):
    elsewhere, run = tmp_path / "elsewhere", tmp_path / "run"
    elsewhere.mkdir()
    (elsewhere / "thesis.tex").write_text("chapter 1")
    (run / ".partial").mkdir(parents=True)
    (run / ".partial" / "part-00000000-0123456789ab").symlink_to(elsewhere)
    clear_abandoned(RunFolder(run))
    assert (elsewhere / "thesis.tex").read_text() == "chapter 1"
    assert not (run / ".partial").exists()

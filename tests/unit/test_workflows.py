"""The recipes that are shipped: each is valid, says what to do with it, and runs as it is where its model ships too."""

from __future__ import annotations

import re

import pytest
from support import ROOT

from actpipe.contexts import load_recipe
from actpipe.running import plan_recipe, read_any

RECIPES = sorted((ROOT / "workflows").glob("*.yaml"))
SHIPPED = [path for path in RECIPES if "name: data/" in path.read_text()]


def test_there_is_one_for_each_way_to_run():
    names = {path.stem for path in RECIPES}

    assert names >= {"quickstart", "one_gpu", "node_8gpu", "slurm", "kubernetes", "s3"}
    assert names >= {"residual_dump", "sae_feed", "logit_attribution"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_each_is_a_recipe_without_unknown_keys(path):
    text, base = read_any(path)
    recipe = load_recipe(text)

    assert recipe.stages
    assert base == path.parent


@pytest.mark.parametrize("path", [path for path in RECIPES if path.stem != "quickstart"], ids=lambda path: path.stem)
def test_each_says_how_it_is_started_what_to_edit_and_where_its_cost_is_worked_out(path):
    head = path.read_text().split("\nmodel:")[0]

    assert f"actpipe run {path.name} --out " in head
    assert "Edit: " in head
    for page in re.findall(r"docs/\w+\.md", head):
        assert (ROOT / page).is_file()
    assert "docs/scale.md" in head


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_those_whose_model_ships_are_planned_as_they_are(path, tmp_path):
    findings = plan_recipe(path, out=tmp_path / "run", overrides=["stages.0.max_tokens=2000"])

    assert findings
    assert not (tmp_path / "run").exists()

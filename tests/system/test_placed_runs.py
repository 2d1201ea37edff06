"""Where a model is put changes no stored byte."""

from __future__ import annotations

import pytest
from support import MODELS, all_bytes, make_recipe, run

from actpipe.errors import RecipeError

HOOKS = ["blocks.*.hook_resid_post", "blocks.*.attn.hook_pattern", "blocks.0.mlp.hook_post"]


@pytest.fixture
def ids(write_jsonl):
    return write_jsonl([{"ids": [5 + (7 * number + place) % 190 for place in range(40)]} for number in range(12)])


def recipe_of(ids, model, **placed):
    recipe = make_recipe(ids, model, hooks=HOOKS, metrics=["loss"])
    recipe["stages"][0]["prepend_bos"] = False
    recipe["stages"][0]["dataset"]["column"] = "ids"
    if placed:
        recipe["model"] = {"name": str(model), "dtype": "float32", **placed}
    return recipe


def stored(folder):
    return {path: data for path, data in all_bytes(folder).items() if path != "run.yaml"}


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_model_on_cpu_and_disk_gives_the_bytes_of_one_on_the_cpu(ids, tmp_path, family):
    model = MODELS / family
    size = (model / "model.safetensors").stat().st_size
    run(recipe_of(ids, model), tmp_path / "plain")
    placed = {"device_map": "auto", "max_memory": {"cpu": 2 * size // 3}, "offload_folder": str(tmp_path / "scratch")}
    run(recipe_of(ids, model, **placed), tmp_path / "spread")

    assert stored(tmp_path / "spread") == stored(tmp_path / "plain")
    (tmp_path / "plain/commits/part-00000001.json").unlink()
    run(recipe_of(ids, model, **placed), tmp_path / "plain")
    assert stored(tmp_path / "plain") == stored(tmp_path / "spread")


@pytest.mark.parametrize("placed", [{"max_memory": {0: "40GiB"}}, {"offload_folder": "scratch"}], ids=str)
def test_bounds_without_a_map_are_refused(ids, tmp_path, placed):
    with pytest.raises(RecipeError, match="device_map: auto"):
        run(recipe_of(ids, MODELS / "gpt2", device="cpu", **placed), tmp_path / "run")


def test_memory_that_is_none_is_refused(ids, tmp_path):
    with pytest.raises(RecipeError, match=r"max_memory.*40 gigs"):
        run(
            recipe_of(ids, MODELS / "gpt2", device_map="auto", max_memory={0: "40 gigs"}),
            tmp_path / "run",
        )

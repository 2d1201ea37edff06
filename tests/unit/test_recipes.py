"""A recipe that cannot run is refused by key and line, before anything runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from actpipe.schemas.generate import CONTRACTS, FOLDER, json_schema
from actpipe.schemas.recipe import BUILT_IN_STAGES, Recipe
from support import INDUCTION, ROOT, make_recipe, run

from actpipe.errors import ActpipeError, RecipeError, StoreMismatchError
from actpipe.recipes import check_recipe, read_recipe_text, with_overrides

GOOD = """\
model:
  name: gpt2
stages:
  - stage: tokenize_text
    dataset: {path: corpus.jsonl}
    context_length: 32
  - stage: extract_activations
    hooks: [hook_embed]
"""


def check(tmp_path: Path, text: str) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return check_recipe(read_recipe_text(path))


def test_a_good_recipe_is_filled_in_with_defaults(tmp_path):
    recipe = check(tmp_path, GOOD)

    assert recipe.model.dtype == "auto"
    assert recipe.stages[1].rows_per_part == "auto"


@pytest.mark.parametrize(
    ("wrong", "instead", "message"),
    [
        ("  name: gpt2", "  name: gpt2\n  dtyp: float32", "line 3: model.dtyp: unknown key; did you mean 'dtype'"),
        ("hooks: [hook_embed]", "hook: [a]", "line 8: stages.1..hook: unknown key; did you mean 'hooks'"),
        ("path: corpus.jsonl", "pth: corpus.jsonl", "line 5: stages.0..dataset.pth: unknown key; did you mean 'path'"),
        ("context_length: 32", "context_length: '32'", "line 6: stages.0..context_length: '32' is not a valid integer"),
        ("context_length: 32", "context_length: 0", "line 6: .*0 is not greater than 0"),
        ("context_length: 32", "context_length: true", "line 6: .*True is not a valid integer"),
        ("    context_length: 32\n", "", "stages.0..context_length: this key is needed"),
        (
            "stage: tokenize_text",
            "stage: tokenise_text",
            "line 4: .*unknown stage 'tokenise_text'; did you mean 'tokenize_text'",
        ),
        ("- stage: tokenize_text\n    dataset", "- dataset", "line 4: .*needs the key `stage`"),
        ("hooks: [hook_embed]", "hooks: hook_embed", "line 8: .*'hook_embed' is not a list"),
        ("hooks: [hook_embed]", "hooks: []", "nothing to store"),
        ("hooks: [hook_embed]", "hooks: [a]\n    dtype: float61", "line 9: .*did you mean 'float16'"),
        ("dataset: {path: corpus.jsonl}", "layout: packed", "exactly one of `dataset` and `synthetic`"),
        ("context_length: 32", "context_length: 32\n    stride: 8", "`stride` needs `layout: documents`"),
        ("context_length: 32", "context_length: 32\n    prepend_bos: maybe", "did you mean|not a valid boolean"),
        ("model:\n  name: gpt2", "model: gpt2", "line 1: model: 'gpt2' is not"),
        ("context_length: 32", "context_length: 32\n    context_length: 64", "line 7: not YAML|duplicate"),
        ("model:", "model: [", "not YAML"),
    ],
)
def test_what_is_wrong_is_named_by_key_and_line(tmp_path, wrong, instead, message):
    assert wrong in GOOD

    with pytest.raises(RecipeError, match=message):
        check(tmp_path, GOOD.replace(wrong, instead))


def test_every_mistake_is_named_at_once(tmp_path):
    text = GOOD.replace("name: gpt2", "nam: gpt2").replace("hooks:", "hoks:")

    with pytest.raises(RecipeError) as caught:
        check(tmp_path, text)
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize("text", ["", "- 1", "just words"])
def test_a_file_that_is_no_recipe_is_refused(tmp_path, text):
    with pytest.raises(RecipeError, match=r"recipe\.yaml"):
        check(tmp_path, text)


def test_a_missing_recipe_names_its_neighbour(tmp_path):
    (tmp_path / "quickstart.yaml").write_text(GOOD)

    with pytest.raises(RecipeError, match=r"did you mean 'quickstart\.yaml'"):
        read_recipe_text(tmp_path / "quikstart.yaml")


def test_settings_given_on_the_command_line_replace_those_of_the_file(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(GOOD)
    text = with_overrides(
        read_recipe_text(path),
        ["model.dtype=float16", "extract_activations.hooks=[hook_pos_embed]", "stages.0.max_tokens=100"],
    )

    recipe = check_recipe(text)
    assert recipe.model.dtype == "float16"
    assert recipe.stages[1].hooks == ("hook_pos_embed",)
    assert recipe.stages[0].max_tokens == 100


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.dtype", "key=value"),
        ("stages.7.dtype=float16", "there is no 7"),
        ("model.dtyp=float16", "model.dtyp: unknown key"),
        ("tokenize_text@other.max_tokens=3", "0 stages are called so"),
    ],
)
def test_a_setting_that_fits_nowhere_is_refused(tmp_path, setting, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(GOOD)

    with pytest.raises(RecipeError, match=message):
        check_recipe(with_overrides(read_recipe_text(path), [setting]))


@pytest.mark.parametrize("name", sorted(CONTRACTS))
def test_json_schemas_are_those_of_the_models(name):
    assert (FOLDER / f"{name}.json").read_text() == json_schema(CONTRACTS[name])


def test_every_setting_is_documented():
    undocumented = [
        f"{config.__name__}.{name}"
        for config in BUILT_IN_STAGES
        for name, field in config.model_fields.items()
        if not field.description and name != "stage"
    ]

    assert undocumented == []


@pytest.mark.parametrize("path", sorted((ROOT / "workflows").glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_recipe_is_valid(path):
    assert check_recipe(read_recipe_text(path)).stages


class TestBeforeAnythingRuns:
    """What only the model or the run folder can tell is refused before a file is written."""

    def refuse(self, recipe, tmp_path, message, error=ActpipeError):
        out = tmp_path / "run"
        with pytest.raises(error, match=message):
            run(recipe, out)
        assert not out.exists()

    def test_a_hook_that_the_model_lacks(self, corpus, tmp_path):
        self.refuse(make_recipe(corpus, hooks=["blocks.9.hook_resid_post"]), tmp_path, "layers 0 to 1")

    def test_results_of_heads_which_are_never_stored(self, corpus, tmp_path):
        self.refuse(make_recipe(corpus, hooks=["blocks.0.attn.hook_result"]), tmp_path, "store blocks.0.attn.hook_z")

    def test_parts_that_cut_packed_sequences(self, corpus, tmp_path):
        self.refuse(make_recipe(corpus, rows_per_part=50), tmp_path, "not a multiple of context_length")

    def test_a_context_longer_than_the_model(self, corpus, tmp_path):
        recipe = make_recipe(corpus, rows_per_part="auto")
        recipe["stages"][0]["context_length"] = 512
        self.refuse(recipe, tmp_path, "above the 256 positions")

    def test_an_analysis_whose_input_is_not_stored(self, corpus, tmp_path):
        recipe = make_recipe(corpus)
        recipe["stages"].append({"stage": "score_heads"})
        self.refuse(recipe, tmp_path, "score_heads needs blocks.0.attn.hook_pattern")

    def test_stages_in_the_wrong_order(self, corpus, tmp_path):
        recipe = make_recipe(corpus)
        recipe["stages"].reverse()
        self.refuse(recipe, tmp_path, "needs a token table")

    def test_two_results_of_one_name(self, corpus, tmp_path):
        recipe = make_recipe(corpus, metrics=["loss"])
        recipe["stages"] += [{"stage": "summarize_metrics"}] * 2
        self.refuse(recipe, tmp_path, "both make the result 'summarize_metrics'")

    def test_a_missing_dataset(self, corpus, tmp_path):
        self.refuse(make_recipe(corpus.with_name("corpse.jsonl")), tmp_path, "did you mean 'corpus.jsonl'")

    def test_a_missing_column(self, corpus, tmp_path):
        recipe = make_recipe(corpus)
        recipe["stages"][0]["dataset"]["column"] = "txt"
        self.refuse(recipe, tmp_path, "no column 'txt'.*did you mean 'text'")

    def test_a_missing_model(self, corpus, tmp_path):
        self.refuse(make_recipe(corpus, Path("/no/such/model")), tmp_path, "does not exist")

    def test_a_folder_that_is_no_model(self, corpus, tmp_path):
        self.refuse(make_recipe(corpus, corpus.parent), tmp_path, "no config.json")

    def test_a_device_that_is_not_there(self, corpus, tmp_path):
        recipe = make_recipe(corpus)
        recipe["model"]["device"] = "cuda:99"
        self.refuse(recipe, tmp_path, "cuda:99")

    def test_a_model_that_does_not_say_its_element_type(self, corpus, tmp_path):
        model = tmp_path / "model"
        shutil.copytree(INDUCTION, model)
        config = json.loads((model / "config.json").read_text())
        del config["dtype"]
        (model / "config.json").write_text(json.dumps(config))
        recipe = make_recipe(corpus, model)
        recipe["model"]["dtype"] = "auto"
        self.refuse(recipe, tmp_path, "set `model.dtype`")

    def test_chat_messages_without_a_template(self, write_jsonl, tmp_path):
        path = write_jsonl([{"messages": [{"role": "user", "content": "Hello"}]}])
        recipe = make_recipe(path)
        recipe["stages"][0]["dataset"] = {"path": str(path), "column": "messages"}
        self.refuse(recipe, tmp_path, "no chat template")

    def test_a_folder_that_holds_something_else(self, corpus, tmp_path):
        with pytest.raises(StoreMismatchError, match="holds other files and no run"):
            run(make_recipe(corpus), corpus.parent)
        with pytest.raises(StoreMismatchError, match="is a file"):
            run(make_recipe(corpus), corpus)


def test_a_plan_leaves_nothing_on_disk(corpus, tmp_path, monkeypatch):
    from actpipe.running import plan_recipe

    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    findings = plan_recipe(make_recipe(corpus, metrics=["loss"]))

    assert [finding.title for finding in findings] == ["Corpus: main", "Store: main", "Placement"]
    assert sorted(tmp_path.rglob("*")) == before


def test_a_plan_counts_the_tokens_that_the_run_then_has(corpus, tmp_path):
    from actpipe.running import plan_recipe
    from actpipe.stores.reading import ActivationStore

    recipe = make_recipe(corpus)
    planned = plan_recipe(recipe)[0].rows[1]
    run(recipe, tmp_path / "run")

    from actpipe.stores.layout import RunFolder

    assert planned[:2] == ("tokens", str(ActivationStore(RunFolder(tmp_path / "run")).n_rows))


def test_recipes_written_as_dicts_are_checked_too(tmp_path):
    with pytest.raises(RecipeError, match="model: this key is needed"):
        run(json.loads('{"stages": []}'), tmp_path / "run")

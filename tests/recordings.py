"""What TransformerLens' own methods gave, call by call, and stores of the same tokens to compare with."""

from __future__ import annotations

import ast
import json
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from support import MODELS, make_recipe, run

import actpipe
from actpipe import HookedModel

RECORDED = Path(__file__).parent / "oracle" / "methods"
FAMILIES = ["bloom", "gemma2", "gpt2", "llama", "phi", "qwen3"]
OF_WEIGHTS = [*FAMILIES, "gpt_neo", "gptj", "opt", "phi3"]
BEHIND_A_NORM = "gemma2"
WITH_KEY_GROUPS = ["gemma2", "llama", "phi3", "qwen3"]
TOLERANCE = 1e-4
STACKS = ["decompose_resid", "accumulated_resid", "stack_head_results", "stack_neuron_results"]
N_LAYERS, N_HEADS = 2, 4


class Call(NamedTuple):
    """One recorded call of a method; what was not recorded failed there."""

    arguments: dict[str, Any]
    labels: list[str] | None
    values: np.ndarray | None


@cache
def recorded(family: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    return json.loads((RECORDED / "calls.json").read_text())[family], dict(np.load(RECORDED / f"{family}.npz"))


def calls(family: str, method: str, **wanted: Any) -> list[Call]:
    """Return the recorded calls of a method, or those with some arguments; there are some."""
    known, values = recorded(family)
    found = [
        Call(call["arguments"], call.get("labels"), values.get(key))
        for key, call in known.items()
        if call["method"] == method and wanted.items() <= call["arguments"].items()
    ]
    assert found
    return found


@cache
def loaded(family: str) -> HookedModel:
    return HookedModel.from_pretrained(str(MODELS / family), dtype="float32", device="cpu")


@dataclass(eq=False)
class Subject:
    """A model and the store of the recorded tokens."""

    family: str
    ids: np.ndarray
    store: Any
    model: HookedModel

    def by_position(self, array: Any) -> np.ndarray:
        """Return rows, the second axis of a stack, as batch and position."""
        array = np.asarray(array)
        return array.reshape(len(array), *self.ids.shape, *array.shape[2:])

    def stored(self, name: str) -> np.ndarray:
        """Return an array of the store as `(batch, position, ...)`."""
        return self.by_position(self.store[name].compute()[None])[0]

    @cached_property
    def patterns(self) -> list[np.ndarray]:
        """Every layer's attention, `(batch, query, head, key)`."""
        return [self.stored(f"blocks.{layer}.attn.hook_pattern")[..., :12] for layer in range(N_LAYERS)]


def subject_of(family: str, ids: np.ndarray, folder: Path) -> Subject:
    """Return a model and the store of some tokens, one sequence a row."""
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"ids": row}) + "\n" for row in ids.tolist()))
    recipe = make_recipe(folder / "corpus.jsonl", MODELS / family, hooks=["*"])
    if family != "bert":
        recipe["stages"][1]["metrics"] = ["loss", "correct"]
    recipe["stages"][0] |= {"layout": "documents", "prepend_bos": False}
    recipe["stages"][0]["dataset"]["column"] = "ids"
    run(recipe, folder / "run")
    return Subject(family, ids, actpipe.open_store(folder / "run"), loaded(family))


def place(text: str) -> Any:
    """Return a recorded slice as numpy takes it: an int, a list of places, or a range."""
    value = ast.literal_eval(text)
    return slice(*value) if isinstance(value, tuple) else value


def chosen(array: np.ndarray, arguments: dict[str, Any], first_axis: int = 1) -> np.ndarray:
    """Return the batch and the positions that a call was for; an int removes its axis."""
    array = array[(slice(None),) * (first_axis + 1) + (place(arguments.get("pos_slice", "(None,)")),)]
    return array[(slice(None),) * first_axis + (place(arguments.get("batch_slice", "(None,)")),)]


def error(ours: Any, theirs: np.ndarray) -> float:
    """Return the largest difference, relative to the largest value where that is above 1; NaN where ours is."""
    ours = np.asarray(ours)
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max(initial=0.0) / max(1.0, float(np.abs(theirs).max(initial=0.0))))


def assert_close(ours: Any, theirs: np.ndarray, call: Any = "") -> None:
    assert error(ours, theirs) < TOLERANCE, call


def through_the_norm(subject: Subject, call: Call) -> np.ndarray:
    """Return recorded parts of heads and neurons as the norm behind them passes them on, and the remainder anew."""
    theirs = np.array(call.values)
    for number, label in enumerate(call.labels):
        if label[0] == "L":
            norm = f"blocks.{label[1]}.{'ln1_post' if 'H' in label else 'ln2_post'}"
            scale = chosen(subject.stored(f"{norm}.hook_scale"), call.arguments, 0)
            theirs[number] *= subject.model.weights[f"{norm}.w"].numpy() / scale
    if "remainder" in call.labels and len(call.labels) > 1:
        theirs[-1] = call.values.sum(0) - theirs[:-1].sum(0)
    return theirs

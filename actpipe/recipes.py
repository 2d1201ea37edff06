"""Read a recipe and check it, so that what is wrong is named by key and line before anything runs."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import BaseModel, Field, ValidationError, create_model
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.nodes import MappingNode, Node, SequenceNode

from actpipe.errors import RecipeError, did_you_mean
from actpipe.schemas.base import StageConfig
from actpipe.schemas.recipe import BUILT_IN_STAGES, Recipe

Path_ = tuple[str | int, ...]


@dataclass(frozen=True)
class RecipeText:
    """A recipe as it was written: its data, and the line of each key."""

    title: str
    data: Any
    lines: Mapping[Path_, int] = field(default_factory=dict)

    def place(self, path: Path_) -> str:
        """Say where a key is, for an error message."""
        for length in range(len(path), -1, -1):
            if path[:length] in self.lines:
                return f"{self.title}, line {self.lines[path[:length]]}: "
        return f"{self.title}: "


def read_recipe_text(path: Path) -> RecipeText:
    """Read a YAML file.

    Raises:
        RecipeError: There is no such file, or it is not YAML.
    """
    if not path.is_file():
        siblings = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise RecipeError(f"there is no recipe {path}{did_you_mean(path.name, siblings)}")
    text = path.read_text(encoding="utf-8")
    try:
        data = YAML(typ="safe").load(text)
        root = YAML(typ="safe", pure=True).compose(io.StringIO(text))
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise RecipeError(f"{path.name}{line}: not YAML: {error.problem or error.context}") from error
    lines: dict[Path_, int] = {}
    if root is not None:
        _collect_lines(root, (), lines)
    return RecipeText(path.name, data, lines)


def _collect_lines(node: Node, path: Path_, lines: dict[Path_, int]) -> None:
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, MappingNode):
        for key, value in node.value:
            lines[(*path, key.value)] = key.start_mark.line + 1
            _collect_lines(value, (*path, key.value), lines)
    elif isinstance(node, SequenceNode):
        for index, item in enumerate(node.value):
            _collect_lines(item, (*path, index), lines)


def with_overrides(text: RecipeText, overrides: Iterable[str]) -> RecipeText:
    """Return the recipe with `key=value` settings applied; values are YAML.

    Keys are dotted paths: `model.dtype`, `stages.1.dtype`, or a stage by its name,
    `extract_activations.dtype`, with `extract_activations@CORPUS.dtype` where there are several.

    Raises:
        RecipeError: A setting has no `=`, or names a stage that is not there once.
    """
    data = json.loads(json.dumps(text.data))
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator or not key:
            raise RecipeError(f"--set {override}: write it as key=value, for instance model.dtype=float16")
        path = _resolve_key(key, data)
        target = data
        for piece in path[:-1]:
            if isinstance(target, dict) and target.get(piece) is None:
                target[piece] = {}
            try:
                target = target[piece]
            except (KeyError, IndexError, TypeError) as error:
                raise RecipeError(f"--set {override}: there is no {piece!r} in the recipe") from error
        try:
            target[path[-1]] = YAML(typ="safe").load(value)
        except (IndexError, TypeError) as error:
            raise RecipeError(f"--set {override}: {path[-1]!r} cannot be set there") from error
    return RecipeText(text.title, data, text.lines)


def _resolve_key(key: str, data: Any) -> Path_:
    head, _, rest = key.partition(".")
    stages = data.get("stages", []) if isinstance(data, dict) else []
    name, _, corpus = head.partition("@")
    named = [i for i, stage in enumerate(stages) if isinstance(stage, dict) and stage.get("stage") == name]
    if corpus:
        named = [i for i in named if stages[i].get("corpus", "main") == corpus]
    if not rest or (not named and not corpus):
        return tuple(int(piece) if piece.isdigit() else piece for piece in key.split("."))
    if len(named) != 1:
        raise RecipeError(f"--set {key}: {len(named)} stages are called so; write stages.N.{rest} with N from 0")
    return ("stages", named[0], *rest.split("."))


def check_recipe(text: RecipeText, foreign: Iterable[type[StageConfig]] = ()) -> Recipe:
    """Check a recipe against its schema.

    Args:
        text: The recipe as read.
        foreign: Settings models of stages that other packages bring.

    Raises:
        RecipeError: Names every wrong key with its line, and the nearest valid one.
    """
    model = recipe_model(foreign)
    try:
        return model.model_validate_json(json.dumps(text.data))
    except ValidationError as error:
        problems = _problems(error, text, model)
        raise RecipeError("\n".join(problems)) from None


def recipe_model(foreign: Iterable[type[StageConfig]] = ()) -> type[Recipe]:
    """Return the recipe's model, with foreign stages beside the built-in ones."""
    configs = (*BUILT_IN_STAGES, *foreign)
    if len(configs) == len(BUILT_IN_STAGES):
        return Recipe
    union: Any = configs[0]
    for config in configs[1:]:
        union = union | config
    stage: Any = Annotated[union, Field(discriminator="stage")]
    return create_model("Recipe", __base__=Recipe, stages=(Annotated[tuple[stage, ...], Field(min_length=1)], ...))


def _problems(error: ValidationError, text: RecipeText, model: type[Recipe]) -> list[str]:
    """Return one line per wrong key; what several branches of a union say of one value is one line."""
    messages: dict[Path_, list[str]] = {}
    for detail in error.errors():
        path, config = _locate(detail, text.data, model)
        said = messages.setdefault(path, [])
        message = _message(detail, path, config)
        if said:
            message = message.removeprefix(f"{_short(detail['input'])} is not ")
        if message not in said:
            said.append(message)
    outermost = {path[:length] for path in messages for length in range(len(path))}
    return [
        text.place(path) + _dotted(path) + " or ".join(said) for path, said in messages.items() if path not in outermost
    ]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _dotted(path: Path_) -> str:
    text = ""
    for piece in path:
        text += f"[{piece}]" if isinstance(piece, int) else f".{piece}" if text else piece
    return f"{text}: " if text else ""


def _locate(detail: ErrorDetails, data: Any, model: type[BaseModel]) -> tuple[Path_, type[BaseModel]]:
    """Return the key that an error is about, and the model that key belongs to.

    Pydantic's location also names branches of unions; those are not in the data and are left out.
    """
    path: list[str | int] = []
    here, config = data, model
    location = detail["loc"]
    for position, piece in enumerate(location):
        last = position == len(location) - 1
        if isinstance(here, dict) and piece in here:
            inner = _model_of(config, str(piece))
            here = here[piece]
            config = inner or config if not last else config
            path.append(piece)
        elif isinstance(here, list) and isinstance(piece, int) and piece < len(here):
            here = here[piece]
            config = _stage_config(here, model) or config
            path.append(piece)
        elif last and detail["type"] == "missing":
            path.append(piece)
    return tuple(path), config


def _model_of(config: type[BaseModel], name: str) -> type[BaseModel] | None:
    """Return the model of a field that holds one, if it does."""
    if name not in config.model_fields:
        return None
    return next(_models_in(config.model_fields[name].annotation), None)


def _stage_config(item: Any, model: type[BaseModel]) -> type[BaseModel] | None:
    """Return the settings model of one entry of `stages`, by its name."""
    configs = _models_in(model.model_fields["stages"].annotation) if "stages" in model.model_fields else ()
    name = item.get("stage") if isinstance(item, dict) else None
    return next((config for config in configs if config.model_fields["stage"].default == name), None)


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield every model that an annotation speaks of."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models_in(inner)


def _message(detail: ErrorDetails, path: Path_, config: type[BaseModel]) -> str:
    kind, context = detail["type"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        known = list(config.model_fields)
        return "unknown key" + (did_you_mean(str(path[-1]), known) or f"; there are {', '.join(known)}")
    if kind == "union_tag_invalid":
        names = [tag.strip("' ") for tag in str(context["expected_tags"]).split(",")]
        hint = did_you_mean(str(context["tag"]), names) or f"; there are {', '.join(names)}"
        return f"unknown stage {context['tag']!r}{hint}"
    if kind == "union_tag_not_found":
        return "a stage needs the key `stage`, its name"
    if kind == "literal_error":
        expected = str(context["expected"])
        names = [name.strip("'") for name in expected.replace(" or ", ", ").split(", ")]
        return f"{_short(detail['input'])} is not {expected}{did_you_mean(str(detail['input']), names)}"
    if kind == "value_error":
        return str(context["error"])
    if kind == "missing":
        return "this key is needed"
    if kind == "too_short":
        return "at least one entry is needed"
    wanted = detail["msg"].removeprefix("Input should be ").replace("a valid array", "a list")
    return f"{_short(detail['input'])} is not {wanted}"

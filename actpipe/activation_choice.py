"""Which stored activations an analysis means, before they are stored and after."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from actpipe.analysis import result_name
from actpipe.errors import RecipeError, did_you_mean
from actpipe.model_inputs import inputs_of
from actpipe.schemas.base import AnalysisConfig
from actpipe.schemas.recipe import ExtractActivationsConfig
from actpipe.stage import RunContext
from actpipe.stores.reading import ActivationStore

_DERIVED = "derived/"
_PARTS = ("/values", "/indices")
"""How the arrays end that hold a SAE's largest latents only."""


@dataclass(frozen=True)
class Choice:
    """One activation that is or will be stored."""

    name: str
    row_shape: tuple[int, ...]
    axes: tuple[str, ...]
    """Axes of a row."""
    integer: bool = False
    sparse: bool = False
    """Whether it is stored as its largest values and their indices, `NAME/values` and `NAME/indices`."""

    @property
    def row_size(self) -> int:
        """Values of a row."""
        return math.prod(self.row_shape)


def choose_activations(context: RunContext, config: AnalysisConfig, patterns: Iterable[str]) -> tuple[Choice, ...]:
    """Return the activations that patterns name, in the order of the store, each once.

    Args:
        context: The run.
        config: The analysis, for its corpus and for what it is called in errors.
        patterns: Names or patterns of hooks, or of derived arrays: `derived/NAME/HOOK`, where `*` is any run of
            characters.

    Raises:
        RecipeError: A pattern names nothing that will be stored, numbers of something, or rows over key positions.
    """
    stored = _stored(context, config.corpus)
    wanted: set[str] = set()
    for pattern in patterns:
        matched = _matches(context, pattern, stored)
        if not matched:
            raise RecipeError(
                f"{result_name(config)} needs {pattern} of the corpus {config.corpus!r}, which does not store it; add "
                f"it to `hooks` or `derive` of its extract_activations{did_you_mean(pattern, stored)}"
            )
        wanted.update(matched)
    chosen = tuple(choice for name, choice in stored.items() if name in wanted)
    for choice in chosen:
        if choice.integer or "key_position" in choice.axes:
            raise RecipeError(
                f"{result_name(config)}: {choice.name} is no space of directions, its axes are "
                f"{', '.join(choice.axes)}; choose another"
            )
    return chosen


def whole_rows(config: AnalysisConfig, chosen: tuple[Choice, ...]) -> tuple[Choice, ...]:
    """Return activations whose every value is stored.

    Raises:
        RecipeError: Of one only the largest latents are.
    """
    for choice in chosen:
        if choice.sparse:
            raise RecipeError(
                f"{result_name(config)}: {choice.name} holds the largest latents only; leave out its `top_k`, or "
                "choose another"
            )
    return chosen


def _matches(context: RunContext, pattern: str, stored: Mapping[str, Choice]) -> list[str]:
    if pattern.startswith(_DERIVED):
        glob = re.compile(".*".join(map(re.escape, pattern.split("*"))))
        return [name for name in stored if glob.fullmatch(name)]
    return [name for name in context.spec.select([pattern]) if name in stored]


def _stored(context: RunContext, corpus: str) -> dict[str, Choice]:
    """Return everything that the corpus's store has or will have, a SAE's largest latents as one."""
    config = context.settings_of(ExtractActivationsConfig, corpus)
    found = _in_store(context, corpus) if config is None else _in_recipe(context, config)
    choices = dict[str, Choice]()
    for choice in found:
        name = next((choice.name.removesuffix(part) for part in _PARTS if choice.name.endswith(part)), choice.name)
        sparse = name != choice.name
        choices.setdefault(name, Choice(name, choice.row_shape, choice.axes, choice.integer and not sparse, sparse))
    return choices


def _in_store(context: RunContext, corpus: str) -> list[Choice]:
    store = ActivationStore(context.folder.corpus(corpus))
    activations = {f"activations/{name}": name for name in store.hook_names}
    return [
        Choice(
            activations.get(array.path, array.path),
            tuple(array.row_shape),
            tuple(array.axes[1:]),
            integer=array.dtype.startswith("int"),
        )
        for array in store.manifest.arrays
        if array.path in activations or array.path.startswith(_DERIVED)
    ]


def _in_recipe(context: RunContext, config: ExtractActivationsConfig) -> list[Choice]:
    from actpipe.extraction.deriving import plan_derivations  # it loads torch

    length = inputs_of(context, config.corpus).context_length
    points = [context.spec.hook_points[name] for name in context.spec.select(config.hooks)]
    found = [Choice(p.name, p.row_shape(context.spec.shape, length), tuple(p.axes), p.integer) for p in points]
    for derivation in plan_derivations(config, context.spec, context.base, length):
        shape, axes = derivation.row
        found += [Choice(path, shape, axes, derivation.integer) for path in derivation.paths]
    return found

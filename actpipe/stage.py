"""What a stage is, what it is given, and how it is found."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar, runtime_checkable

from actpipe.errors import ActpipeError, RecipeError
from actpipe.planning import Devices
from actpipe.records import Finding, Part
from actpipe.schemas.base import StageConfig
from actpipe.schemas.recipe import BUILT_IN_STAGES, ExtractActivationsConfig, Recipe
from actpipe.telemetry import Meter, Telemetry

if TYPE_CHECKING:
    from actpipe.models.hooked_model import HookedModel, ModelSpec
    from actpipe.stores.layout import RunFolder

GROUP = "actpipe.stages"
"""The entry-point group in which stages register, ours and foreign ones."""

ConfigT = TypeVar("ConfigT", bound=StageConfig)


class PartWorker(Protocol):
    """Something that does one part after another, with the model at hand."""

    def __call__(self, part: Part) -> Future[None]:
        """Compute a part; the future is done once it counts, and writing goes on beside the next part until then."""


class DoesParts(Protocol):
    """A stage whose work is cut into parts, any of which any worker may do, twice if need be."""

    def open_worker(self, context: RunContext, meter: Meter) -> AbstractContextManager[PartWorker]:
        """Open what does the parts; what was handed over is finished when it is closed in order."""


class MapsItems(Protocol):
    """A stage that applies a function to many items, on whatever worker."""

    def mapped(self, context: RunContext) -> Callable[[Any], Any]:
        """Return that function."""


class Engine(Protocol):
    """Something that does parts: this process, or a cluster."""

    is_here: bool
    """Whether the model is run by this very process."""

    def run_parts(self, parts: Sequence[Part], work: DoesParts, context: RunContext, meter: Meter) -> None:
        """Do every part once; the meter is told of rows and bytes."""

    def map_items(self, items: Iterable[Any], work: MapsItems, context: RunContext) -> Iterator[Any]:
        """Yield what becomes of each item, in the order of the items."""

    def analysing(self, context: RunContext) -> AbstractContextManager[None]:
        """Within, graphs over the blocks of a store are computed by the same workers."""

    def close(self) -> None:
        """Let go of workers, where there are any."""


@dataclass
class RunContext:
    """What a stage is given: the run's folder, its recipe, its model, and someone to tell."""

    folder: RunFolder
    base: Path
    """Folder that relative paths of the recipe start from."""
    recipe: Recipe
    engine: Engine
    telemetry: Telemetry
    load_spec: Callable[[], ModelSpec]
    load_model: Callable[[], HookedModel]
    findings: list[Finding] = field(default_factory=list)
    planned_rows: dict[str, int] = field(default_factory=dict)
    """Tokens that a plan expects, by corpus."""
    devices: Devices | None = None
    """The devices that a plan is for, where they are not this machine's: then no weights are loaded."""

    @cached_property
    def spec(self) -> ModelSpec:
        """The model without its weights."""
        return self.load_spec()

    @cached_property
    def model(self) -> HookedModel:
        """The model with its weights, loaded when it is first needed."""
        return self.load_model()

    def corpus(self, config: StageConfig) -> RunFolder:
        """Return the folder of the corpus that a stage works on."""
        return self.folder.corpus(config.corpus)

    def settings_of(self, kind: type[ConfigT], corpus: str) -> ConfigT | None:
        """Return this recipe's settings of a stage for a corpus, if it has such a stage."""
        for config in self.recipe.stages:
            if isinstance(config, kind) and config.corpus == corpus:
                return config
        return None

    def planned_hooks(self, corpus: str) -> set[str]:
        """Return the names that the corpus's store has or will have, activations and metrics alike."""
        from actpipe.stores.reading import ActivationStore

        config = self.settings_of(ExtractActivationsConfig, corpus)
        if config is not None:
            return {*self.spec.select(config.hooks), *(f"metrics/{metric}" for metric in config.metrics)}
        store = ActivationStore(self.folder.corpus(corpus))
        return {*store.hook_names, *store.array_names}


class Stage(Protocol):
    """One step of a run: settings in, then files that exist to files that exist, restartable at any moment."""

    needs: ClassVar[tuple[str, ...]]
    """What must be there before: `token_table`, `store`, `results`."""
    gives: ClassVar[str]
    """What is there afterwards."""
    config: Any

    def check(self, context: RunContext) -> None:
        """Refuse what cannot work, before anything runs; costs no forward pass."""

    def run(self, context: RunContext) -> None:
        """Do what is not yet done; doing it twice changes nothing."""


@runtime_checkable
class Plans(Protocol):
    """A stage that can say beforehand what it will cost."""

    def plan(self, context: RunContext) -> Finding:
        """Say what it will cost; leaves nothing on disk."""


def find_stage(name: str) -> Callable[[Any], Stage]:
    """Return a stage's class by its name.

    Raises:
        RecipeError: No installed package brings such a stage.
    """
    entry = _entry_points().get(name)
    if entry is None:
        raise RecipeError(
            f"the stage {name!r} is not installed; there are {', '.join(sorted(_entry_points()))} "
            "(after adding one, install its package again)"
        )
    stage: Callable[[Any], Stage] = entry.load()
    return stage


def foreign_configs(names: Iterable[str]) -> list[type[StageConfig]]:
    """Return the settings models of those stages among `names` that other packages bring."""
    built_in = {config.model_fields["stage"].default for config in BUILT_IN_STAGES}
    found = []
    for name in dict.fromkeys(names):
        entry = _entry_points().get(name)
        if name not in built_in and entry is not None:
            found.append(_config_of(entry))
    return found


def _config_of(entry: EntryPoint) -> type[StageConfig]:
    annotation = entry.load().__annotations__.get("config")
    if not (isinstance(annotation, type) and issubclass(annotation, StageConfig)):
        raise ActpipeError(f"the stage {entry.name!r} ({entry.value}) must annotate `config` with its settings model")
    return annotation


def _entry_points() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=GROUP)}


def check_order(stages: Sequence[Stage], present: Callable[[str, str], bool]) -> None:
    """Refuse a recipe in which a stage comes before what it needs.

    Args:
        stages: In the order of the recipe.
        present: Whether something is in the run folder already, by corpus and kind.

    Raises:
        RecipeError: Names the stage and what it lacks.
    """
    given: set[tuple[str, str]] = set()
    for position, stage in enumerate(stages):
        corpus, source = stage.config.corpus, stage.config.reads
        for need in stage.needs:
            if (source, need) not in given and not present(source, need):
                raise RecipeError(
                    f"stages[{position}] ({stage.config.stage}) needs a {need.replace('_', ' ')} of the corpus "
                    f"{source!r}, and no stage before it makes one"
                )
        if (corpus, stage.gives) in given and stage.gives in ("token_table", "store"):
            raise RecipeError(
                f"stages[{position}] ({stage.config.stage}) makes a second {stage.gives.replace('_', ' ')} of the "
                f"corpus {corpus!r}; give it another `corpus`"
            )
        given.add((corpus, stage.gives))

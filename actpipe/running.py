"""Run a recipe from top to bottom: check everything first, then do what is not yet done."""

from __future__ import annotations

import importlib.metadata
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from actpipe import __version__
from actpipe.contexts import load_recipe, make_context
from actpipe.errors import RecipeError, StoreMismatchError
from actpipe.jobs.engine import InProcess
from actpipe.models.hooked_model import ModelSpec
from actpipe.operating import told_of
from actpipe.placing import describe_placement, fits_as_written, placement_of, this_machine
from actpipe.planning import Devices
from actpipe.recipes import RecipeText, read_recipe_text, with_overrides
from actpipe.records import Finding
from actpipe.schemas.base import AnalysisConfig, StageConfig
from actpipe.schemas.engine import EngineConfig
from actpipe.schemas.eval_analyses import EvaluateModelConfig
from actpipe.schemas.manifest import ModelIdentity, RunRecord
from actpipe.schemas.recipe import (
    ExtractActivationsConfig,
    GenerateTextConfig,
    ModelConfig,
    Recipe,
    TokenizeTextConfig,
)
from actpipe.schemas.reducing import ReduceActivationsConfig
from actpipe.stage import Engine, Plans, RunContext, Stage, check_order, find_stage
from actpipe.stores.cleaning import clear_abandoned
from actpipe.stores.layout import RunFolder, disk_trouble_explained, write_whole
from actpipe.stores.locking import only_run_in
from actpipe.stores.remote import at_work_in, local_folder, publish, remote_of
from actpipe.stores.results import list_results
from actpipe.stores.run_record import read_record
from actpipe.stores.token_table import TokenTable
from actpipe.stores.verifying import corpora
from actpipe.telemetry import Telemetry

_LIBRARIES = ("torch", "transformers", "tokenizers", "datasets", "numpy", "zarr")
_DATA_STAGES = (TokenizeTextConfig, GenerateTextConfig, ExtractActivationsConfig)
_NOT_STORED = {
    "model": {"name", "device", "device_map", "max_memory", "offload_folder"},
    "tokenize_text": set[str](),
    "generate_text": set[str](),
    "extract_activations": {"queue_bytes", "fsync"},
}
"""Settings that do not change a stored byte: where a run happens, and how. The model is known by its fingerprint."""


@dataclass(frozen=True)
class RunSummary:
    """What a finished run has to show."""

    folder: Path
    findings: tuple[Finding, ...]

    @property
    def place(self) -> str:
        """The run folder for people: its URL, where it is in an object store."""
        remote = remote_of(self.folder)
        return str(self.folder) if remote is None else remote.url


def run_recipe(
    recipe: str | Path | Mapping[str, Any],
    *,
    out: str | Path | None = None,
    overrides: Iterable[str] = (),
    telemetry: Telemetry | None = None,
    scheduler: str | None = None,
) -> RunSummary:
    """Run a recipe; what an earlier run of it has finished is not done again.

    Args:
        recipe: A YAML file, or the same as a dict (then relative paths start from the working folder).
        out: The run folder; by default `runs/NAME` in the working folder.
        overrides: `key=value` settings, as `--set` takes them.
        telemetry: Who is told; by default a console on the standard error stream.
        scheduler: Address of a Dask scheduler whose workers do the parts, in place of the recipe's `engine`.

    Raises:
        ActpipeError: The recipe, the model, the data or what is on disk does not fit; nothing was run.
    """
    stages, context = prepare(recipe, out, overrides, telemetry or Telemetry(), scheduler=scheduler)
    return run_after(lambda _: None, stages, context)


def run_after(before: Callable[[RunFolder], None], stages: Sequence[Stage], context: RunContext) -> RunSummary:
    """Run stages; `before` is called once no other run can be in the folder and everything has been checked."""
    folder = context.folder
    _refuse_foreign_folder(folder)
    existed = folder.root.exists()
    with (
        disk_trouble_explained(folder),
        only_run_in(folder) as is_ours,
        at_work_in(folder.root) as save,
    ):
        clear_abandoned(folder)
        try:
            _check_everything(stages, context)
        except Exception:
            _leave_no_trace(folder, existed=existed)
            raise
        before(folder)
        try:
            with told_of(folder, context.telemetry), disk_trouble_explained(folder):
                _write_record(folder, context.recipe, context.spec)
                publish([folder.record])
                _run_stages(stages, context, save)
                _write_record(folder, context.recipe, context.spec)
                save()
        finally:
            context.engine.close()
            if is_ours():
                clear_abandoned(folder)
    return RunSummary(folder.root, tuple(context.findings))


def plan_recipe(
    recipe: str | Path | Mapping[str, Any],
    *,
    out: str | Path | None = None,
    overrides: Iterable[str] = (),
    telemetry: Telemetry | None = None,
    devices: Devices | None = None,
) -> list[Finding]:
    """Say what a recipe would cost, and leave nothing on disk; arguments and errors are those of `run_recipe`.

    `devices` are those that it would run on, if not this machine's. For them, and where the model does not fit as
    the recipe has it, no weights are loaded, and no speed is measured.
    """
    stages, context = prepare(recipe, out, overrides, telemetry or Telemetry())
    context.engine = InProcess()
    context.devices = devices
    _check_everything(stages, context)
    devices = devices or this_machine()
    placement, memory = placement_of(context, devices)
    if not fits_as_written(context, placement):
        context.devices = devices
    findings = [stage.plan(context) for stage in stages if isinstance(stage, Plans)]
    return [*findings, describe_placement(context, devices, placement, memory)]


def prepare(
    recipe: str | Path | Mapping[str, Any],
    out: str | Path | None,
    overrides: Iterable[str],
    telemetry: Telemetry,
    *,
    scheduler: str | None = None,
) -> tuple[list[Stage], RunContext]:
    """Read a recipe: its stages, and what they are given."""
    text, base = read_any(recipe)
    if scheduler is not None:
        overrides = [*overrides, "engine={}", "engine.kind=dask", f"engine.scheduler={scheduler}"]
    checked = load_recipe(with_overrides(text, overrides))
    name = checked.name or Path(text.title).stem
    folder = RunFolder(local_folder(out if out is not None else Path("runs") / name))
    context = make_context(checked, base, folder, telemetry, make_engine(checked.engine))
    return [find_stage(config.stage)(config) for config in checked.stages], context


def make_engine(config: EngineConfig) -> Engine:
    """Return who does the parts; a cluster is started when it is first needed."""
    if config.kind == "process":
        return InProcess()
    from actpipe.cluster.engine import DaskEngine

    return DaskEngine(config)


def _check_everything(stages: Sequence[Stage], context: RunContext) -> None:
    """Refuse what cannot work before anything runs."""
    folder = context.folder
    check_names(context.recipe.stages)
    check_order(stages, lambda corpus, kind: _is_present(folder.corpus(corpus), kind))
    check_against_record(folder, context.recipe, context.spec.identity)
    _note_other_libraries(context)
    for stage in stages:
        stage.check(context)


def read_any(recipe: str | Path | Mapping[str, Any]) -> tuple[RecipeText, Path]:
    """Return a recipe as text with line numbers, and the folder that its relative paths start from."""
    if isinstance(recipe, Mapping):
        return RecipeText("recipe", json.loads(json.dumps(recipe))), Path.cwd()
    path = Path(recipe)
    return read_recipe_text(path), path.resolve().parent


def check_names(stages: Sequence[StageConfig]) -> None:
    """Refuse two results of one name.

    Raises:
        RecipeError: Names the stages.
    """
    seen: dict[tuple[str, str], int] = {}
    for position, config in enumerate(stages):
        if not isinstance(config, AnalysisConfig | ReduceActivationsConfig | EvaluateModelConfig):
            continue
        key = (config.corpus, config.name or config.stage)
        if key in seen:
            raise RecipeError(
                f"stages[{seen[key]}] and stages[{position}] both make the result {key[1]!r} of the corpus {key[0]!r}; "
                "give one of them another `name`"
            )
        seen[key] = position


def _is_present(folder: RunFolder, kind: str) -> bool:
    if kind == "token_table":
        return TokenTable.exists(folder)
    if kind == "store":
        return folder.has_store
    return bool(list_results(folder))


def _run_stages(stages: Sequence[Stage], context: RunContext, save: Callable[[], None]) -> None:
    for stage in stages:
        with context.telemetry.stage(stage.config.stage, stage.config.corpus), context.engine.analysing(context):
            stage.run(context)
            save()


def _refuse_foreign_folder(folder: RunFolder) -> None:
    """Keep out of folders that hold something else.

    Raises:
        StoreMismatchError: The folder is neither empty nor a run's.
    """
    root = folder.root
    if root.is_file():
        raise StoreMismatchError(f"{root} is a file; choose a folder with --out")
    known = (folder.record, folder.token_commit, root / ".lock", root / ".remote")
    if root.is_dir() and any(root.iterdir()) and not any(path.exists() for path in known):
        raise StoreMismatchError(f"{root} holds other files and no run; choose an empty or new folder with --out")


def _leave_no_trace(folder: RunFolder, *, existed: bool) -> None:
    """Remove the folder of a run that was refused before it began."""
    if not existed:
        (folder.root / ".lock").unlink(missing_ok=True)
        folder.root.rmdir()


def _write_record(folder: RunFolder, recipe: Recipe, spec: ModelSpec) -> None:
    """Write `run.yaml`: data stages stay as they were first written, analyses are those of this recipe."""
    resolved = recipe.model_dump(mode="json", exclude={"engine"})
    version, libraries = __version__, _library_versions()
    if folder.record.is_file():
        earlier = read_record(folder)
        version, libraries = earlier.actpipe_version, earlier.libraries
        kept = {_stage_key(stage): stage for stage in _data_stages(earlier.recipe)}
        ours = {_stage_key(stage) for stage in _data_stages(resolved)}
        resolved["stages"] = [s for key, s in kept.items() if key not in ours] + resolved["stages"]
    tables = {name: TokenTable(corpus) for name, corpus in corpora(folder).items() if TokenTable.exists(corpus)}
    record = RunRecord(
        actpipe_version=version,
        libraries=libraries,
        recipe=resolved,
        model=spec.identity,
        datasets={name: table.manifest.dataset_fingerprint for name, table in tables.items()},
    )
    buffer = io.BytesIO()
    yaml = YAML()
    yaml.default_flow_style = False
    yaml.dump(record.model_dump(mode="json"), buffer)
    if not folder.record.is_file() or folder.record.read_bytes() != buffer.getvalue():
        write_whole(folder.record, buffer.getvalue())


def _library_versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in _LIBRARIES}


def _data_stages(recipe: Mapping[str, Any]) -> list[dict[str, Any]]:
    names = {config.model_fields["stage"].default for config in _DATA_STAGES}
    return [stage for stage in recipe["stages"] if stage["stage"] in names]


def _with_defaults(stage: dict[str, Any]) -> dict[str, Any]:
    """Fill in the settings that a record of an earlier release does not have yet."""
    (config,) = (config for config in _DATA_STAGES if config.model_fields["stage"].default == stage["stage"])
    return config.from_json(json.dumps(stage)).model_dump(mode="json")


def _stage_key(stage: Mapping[str, Any]) -> tuple[str, str]:
    return stage["stage"], stage["corpus"]


def check_against_record(folder: RunFolder, recipe: Recipe, model: ModelIdentity) -> None:
    """Refuse to continue a run whose stored bytes this recipe would make differently.

    Analyses may be added, changed and left out: they are computed from what is stored.

    Raises:
        StoreMismatchError: Shows every setting that differs.
    """
    if not folder.record.is_file():
        return
    record = read_record(folder)
    ours = recipe.model_dump(mode="json")
    before = ModelConfig.from_json(json.dumps(record.recipe["model"])).model_dump(mode="json")
    differences = _differences("model", before, ours["model"], _NOT_STORED["model"])
    if record.model.fingerprint != model.fingerprint:
        then = record.model
        differences.append(f"model: {then.name} ({then.fingerprint[:12]}) -> {model.name} ({model.fingerprint[:12]})")
    earlier = {_stage_key(stage): stage for stage in map(_with_defaults, _data_stages(record.recipe))}
    for stage in _data_stages(ours):
        key = _stage_key(stage)
        if key in earlier:
            title = key[0] if key[1] == "main" else f"{key[0]}@{key[1]}"
            differences += _differences(title, earlier[key], stage, _NOT_STORED[key[0]])
    if differences:
        raise StoreMismatchError(
            f"{folder.root} was made by another recipe:\n  "
            + "\n  ".join(differences)
            + "\nrun the old recipe, or choose another folder with --out"
        )


def _note_other_libraries(context: RunContext) -> None:
    """Say so where a run is continued with other versions of the libraries."""
    if not context.folder.record.is_file():
        return
    before, now = read_record(context.folder).libraries, _library_versions()
    changed = [f"{name} {before[name]} -> {now[name]}" for name in before if before[name] != now.get(name)]
    if changed:
        context.telemetry.say(
            f"note: this run began with other libraries ({', '.join(changed)}); values may differ in their last bits"
        )


def _differences(title: str, before: Any, now: Any, ignored: set[str]) -> list[str]:
    """Return one line per setting that differs."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [key for key in {**before, **now} if key not in ignored]
        return [line for key in keys for line in _differences(f"{title}.{key}", before.get(key), now.get(key), set())]
    return [] if before == now else [f"{title}: {before!r} -> {now!r}"]

"""From a recipe to what its stages are given, in this process or on a worker of a cluster."""

from __future__ import annotations

from pathlib import Path

from actpipe.models.hooked_model import HookedModel, ModelSpec
from actpipe.models.loading import ModelSource
from actpipe.recipes import RecipeText, check_recipe
from actpipe.schemas.recipe import Recipe
from actpipe.stage import Engine, RunContext, foreign_configs
from actpipe.stores.layout import RunFolder
from actpipe.telemetry import Telemetry


def load_recipe(text: RecipeText) -> Recipe:
    """Check a recipe, stages of other packages included."""
    stages = text.data.get("stages") if isinstance(text.data, dict) else None
    names = [stage.get("stage") for stage in stages or () if isinstance(stage, dict)]
    return check_recipe(text, foreign_configs(name for name in names if isinstance(name, str)))


def make_context(recipe: Recipe, base: Path, folder: RunFolder, telemetry: Telemetry, engine: Engine) -> RunContext:
    """Return what the stages are given.

    Args:
        recipe: The model and the stages.
        base: Folder that relative paths of the recipe start from.
        folder: The run folder.
        telemetry: Who is told.
        engine: Who does the parts.
    """
    model = recipe.model
    local = base / Path(model.name).expanduser()
    source = ModelSource(
        str(local) if local.is_dir() or model.name.startswith((".", "/", "~")) else model.name,
        model.revision,
        model.trust_remote_code,
    )

    def load_model() -> HookedModel:
        return HookedModel.from_source(
            source,
            dtype=model.dtype,
            device=model.device,
            device_map=model.device_map,
            max_memory=model.max_memory,
            offload_folder=None if model.offload_folder is None else base / Path(model.offload_folder).expanduser(),
            convention=model.convention,
        )

    return RunContext(
        folder=folder,
        base=base,
        recipe=recipe,
        engine=engine,
        telemetry=telemetry,
        load_spec=lambda: ModelSpec(source, model.dtype, model.convention),
        load_model=load_model,
    )

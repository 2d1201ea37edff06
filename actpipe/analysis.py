"""What all analysis stages share: naming, doing nothing twice, telling."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from actpipe.errors import ModelLoadError, RecipeError, UnsupportedModelError
from actpipe.schemas.base import AnalysisConfig
from actpipe.schemas.recipe import ExtractActivationsConfig
from actpipe.schemas.results import ResultRecord
from actpipe.stage import RunContext
from actpipe.stores.reading import ActivationStore
from actpipe.stores.results import Result, ResultWriter, current_result
from actpipe.telemetry import Meter

if TYPE_CHECKING:
    from actpipe.models.weights import Weights

Compute = Callable[[ActivationStore, ResultWriter, Meter], Result]
ComputeFromWeights = Callable[["Weights", ResultWriter], Result]

_NOT_THE_NUMBERS = {"name", "corpus", "block_bytes", "max_bytes", "stage"}


def result_name(config: AnalysisConfig) -> str:
    """Return the name under which a stage's result is kept."""
    return config.name or config.stage


def place_of(result: Result, config: AnalysisConfig) -> str:
    """Say to people which result it is: its corpus, and its name where that is not the stage's."""
    record = result.record
    return record.corpus if record.name == config.stage else f"{record.corpus}, {record.name}"


def run_analysis(
    context: RunContext, config: AnalysisConfig, kind: str, compute: Compute, more: Mapping[str, object] | None = None
) -> Result:
    """Return a stage's result: the one that is there if its settings are the same, else a new one.

    Args:
        context: The run.
        config: The settings.
        kind: What the numbers are.
        compute: Makes the result from the store.
        more: What else decides the numbers, such as another store; kept with the settings.
    """
    folder = context.corpus(config)
    store = ActivationStore(folder)
    wanted = _record(config, kind, store.manifest.model.fingerprint, more or {})
    found = current_result(folder, wanted)
    if found is not None:
        return found
    with context.telemetry.progress(wanted.name, None, "blocks") as meter:
        return compute(store, ResultWriter(folder, wanted), meter)


def run_on_weights(context: RunContext, config: AnalysisConfig, kind: str, compute: ComputeFromWeights) -> Result:
    """Return a result that needs the model's weights and no store; see `run_analysis`.

    Weights are read from the model's files when they are asked for. Where the files do not hold them as they are, such
    as quantised ones, the model is loaded.
    """
    from actpipe.models.checkpoint import open_weights

    folder, source = context.corpus(config), context.spec.source
    wanted = _record(config, kind, context.spec.identity.fingerprint, {})
    found = current_result(folder, wanted)
    if found is not None:
        return found
    try:
        weights = open_weights(
            source.name,
            revision=source.revision,
            dtype=context.recipe.model.dtype,
            trust_remote_code=source.trust_remote_code,
        )
        return compute(weights, ResultWriter(folder, wanted))
    except (ModelLoadError, UnsupportedModelError):
        return compute(context.model.weights, ResultWriter(folder, wanted))


def _record(config: AnalysisConfig, kind: str, fingerprint: str, more: Mapping[str, object]) -> ResultRecord:
    """Return what says of a result what it is, and what made it."""
    return ResultRecord(
        name=result_name(config),
        kind=kind,
        corpus=config.corpus,
        settings=config.model_dump(mode="json", exclude=_NOT_THE_NUMBERS) | dict(more),
        model_fingerprint=fingerprint,
    )


def require_circuits(context: RunContext, config: AnalysisConfig) -> None:
    """Refuse an analysis of weights of a model whose heads do not all have weights of their own.

    Raises:
        RecipeError: Says which analysis and which model.
    """
    from actpipe.models.circuits import has_circuits

    if not has_circuits(context.spec.shape):
        raise RecipeError(
            f"{result_name(config)} reads W_Q, W_K, W_V and W_O of every head of a decoder, and this "
            f"{context.spec.anatomy.family.name} model does not have them in every layer; leave the stage out"
        )


def require_mlps(context: RunContext, config: AnalysisConfig, layers: Iterable[int]) -> None:
    """Refuse an analysis of the weights of MLPs where a layer has no such weights.

    Raises:
        RecipeError: Says which analysis, which model and which layers.
    """
    require_sum(context, config)
    blocks = context.spec.shape.blocks
    lacking = [layer for layer in layers if blocks[layer].mlp not in ("plain", "gated")]
    if lacking:
        raise RecipeError(
            f"{result_name(config)} reads W_in and W_out, which this {context.spec.anatomy.family.name} model does not "
            f"have in layers {', '.join(map(str, lacking))}; name other `layers`, or leave W_in and W_out out of "
            "`matrices`"
        )


def require_decoder(context: RunContext, config: AnalysisConfig) -> None:
    """Refuse an analysis of a model whose tokens see what follows them.

    Raises:
        RecipeError: Says which analysis and which model.
    """
    if not context.spec.shape.causal:
        family = context.spec.anatomy.family.name
        raise RecipeError(
            f"{result_name(config)} is for models that predict the next token, and this {family} model sees a text "
            "whole; leave the stage out"
        )


def require_sum(context: RunContext, config: AnalysisConfig, *, native: bool = False) -> None:
    """Refuse an analysis of a model whose residual stream is no sum of what attention and MLPs write.

    Args:
        context: The run.
        config: The analysis.
        native: Whether it also needs the model's own activations.

    Raises:
        RecipeError: Says which analysis and which model, and why.
    """
    require_decoder(context, config)
    family = context.spec.anatomy.family.name
    if not context.spec.shape.sums_to_logits:
        raise RecipeError(
            f"{result_name(config)} takes the residual stream apart into what attention and MLPs write, and that of "
            f"this {family} model is no such sum, or not all of it is proven; leave the stage out"
        )
    if native and context.recipe.model.convention != "native":
        raise RecipeError(
            f"{result_name(config)} folds norms by itself and reads native activations; set `model.convention: native`"
        )


def require_neurons(context: RunContext, config: AnalysisConfig) -> None:
    """Refuse an analysis of neurons of a model that has experts, or MLPs that nothing can be seen of.

    Raises:
        RecipeError: Says which analysis and which model.
    """
    if not all(block.mlp in ("plain", "gated") for block in context.spec.shape.blocks):
        raise RecipeError(
            f"{result_name(config)}: not every layer of this {context.spec.anatomy.family.name} model has an MLP with "
            "neurons, some have experts or are seen as a whole; leave out `neurons`"
        )


def require_every_token(context: RunContext, config: AnalysisConfig) -> None:
    """Refuse an analysis of neighbouring tokens, or of whole sequences, where only some tokens will be stored.

    Raises:
        RecipeError: Says which analysis and what to change.
    """
    extracting = context.settings_of(ExtractActivationsConfig, config.corpus)
    if extracting is not None and extracting.keep is not None:
        raise RecipeError(
            f"{result_name(config)} looks at whole sequences, and the corpus {config.corpus!r} keeps only some of "
            "their tokens; leave out `keep`, or the stage"
        )


def require_hooks(context: RunContext, config: AnalysisConfig, names: Iterable[str]) -> None:
    """Refuse an analysis, before anything runs, whose input will not be stored.

    Raises:
        RecipeError: Names what is missing and where to add it.
    """
    planned = context.planned_hooks(config.corpus)
    missing = [name for name in names if name not in planned]
    if missing:
        raise RecipeError(
            f"{result_name(config)} needs {', '.join(missing[:4])}{' and more' if len(missing) > 4 else ''} of the "
            f"corpus {config.corpus!r}; add them to `hooks` or `metrics` of its extract_activations"
        )

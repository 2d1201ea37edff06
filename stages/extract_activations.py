"""Token table -> activation store, part by part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from actpipe.schemas.manifest import StoreManifest
from actpipe.schemas.recipe import ExtractActivationsConfig, TokenizeTextConfig

from actpipe.describing import describe_fidelity
from actpipe.errors import RecipeError
from actpipe.extraction.estimate import estimate, row_bytes
from actpipe.extraction.layout import check_encoding, check_rows_per_part, plan_store
from actpipe.extraction.proof import prove_hooks
from actpipe.extraction.worker import ExtractionWorker
from actpipe.hooks import ModelShape
from actpipe.models.loading import resolve_device
from actpipe.planning import format_bytes, plan_parts
from actpipe.records import Finding, Part
from actpipe.stage import RunContext
from actpipe.stores.layout import RunFolder
from actpipe.stores.reading import ActivationStore, is_complete
from actpipe.stores.token_table import TokenTable
from actpipe.stores.writing import create_store, missing_parts


@dataclass(frozen=True)
class ExtractActivations:
    """Run the model over the token table and store the named activations."""

    config: ExtractActivationsConfig
    needs: ClassVar[tuple[str, ...]] = ("token_table",)
    gives: ClassVar[str] = "store"

    def check(self, context: RunContext) -> None:
        """Refuse names that the model does not have or that are not stored, and parts that cut sequences."""
        if self.config.metrics and not context.spec.shape.causal:
            raise RecipeError(
                f"metrics are of the next token, which a {context.spec.anatomy.family.name} model does not predict for "
                "a text that it sees whole; leave `metrics` out"
            )
        for name in context.spec.select(self.config.hooks):
            if why := context.spec.hook_points[name].not_stored:
                raise RecipeError(f"{name} cannot be stored: {why}; {_way_out(context.spec.shape)}")
            if given_by := context.spec.hook_points[name].on_request:
                how = f"store {given_by}, and z W_O gives it" if name.endswith("result") else f"{given_by} holds it"
                raise RecipeError(f"{name} is never stored: {how}")
        check_encoding(self.config, context.spec.select(self.config.hooks))
        layout, context_length = self._sequences(context)
        check_rows_per_part(self.config, layout, context_length)
        if context.recipe.model.device_map is None and not is_complete(context.corpus(self.config)):
            resolve_device(context.recipe.model.device)

    def plan(self, context: RunContext) -> Finding:
        """Say what it will take: bytes, parts, memory, and time by running one batch."""
        layout, context_length = self._sequences(context)
        n_rows = context.planned_rows[self.config.corpus]
        manifest = plan_store(self.config, context.spec, n_rows=n_rows, context_length=context_length, layout=layout)
        return estimate(self.config, manifest, context.model)

    def run(self, context: RunContext) -> None:
        """Do every part that has no commit record; doing one twice changes nothing."""
        folder = context.corpus(self.config)
        tokens = TokenTable(folder).manifest
        manifest = plan_store(
            self.config,
            context.spec,
            n_rows=tokens.n_rows,
            context_length=tokens.context_length,
            layout=tokens.layout,
        )
        create_store(folder, manifest)
        missing = missing_parts(folder, plan_parts(manifest.n_rows, manifest.rows_per_part))
        rate = self._extract(context, folder, manifest, missing) if missing else None
        store = ActivationStore(folder)
        context.findings += [_describe(store, rate), *describe_fidelity(store)]

    def _sequences(self, context: RunContext) -> tuple[str, int]:
        """Return layout and context length of the corpus, from the recipe or from what is there."""
        tokenizing = context.settings_of(TokenizeTextConfig, self.config.corpus)
        if tokenizing is not None:
            layout = tokenizing.layout if tokenizing.compat == "none" else tokenizing.compat
            return layout, tokenizing.context_length
        tokens = TokenTable(context.corpus(self.config)).manifest
        return tokens.layout, tokens.context_length

    def _extract(self, context: RunContext, folder: RunFolder, manifest: StoreManifest, missing: list[Part]) -> float:
        prove_hooks(context.model, TokenTable(folder), context.spec.select(self.config.hooks))
        n_rows = sum(part.n_rows for part in missing)
        if n_rows < manifest.n_rows:
            context.telemetry.say(
                f"continuing: {manifest.n_rows - n_rows:,} of {manifest.n_rows:,} tokens are committed already"
            )
        with (
            context.telemetry.progress(f"extract {self.config.corpus}", n_rows, "tokens") as meter,
            ExtractionWorker.open(self.config, context.model, folder, manifest, meter) as worker,
        ):
            context.engine.run_parts(missing, worker)
        return meter.rate


def _way_out(shape: ModelShape) -> str:
    """Return which names of such a model can be stored."""
    return "name hooks of `encoder.*`" if shape.encoder_decoder else "name hooks of `blocks.*`"


def _describe(store: ActivationStore, rate: float | None) -> Finding:
    rows = [
        ("tokens", f"{store.n_rows:,}", f"in {store.n_parts:,} parts"),
        ("arrays", f"{len(store.array_names)}", f"{len(store.hook_names)} hooks"),
        ("written", format_bytes(row_bytes(store.manifest) * store.n_rows), "activations, metrics and tokens"),
    ]
    if rate is not None:
        rows.append(("speed", f"{rate:,.0f}", "tokens/s, from token table to disk"))
    return Finding(f"Store: {store.manifest.corpus}", ("", "value", ""), tuple(rows))

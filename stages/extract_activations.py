"""Token table -> activation store, part by part."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar

from actpipe.schemas.manifest import StoreManifest
from actpipe.schemas.recipe import ExtractActivationsConfig

from actpipe.describing import describe_fidelity
from actpipe.errors import RecipeError
from actpipe.extraction.deriving import Derivation, captured_hooks, plan_derivations
from actpipe.extraction.estimate import estimate, row_bytes
from actpipe.extraction.keeping import most_rows, settle_rows
from actpipe.extraction.layout import check_encoding, check_rows_per_part, plan_store
from actpipe.extraction.proof import prove_hooks
from actpipe.extraction.settling import check_batch_tokens, find_batch_tokens, settle_batch_tokens
from actpipe.extraction.trial import tokens_per_second
from actpipe.extraction.worker import ExtractionWorker
from actpipe.hooks import ModelShape
from actpipe.model_inputs import ModelInputs, inputs_of, special_token_ids
from actpipe.models.cache_proof import prove_cache
from actpipe.models.loading import resolve_device
from actpipe.planning import format_bytes, plan_parts
from actpipe.records import Finding, Part
from actpipe.stage import RunContext
from actpipe.stores.reading import ActivationStore, is_complete
from actpipe.stores.token_table import TokenTable
from actpipe.stores.writing import create_store, missing_parts, read_manifest
from actpipe.telemetry import Meter


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
        names = context.spec.select(captured_hooks(self.config))
        for name in names:
            if why := context.spec.hook_points[name].not_stored:
                raise RecipeError(f"{name} cannot be stored: {why}; {_way_out(context.spec.shape)}")
            if given_by := context.spec.hook_points[name].on_request:
                how = f"store {given_by}, and z W_O gives it" if name.endswith("result") else f"{given_by} holds it"
                raise RecipeError(f"{name} is never stored: {how}")
        check_encoding(self.config, names)
        inputs = inputs_of(context, self.config.corpus)
        self._derivations(context, inputs)
        check_batch_tokens(self.config, context.folder, here=context.engine.is_here)
        check_rows_per_part(self.config, inputs)
        if inputs.n_prefix or self.config.chunk_tokens is not None:
            self._check_pieces(context)
        runs_here = context.engine.is_here and context.devices is None and context.recipe.model.device_map is None
        if runs_here and not is_complete(context.corpus(self.config)):
            resolve_device(context.recipe.model.device)

    def plan(self, context: RunContext) -> Finding:
        """Say what it will take: bytes, parts, memory, and time by running one batch."""
        n_rows = context.planned_rows[self.config.corpus]
        if self.config.keep is not None:
            n_rows = most_rows(self.config.keep, n_rows)
        inputs = inputs_of(context, self.config.corpus)
        derivations = self._derivations(context, inputs)
        manifest = plan_store(self.config, context.spec, n_rows=n_rows, inputs=inputs, derivations=derivations)
        config, speed, note = self.config, None, ""
        if context.devices is None:
            model, length = context.model, inputs.context_length
            found, how = find_batch_tokens(config, model, length, derivations)
            note = f"batches of {found:,} tokens: {how}" if config.batch_tokens == "auto" else ""
            config = config.model_copy(update={"batch_tokens": found})
            speed = tokens_per_second(config, model, derivations, length), str(model.device)
        return replace(estimate(config, manifest, context.spec.n_bytes, speed), note=note)

    def run(self, context: RunContext) -> None:
        """Do every part that has no commit record; doing one twice changes nothing."""
        folder = context.corpus(self.config)
        table = TokenTable(folder)
        tokens = table.manifest
        inputs = ModelInputs.of_table(tokens)
        n_rows, checksum = tokens.n_rows, None
        if self.config.keep is not None:
            kept = settle_rows(folder, table, self.config.keep, special_token_ids(context, tokens))
            n_rows, checksum = kept.n_rows, kept.rows_crc32c
            context.telemetry.say(f"keeping {n_rows:,} of {tokens.n_rows:,} tokens")
        manifest = plan_store(
            self.config,
            context.spec,
            n_rows=n_rows,
            inputs=inputs,
            kept_rows=checksum,
            derivations=self._derivations(context, inputs),
        )
        create_store(folder, manifest)
        missing = missing_parts(folder, plan_parts(manifest.n_rows, manifest.rows_per_part))
        rate = self._extract(context, manifest, missing) if missing else None
        store = ActivationStore(folder)
        context.findings += [_describe(store, rate), *describe_fidelity(store)]

    def _derivations(self, context: RunContext, inputs: ModelInputs) -> tuple[Derivation, ...]:
        return plan_derivations(self.config, context.spec, context.base, inputs.context_length)

    def _check_pieces(self, context: RunContext) -> None:
        shape = context.spec.shape
        if not shape.causal or shape.encoder_decoder:
            raise RecipeError(
                f"chunk_tokens: a {context.spec.anatomy.family.name} model's tokens see what follows them, so that a "
                "sequence cannot be run piece by piece; leave it out"
            )

    def _extract(self, context: RunContext, manifest: StoreManifest, missing: list[Part]) -> float:
        n_rows = sum(part.n_rows for part in missing)
        if n_rows < manifest.n_rows:
            context.telemetry.say(
                f"continuing: {manifest.n_rows - n_rows:,} of {manifest.n_rows:,} tokens are committed already"
            )
        with context.telemetry.progress(f"extract {self.config.corpus}", n_rows, "tokens") as meter:
            context.engine.run_parts(missing, self, context, meter)
        return meter.rate

    @contextmanager
    def open_worker(self, context: RunContext, meter: Meter) -> Iterator[ExtractionWorker]:
        """Prove the names on this very model and hook them."""
        folder = context.corpus(self.config)
        manifest = read_manifest(folder)
        names = context.spec.select(captured_hooks(self.config))
        derivations = plan_derivations(self.config, context.spec, context.base, manifest.context_length)
        table = TokenTable(folder)
        prove_hooks(context.model, table, names)
        if table.manifest.prefix_ids or self.config.chunk_tokens is not None:
            prove_cache(context.model, names)
        settle_batch_tokens(
            self.config,
            folder,
            lambda: context.model,
            context_length=manifest.context_length,
            derivations=derivations,
            note=meter.note,
        )
        with ExtractionWorker.open(
            self.config, context.model, folder, manifest, meter, derivations=derivations
        ) as worker:
            yield worker


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

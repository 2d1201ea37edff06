"""Token table of prompts -> token table of the prompts and what the model adds to them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

from actpipe.schemas.manifest import TokenTableManifest
from actpipe.schemas.recipe import GenerateTextConfig

from actpipe.describing import describe_tokens
from actpipe.errors import RecipeError
from actpipe.extraction.continuing import GenerationWorker, continued, kept_columns
from actpipe.model_inputs import check_length, inputs_of
from actpipe.planning import plan_parts
from actpipe.records import Finding
from actpipe.stage import RunContext
from actpipe.stores.continuations import Continuations
from actpipe.stores.layout import RunFolder
from actpipe.stores.token_table import TokenTable, TokenTableWriter
from actpipe.telemetry import Meter
from actpipe.text.packing import then_the_prefix


@dataclass(frozen=True)
class GenerateText:
    """Let the model continue every prompt; the tokens come first, and are then extracted like any others."""

    config: GenerateTextConfig
    needs: ClassVar[tuple[str, ...]] = ("token_table",)
    gives: ClassVar[str] = "token_table"

    def check(self, context: RunContext) -> None:
        """Refuse models that do not continue text, and prompts that leave no room."""
        shape = context.spec.shape
        if not shape.causal or shape.encoder_decoder:
            raise RecipeError(
                f"generate_text: a {context.spec.anatomy.family.name} model does not continue a text: its tokens see "
                "what follows them"
            )
        length = inputs_of(context, self.config.prompts).context_length + self.config.max_new_tokens
        check_length(context, length, what="context_length of the prompts with max_new_tokens")

    def plan(self, context: RunContext) -> Finding:
        """Say how many tokens there will be, at most."""
        folder = context.corpus(self.config)
        if TokenTable.exists(folder):
            context.planned_rows[self.config.corpus] = TokenTable(folder).manifest.n_rows
            return describe_tokens(TokenTable(folder))
        inputs = inputs_of(context, self.config.prompts)
        n_tokens = context.planned_rows[self.config.prompts]
        n_prompts = max(1, n_tokens // max(1, inputs.n_rows))
        if TokenTable.exists(context.folder.corpus(self.config.prompts)):
            n_prompts = TokenTable(context.folder.corpus(self.config.prompts)).manifest.n_sequences
        n_rows = n_tokens + n_prompts * self.config.max_new_tokens
        context.planned_rows[self.config.corpus] = n_rows
        return Finding(
            f"Corpus: {self.config.corpus}",
            ("", "expected", ""),
            (("prompts", f"{n_prompts:,}", "or more"), ("tokens", f"{n_rows:,}", "prompts included")),
        )

    def run(self, context: RunContext) -> None:
        """Continue what is not continued yet, then write the table, whole."""
        folder = context.corpus(self.config)
        if not TokenTable.exists(folder):
            self._generate(context, folder)
        context.findings.append(describe_tokens(TokenTable(folder)))

    def _generate(self, context: RunContext, folder: RunFolder) -> None:
        source = context.folder.corpus(self.config.prompts)
        prompts, pieces = TokenTable(source), Continuations(folder)
        parts = plan_parts(prompts.manifest.n_rows, self.config.prompt_tokens_per_part)
        missing = pieces.missing(parts)
        if len(missing) < len(parts):
            context.telemetry.say(
                f"continuing: {len(parts) - len(missing)} of {len(parts)} parts are generated already"
            )
        n_left = sum(part.n_rows for part in missing)
        with context.telemetry.progress(f"generate {self.config.corpus}", n_left, "prompt tokens") as meter:
            context.engine.run_parts(missing, self, context, meter)
        writer = TokenTableWriter(folder, kept_columns(prompts))
        records = continued(prompts, parts, pieces)
        prefix = prompts.manifest.prefix_ids
        for record in then_the_prefix(records, prefix) if prompts.stores_prefix else records:
            writer.add(record)
        if source.tokenizer.is_dir() and not folder.tokenizer.exists():
            shutil.copytree(source.tokenizer, folder.tokenizer)
        writer.commit(self._manifest(prompts.manifest, writer))
        pieces.remove()

    @contextmanager
    def open_worker(self, context: RunContext, meter: Meter) -> Iterator[GenerationWorker]:
        """Have the model at hand."""
        prompts = TokenTable(context.folder.corpus(self.config.prompts))
        pieces = Continuations(context.corpus(self.config))
        pieces.begin()
        yield GenerationWorker(self.config, context.model, prompts, pieces, meter)

    def _manifest(self, prompts: TokenTableManifest, writer: TokenTableWriter) -> TokenTableManifest:
        return TokenTableManifest(
            layout="documents",
            context_length=prompts.context_length + self.config.max_new_tokens,
            n_documents=sum(writer.status_counts.values()),
            n_sequences=writer.n_sequences,
            n_rows=writer.n_rows,
            n_truncated=0,
            status_counts=dict(writer.status_counts),
            first_problems={},
            bos_id=prompts.bos_id,
            separator_id=None,
            pad_id=None,
            prefix_ids=prompts.prefix_ids,
            generated=True,
            dataset=f"{prompts.dataset}, continued",
            dataset_fingerprint=prompts.dataset_fingerprint,
            tokenizer_sha256=prompts.tokenizer_sha256,
            checksums={},
        )

"""Dataset -> token table: documents, sequences and the row of every token."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import Any, ClassVar

import pyarrow as pa
from actpipe.schemas.manifest import TokenTableManifest
from actpipe.schemas.recipe import TokenizeTextConfig

from actpipe.describing import describe_tokens
from actpipe.errors import ModelLoadError, RecipeError
from actpipe.model_inputs import check_length, packing_of, prefix_ids, special_ids
from actpipe.records import DocumentRow, DocumentStatus, Finding, Sequence, SourceDocument, TokenizedDocument
from actpipe.stage import RunContext
from actpipe.stores.layout import RunFolder, move, sha256_of, sync_tree
from actpipe.stores.token_table import TokenTable, TokenTableWriter
from actpipe.telemetry import Meter
from actpipe.text.compat import Compat, compat_pad_id, tokenize_and_concatenate
from actpipe.text.documents import ColumnType, Corpus, open_corpus
from actpipe.text.packing import pack, split, then_the_prefix
from actpipe.text.tokenizing import Tokenizing, check_template, in_batches, ordinary_ids, repeated_tokens, tokenize

_PROBLEMS_NAMED = 5
_SAMPLE_DOCUMENTS = 500

Records = Iterator[DocumentRow | Sequence]


@dataclass(frozen=True)
class TokenizeText:
    """Turn a dataset into model inputs, once, so that the row of every token is known before any is run."""

    config: TokenizeTextConfig
    needs: ClassVar[tuple[str, ...]] = ()
    gives: ClassVar[str] = "token_table"

    def check(self, context: RunContext) -> None:
        """Refuse a context that the model does not have, and a dataset that cannot be read."""
        check_length(context, self.config.context_length, what="context_length")
        if not TokenTable.exists(context.corpus(self.config)):
            packing_of(self.config, context)
            corpus = self._corpus(context)
            if corpus is not None and corpus.column_type == "messages":
                assert self.config.dataset is not None
                check_template(context.spec.tokenizer, self.config.dataset.chat_template)

    def run(self, context: RunContext) -> None:
        """Write the token table, whole, unless it is there."""
        folder = context.corpus(self.config)
        if not TokenTable.exists(folder):
            self._write(context, folder)
        context.findings.append(describe_tokens(TokenTable(folder)))

    def plan(self, context: RunContext) -> Finding:
        """Count tokens: exactly where the table is there, else from a sample of the documents."""
        folder = context.corpus(self.config)
        if TokenTable.exists(folder):
            table = TokenTable(folder)
            context.planned_rows[self.config.corpus] = table.manifest.n_rows
            return describe_tokens(table)
        corpus = self._corpus(context)
        total = self._expected_documents(corpus) or (corpus.source.guess_length() if corpus else None)
        limit = min(_SAMPLE_DOCUMENTS, self.config.max_documents or _SAMPLE_DOCUMENTS)
        sampler = TokenizeText(self.config.model_copy(update={"max_documents": limit}))
        n_documents = n_rows = 0
        for record in sampler._records(corpus, context):
            if isinstance(record, DocumentRow):
                n_documents += 1
            else:
                n_rows += record.n_tokens
        most = self.config.max_tokens
        whole = total is None or n_documents >= total or n_rows == most
        rows = n_rows if whole else round(n_rows * (total or 0) / max(1, n_documents))
        rows = rows if most is None else min(rows, most)
        context.planned_rows[self.config.corpus] = rows
        shown = "unknown" if total is None else f"{total:,}"
        return Finding(
            f"Corpus: {self.config.corpus}",
            ("", "expected", ""),
            (
                ("documents", shown, "" if total is None else "in the dataset"),
                ("tokens", f"{rows:,}", f"from the first {n_documents:,} documents"),
            ),
            note="the length of this dataset is unknown: the tokens are those of the sample" if total is None else "",
        )

    def _corpus(self, context: RunContext) -> Corpus | None:
        if self.config.dataset is None:
            return None
        return open_corpus(self.config.dataset, self.config.keep_columns, context.base)

    def _write(self, context: RunContext, folder: RunFolder) -> None:
        corpus = self._corpus(context)
        columns: Mapping[str, pa.DataType] = {"period": pa.int64()} if corpus is None else corpus.kept
        writer = TokenTableWriter(folder, columns)
        problems: dict[str, list[str]] = {}
        total = self._expected_documents(corpus)
        if total is not None and self._stores_prefix:
            total += 1
        with context.telemetry.progress(f"tokenize {self.config.corpus}", total, "documents") as meter:
            for record in self._records(corpus, context):
                writer.add(record)
                if isinstance(record, DocumentRow):
                    _note(record, problems, meter)
        if writer.n_rows == 0:
            raise RecipeError(
                f"the corpus {self.config.corpus!r} has no tokens: {dict(writer.status_counts)} documents by status"
            )
        writer.commit(self._manifest(context, corpus, writer, problems))

    def _expected_documents(self, corpus: Corpus | None) -> int | None:
        limits = [self.config.max_documents, corpus.source.length if corpus else None]
        if self.config.synthetic is not None:
            limits.append(self.config.synthetic.n_documents)
        known = [limit for limit in limits if limit is not None]
        return min(known) if known and self.config.max_tokens is None else None

    def _records(self, corpus: Corpus | None, context: RunContext) -> Records:
        """Yield everything that the table is made of."""
        bos_id, _ = special_ids(self.config, context)
        if self.config.compat != "none":
            assert corpus is not None
            settings = Compat(
                version=self.config.compat,
                max_length=self.config.context_length,
                bos_id=bos_id,
                num_proc=self.config.compat_num_proc,
                n_documents=self._expected_documents(corpus),
            )
            return tokenize_and_concatenate(
                corpus.documents(self.config.max_documents), context.spec.tokenizer, settings
            )
        packing = packing_of(self.config, context)
        arrange = pack if self.config.layout == "packed" else split
        records = arrange(self._tokenized(corpus, bos_id, packing.closing_id, context), packing)
        return then_the_prefix(records, packing.prefix) if self._stores_prefix else records

    @property
    def _stores_prefix(self) -> bool:
        return self.config.prefix is not None and self.config.prefix.store == "once"

    def _tokenized(
        self, corpus: Corpus | None, bos_id: int | None, closing_id: int | None, context: RunContext
    ) -> Iterable[TokenizedDocument]:
        if corpus is None:
            source = self.config.synthetic
            assert source is not None
            n_documents = min(source.n_documents, self.config.max_documents or source.n_documents)
            return repeated_tokens(
                n_documents=n_documents,
                period=source.period,
                repeats=source.repeats,
                seed=source.seed,
                allowed=ordinary_ids(context.spec.tokenizer, context.spec.shape.d_vocab),
            )
        shards = None if context.engine.is_here else corpus.shards(self.config.max_documents)
        batches = in_batches(corpus.documents(self.config.max_documents)) if shards is None else shards
        work = _Tokenization(self.config, corpus.column_type, bos_id, closing_id)
        return chain.from_iterable(context.engine.map_items(batches, work, context))

    def _manifest(
        self, context: RunContext, corpus: Corpus | None, writer: TokenTableWriter, problems: Mapping[str, list[str]]
    ) -> TokenTableManifest:
        config = self.config
        bos_id, separator_id = special_ids(config, context)
        prefix = prefix_ids(config, context)
        return TokenTableManifest(
            layout=config.layout if config.compat == "none" else config.compat,
            context_length=config.context_length,
            n_documents=sum(writer.status_counts.values()),
            n_sequences=writer.n_sequences,
            n_rows=writer.n_rows,
            n_truncated=writer.n_truncated,
            status_counts=dict(writer.status_counts),
            first_problems={status: tuple(ids) for status, ids in problems.items()},
            bos_id=bos_id if prefix[:1] in ((), (bos_id,)) else None,
            separator_id=None if config.compat != "none" else separator_id,
            pad_id=None if config.compat == "none" else compat_pad_id(context.spec.tokenizer, config.compat),
            prefix_ids=prefix,
            dataset="synthetic repeated tokens" if corpus is None else corpus.source.title,
            dataset_fingerprint=None if corpus is None else corpus.source.fingerprint,
            tokenizer_sha256=_keep_tokenizer(context, context.corpus(config)),
            checksums={},
        )


@dataclass(frozen=True)
class _Tokenization:
    """What makes ids of documents, on whatever worker."""

    config: TokenizeTextConfig
    column_type: ColumnType
    bos_id: int | None
    closing_id: int | None

    def mapped(self, context: RunContext) -> Callable[[list[SourceDocument] | range], list[TokenizedDocument]]:
        """Return what takes documents, or the numbers of those that it reads itself."""
        is_chat = self.column_type == "messages"
        assert self.config.dataset is not None
        settings = Tokenizing(
            column_type=self.column_type,
            d_vocab=context.spec.shape.d_vocab,
            own_bos_id=context.spec.tokenizer.bos_token_id if is_chat else self.bos_id,
            own_closing_id=self.closing_id,
            chat_template=self.config.dataset.chat_template,
            min_tokens=self.config.min_document_tokens,
            max_tokens=self.config.max_document_tokens,
        )
        tokenizer = None if self.column_type == "token_ids" else context.spec.tokenizer
        dataset = self.config.dataset
        corpus = cache(lambda: open_corpus(dataset, self.config.keep_columns, context.base))

        def tokenized(documents: list[SourceDocument] | range) -> list[TokenizedDocument]:
            read = corpus().shard(documents) if isinstance(documents, range) else documents
            return [one for batch in in_batches(read) for one in tokenize(batch, tokenizer, settings)]

        return tokenized


def _note(record: DocumentRow, problems: dict[str, list[str]], meter: Meter) -> None:
    meter.advance(1)
    if record.status is not DocumentStatus.OK:
        named = problems.setdefault(str(record.status), [])
        if len(named) < _PROBLEMS_NAMED:
            named.append(record.id)


def _keep_tokenizer(context: RunContext, folder: RunFolder) -> str | None:
    """Copy the tokenizer into the run, so that its ids can be read as text wherever the run goes."""
    try:
        tokenizer: Any = context.spec.tokenizer
    except ModelLoadError:
        return None
    partial = folder.new_partial("tokenizer")
    tokenizer.save_pretrained(partial)
    if not folder.tokenizer.exists():
        sync_tree(partial)
        move(partial, folder.tokenizer)
    definition = folder.tokenizer / "tokenizer.json"
    return sha256_of(definition) if definition.is_file() else None

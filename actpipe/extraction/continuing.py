"""Continues the prompts of a corpus, part by part."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from actpipe.compute.sampling import Sampling
from actpipe.models.generation import Continuation
from actpipe.models.hooked_model import HookedModel
from actpipe.records import DocumentRow, DocumentStatus, Part, Sequence, TokenIds
from actpipe.schemas.recipe import GenerateTextConfig
from actpipe.stores.continuations import Continuations
from actpipe.stores.token_table import OWN_COLUMNS, TokenTable
from actpipe.streaming import already_done
from actpipe.telemetry import Meter
from actpipe.text.batching import make_batches

_PROMPT = {"prompt_sequence": pa.int64(), "n_prompt_tokens": pa.int64()}
"""Where a continued document came from: the number of the sequence in the other corpus, and its length."""


def prompts_in(tokens: TokenTable, part: Part) -> Iterator[Sequence]:
    """Yield the sequences that begin in a part; the rows of a shared prefix are no prompt."""
    n_prefix = len(tokens.manifest.prefix_ids)
    for sequence in tokens.read_sequences(part.row_start, part.row_stop):
        if sequence.first_row >= part.row_start and sequence.n_context >= n_prefix:
            yield sequence


@dataclass(frozen=True)
class GenerationWorker:
    """Does one part at a time; the same part gives the same tokens, whoever does it."""

    config: GenerateTextConfig
    model: HookedModel
    prompts: TokenTable
    pieces: Continuations
    meter: Meter

    def __call__(self, part: Part) -> Future[None]:
        """Continue every prompt of the part, and keep what was added."""
        new: dict[int, TokenIds] = {}
        n_rows = 0
        prompts = prompts_in(self.prompts, part)
        for batch in make_batches(prompts, self.config.batch_tokens, n_more=self.config.max_new_tokens):
            numbers = [sequence.sequence for sequence in batch.sequences]
            ids = [sequence.ids for sequence in batch.sequences]
            added = self.model.continue_prompts(ids, self._how, numbers=numbers)
            new.update((number, new_ids.astype(np.int32)) for number, new_ids in zip(numbers, added, strict=True))
            n_here = sum(min(sequence.row_stop, part.row_stop) - sequence.first_row for sequence in batch.sequences)
            self.meter.advance(n_here)
            n_rows += n_here
        self.pieces.write(part, {number: new[number] for number in sorted(new)})
        self.meter.advance(part.n_rows - n_rows)  # the end of a prompt that began before, or the prefix
        return already_done()

    @property
    def _how(self) -> Continuation:
        config = self.config
        return Continuation(
            max_new_tokens=config.max_new_tokens,
            sampling=Sampling(config.temperature, config.top_k, config.top_p, config.freq_penalty),
            stop_ids=self.model.eos_ids if config.stop_at_eos else (),
            seed=config.seed,
        )


def kept_columns(prompts: TokenTable) -> dict[str, pa.DataType]:
    """Return the columns that documents of continuations have besides those that all have."""
    schema = prompts.read_documents().schema
    kept = {_renamed(field.name): field.type for field in schema if field.name not in OWN_COLUMNS}
    return {**kept, **_PROMPT}


def _renamed(name: str) -> str:
    return f"source_{name}" if name in _PROMPT else name


def continued(prompts: TokenTable, parts: tuple[Part, ...], pieces: Continuations) -> Iterator[DocumentRow | Sequence]:
    """Yield each prompt with its continuation as a sequence, and as a document of its own."""
    names = prompts.read_documents()
    columns = [name for name in names.column_names if name not in OWN_COLUMNS]
    added = pieces.read(parts)
    number = row = 0
    for part in parts:
        for prompt in prompts_in(prompts, part):
            sequence_number, ids = next(added)
            assert sequence_number == prompt.sequence, "pieces hold the prompts in their order"
            whole = Sequence(
                sequence=number,
                document=number,
                start=prompt.start,
                n_context=prompt.n_context,
                first_row=row,
                ids=np.concatenate([prompt.ids, ids]),
                n_prompt=len(prompt.ids),
            )
            yield whole
            kept = {_renamed(name): names[name][prompt.document].as_py() for name in columns}
            yield DocumentRow(
                document=number,
                id=f"{names['id'][prompt.document].as_py()}:{prompt.sequence}",
                status=DocumentStatus.OK,
                n_tokens=whole.n_tokens,
                n_truncated=0,
                row_start=row,
                row_stop=whole.row_stop,
                columns={**kept, "prompt_sequence": prompt.sequence, "n_prompt_tokens": len(prompt.ids)},
            )
            number, row = number + 1, whole.row_stop

"""Weights -> their singular vectors as tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from actpipe.schemas.choosing import expand_ranges
from actpipe.schemas.weight_analyses import InterpretWeightsConfig

from actpipe.analysis import require_circuits, require_mlps, result_name, run_on_weights
from actpipe.compute.factored import FactoredMatrix
from actpipe.compute.singular import singular_vectors
from actpipe.errors import ModelLoadError, RecipeError
from actpipe.models.prompts import Prompts
from actpipe.models.singular import OF_HEADS, SIDES, open_matrix, open_vocabulary
from actpipe.models.weights import Weights
from actpipe.records import Finding
from actpipe.singular_results import ENDS, spectra, token_lines
from actpipe.stage import RunContext
from actpipe.stores.results import Result, ResultWriter

_MOST_LINES = 2_000_000
_SHOWN = 3


@dataclass(frozen=True)
class InterpretWeights:
    """Say which tokens the singular vectors of heads and MLPs point to, from weights alone."""

    config: InterpretWeightsConfig
    needs: ClassVar[tuple[str, ...]] = ()
    gives: ClassVar[str] = "results"

    def check(self, context: RunContext) -> None:
        """Refuse layers and heads that there are not, models without such matrices, and endless tables."""
        config, shape = self.config, context.spec.shape
        layers = self._chosen(context, "layers", shape.n_layers)
        of_heads = [which for which in config.matrices if which in OF_HEADS]
        if of_heads:
            require_circuits(context, config)
        if len(of_heads) < len(config.matrices):
            require_mlps(context, config, layers)
        n_heads = len(self._chosen(context, "heads", shape.n_heads))
        n_each = sum(len(SIDES[which]) * (n_heads if which in OF_HEADS else 1) for which in config.matrices)
        n_lines = n_each * len(layers) * config.n_vectors * len(ENDS) * config.n_tokens
        if n_lines > _MOST_LINES:
            raise RecipeError(
                f"{result_name(config)} would list {n_lines:,} tokens, at most {_MOST_LINES:,} are; choose `layers`, "
                "`heads` or `matrices`, or fewer `n_vectors` or `n_tokens`"
            )

    def run(self, context: RunContext) -> None:
        """Compute them, unless they are there."""

        def compute(weights: Weights, writer: ResultWriter) -> Result:
            return self._compute(context, weights, writer)

        context.findings.append(_describe(run_on_weights(context, self.config, "singular-vectors", compute)))

    def _chosen(self, context: RunContext, name: str, count: int) -> list[int]:
        wanted = getattr(self.config, name)
        numbers = list(range(count)) if wanted is None else sorted(set(expand_ranges(wanted)))
        if not numbers or numbers[-1] >= count:
            raise RecipeError(
                f"{result_name(self.config)}: `{name}` {list(wanted)} must name some of the {count} of "
                f"{context.spec.source.title}, numbered from 0"
            )
        return numbers

    def _compute(self, context: RunContext, weights: Weights, writer: ResultWriter) -> Result:
        config, shape = self.config, context.spec.shape
        layers, heads = self._chosen(context, "layers", shape.n_layers), self._chosen(context, "heads", shape.n_heads)
        vocabulary = open_vocabulary(weights, shape, config.vocabulary, processed=config.processed)
        pieces, values = list[pd.DataFrame](), dict[str, list[torch.Tensor]]()
        for which in dict.fromkeys(config.matrices):
            for layer in layers:
                matrix = open_matrix(weights, shape, layer, which, processed=config.processed)
                if isinstance(matrix, FactoredMatrix):
                    matrix = matrix[torch.tensor(heads)]
                vectors = singular_vectors(matrix, config.n_vectors)
                values.setdefault(which, []).append(vectors.values)
                pieces += token_lines(which, layer, heads, vectors, vocabulary, config.n_tokens)
        table = pd.concat(pieces, ignore_index=True)
        table["token"] = _texts(context, table["token_id"].to_numpy(np.int64))
        return writer.commit(
            dataset=spectra(values, layers, heads), table=table, summary={"n_vectors": len(_vectors(table))}
        )


def _vectors(table: pd.DataFrame) -> pd.DataFrame:
    """Return the first line of each singular vector."""
    return table[(table["end"] == ENDS[0]) & (table["rank"] == 0)]


def _texts(context: RunContext, ids: npt.NDArray[np.int64]) -> list[str]:
    """Return the text of each id alone; empty where the model has no tokenizer."""
    try:
        tokenizer = context.spec.tokenizer
    except ModelLoadError:
        return [""] * len(ids)
    prompts = Prompts(tokenizer, context.spec.shape.n_ctx, prepend_bos=False)
    unique, places = np.unique(ids, return_inverse=True)
    texts = prompts.pieces(unique.tolist())
    return [texts[place] for place in places.tolist()]


def _describe(result: Result) -> Finding:
    table = result.table
    shown = _vectors(table).sort_values("deviations", ascending=False, kind="stable").head(_SHOWN)
    rows = tuple(
        (str(line.label), f"{line.singular_value:.3f}", f"{line.token!r}", f"{line.value:+.3f}")
        for line in shown.itertuples()
    )
    return Finding(
        "Singular vectors of weights as tokens", ("vector", "singular value", "highest token", "its score"), rows
    )

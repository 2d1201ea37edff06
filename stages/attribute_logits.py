"""Store -> direct attribution of the correct next token's logit (Dask)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
import xarray as xr
from actpipe.schemas.analyses import AttributeLogitsConfig

from actpipe.analysis import require_every_token, require_hooks, require_sum, run_analysis
from actpipe.compute.grouping import GroupSums
from actpipe.compute.residual import residual_components, residual_hook
from actpipe.errors import IdentityError, RecipeError
from actpipe.jobs.attribution import (
    MODEL_LOGIT,
    AttributionWeights,
    Target,
    attribute_store,
    column_labels,
    needed_arrays,
)
from actpipe.jobs.groups import by_column
from actpipe.jobs.residual import components_of
from actpipe.label_choice import require_labels
from actpipe.models.hooked_model import HookedModel
from actpipe.records import Finding
from actpipe.stage import RunContext
from actpipe.stores.reading import ActivationStore
from actpipe.stores.results import Result, ResultWriter, labels
from actpipe.telemetry import Meter
from actpipe.unembedding import folded_unembedding

_ROUNDING = {"float32": 1e-3, "float16": 1e-1, "bfloat16": 1.0}
"""How far the sum may be from the model's own logit, by element type on disk."""


@dataclass(frozen=True)
class AttributeLogits:
    """Share the correct next token's logit out over components and heads."""

    config: AttributeLogitsConfig
    needs: ClassVar[tuple[str, ...]] = ("store",)
    gives: ClassVar[str] = "results"

    def check(self, context: RunContext) -> None:
        """Refuse a store that will lack a component or a head."""
        require_sum(context, self.config, native=True)
        require_every_token(context, self.config)
        if self.config.by is not None:
            require_labels(context, self.config, [self.config.by], "`by`")
        n_layers = context.spec.shape.n_layers
        components = residual_components(context.spec.hook_points, n_layers)
        target = self._target(context)
        require_hooks(context, self.config, needed_arrays(components, n_layers, heads=self.config.heads, target=target))

    def run(self, context: RunContext) -> None:
        """Compute the attribution, unless it is there."""

        def compute(store: ActivationStore, writer: ResultWriter, meter: Meter) -> Result:
            weights = _weights(context.model, heads=self.config.heads)
            return self._compute(store, weights, self._target(context), writer, meter)

        result = run_analysis(context, self.config, "attribution", compute)
        context.findings.append(_describe(result))

    def _whose(self) -> str:
        """Return whose logit it is, for people."""
        target, minus = self.config.target, self.config.minus
        whose = {"next": "the correct next token", "top": "the model's top token"}.get(str(target), f"token {target!r}")
        return whose if minus is None else f"{whose} minus token {minus!r}"

    def _target(self, context: RunContext) -> Target:
        """Return whose logit is meant.

        Raises:
            RecipeError: A text is not one token, or an id is outside the vocabulary.
        """
        wanted = self.config.target
        minus = None if self.config.minus is None else _token_id(context, self.config.minus)
        if wanted in ("next", "top"):
            return Target("next" if wanted == "next" else "top", minus)
        return Target(_token_id(context, wanted), minus)

    def _compute(
        self, store: ActivationStore, weights: AttributionWeights, target: Target, writer: ResultWriter, meter: Meter
    ) -> Result:
        shape = store.shape
        columns = column_labels(components_of(store), shape.n_layers, shape.n_heads, heads=self.config.heads)
        options: dict[str, Any] = {}
        values: list[str] = []
        if self.config.by is not None:
            options["groups"], values = by_column(store, self.config.by)
        if self.config.keep_rows:
            options["keep"] = writer.open_rows(
                "attribution",
                (store.n_rows, len(columns)),
                axes=("row", "component"),
                chunk_rows=store.manifest.rows_per_part,
            )
        options |= {"target": target, "block_bytes": self.config.block_bytes, "done": meter.advance}
        sums = attribute_store(store, weights, **options)
        allowed = _ROUNDING[store.array("hook_embed").manifest.dtype]
        if not sums.worst <= allowed:
            raise IdentityError(
                f"the attributions do not add up to the model's logit: off by {sums.worst:.1e} "
                f"(at most {allowed:.0e} is rounding of what is stored)"
            )
        by_position, total = sums.by_position, sums.by_position.over_all()
        dataset = xr.Dataset(
            {
                "mean_by_position": (("position", "component"), by_position.mean),
                "count": ("position", by_position.count[:, 0].astype(np.int64)),
            },
            coords={"position": np.arange(len(by_position.count)), "component": labels(columns)},
        )
        if self.config.by is not None:
            dataset = dataset.merge(_by_group(sums.by_group, values, columns))
        table = pd.DataFrame(
            {
                "component": columns,
                "kind": [_split_label(column)[0] for column in columns],
                "layer": pd.array([_split_label(column)[1] for column in columns], dtype="Int64"),
                "head": pd.array([_split_label(column)[2] for column in columns], dtype="Int64"),
                "mean": total.mean[0],
                "std": total.std[0],
            }
        )
        is_checked = residual_hook(shape.n_layers) in store or (target.is_models and MODEL_LOGIT in store)
        summary: dict[str, int | float | str] = {"n_rows": int(total.count[0, 0]), "logit": self._whose()}
        if is_checked:
            summary["worst_sum_error"] = sums.worst
        return writer.commit(dataset=dataset, table=table, summary=summary)


def _token_id(context: RunContext, token: int | str) -> int:
    if isinstance(token, str):
        ids = context.spec.tokenizer(token, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise RecipeError(
                f"attribute_logits: {token!r} is {len(ids)} tokens ({ids}); name one token, by its text or its id"
            )
        return int(ids[0])
    if token >= context.spec.shape.d_vocab:
        raise RecipeError(f"attribute_logits: token {token} is outside the vocabulary of {context.spec.shape.d_vocab}")
    return token


def _by_group(sums: GroupSums, values: list[str], columns: list[str]) -> xr.Dataset:
    """Return means by value of a column of documents.parquet; each value is that of a document with rows."""
    return xr.Dataset(
        {
            "mean_by_value": (("value", "component"), sums.mean),
            "std_by_value": (("value", "component"), sums.std),
            "count_by_value": ("value", sums.count[:, 0].astype(np.int64)),
        },
        coords={"value": labels(values), "component": labels(columns)},
    )


def _weights(model: HookedModel, *, heads: bool) -> AttributionWeights:
    weights = model.weights

    def array(tensor: torch.Tensor) -> np.ndarray:
        return tensor.float().cpu().numpy()

    folded = folded_unembedding(model)
    return AttributionWeights(folded, array(weights.W_O) if heads else None, array(weights.b_O) if heads else None)


def _split_label(label: str) -> tuple[str, int | None, int | None]:
    """Return the kind, the layer and the head that a column's label names."""
    if head := re.fullmatch(r"L(\d+)H(\d+)", label):
        return "head", int(head[1]), int(head[2])
    if block := re.fullmatch(r"(\d+)_(\w+)", label):
        return block[2], int(block[1]), None
    return label, None, None


def _describe(result: Result) -> Finding:
    table = result.table[~result.table["kind"].isin(["head", "attn_bias"])]
    rows = tuple((str(row.component), f"{row.mean:+.3f}", f"{row.std:.3f}") for row in table.itertuples())
    error = result.record.summary.get("worst_sum_error")
    note = "" if error is None else f"sum off from the model's own logit by at most {error:.1e}"
    return Finding(
        f"Logit of {result.record.summary['logit']}, by component: {result.record.corpus}",
        ("component", "mean", "std"),
        rows,
        note,
    )

"""Store -> direct attribution of the correct next token's logit, or of others (Dask)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from actpipe.schemas.attribution_analyses import AttributeLogitsConfig, FromColumn, TopTokens

from actpipe.analysis import place_of, require_every_token, require_hooks, require_neurons, require_sum, run_analysis
from actpipe.attribution_results import AttributionResult
from actpipe.compute.residual import residual_components
from actpipe.errors import IdentityError, IncompleteStoreError
from actpipe.jobs.attribution import KeepRows, attribute_store, logits_to_compare, needed_arrays
from actpipe.jobs.attribution_columns import AttributionWeights, Neurons, attribution_columns
from actpipe.jobs.attribution_targets import Target, TokensOfRows
from actpipe.jobs.neuron_attribution import NeuronSums, largest_neurons, sum_neurons
from actpipe.jobs.residual import components_of
from actpipe.lenses import attribution_weights
from actpipe.records import Finding
from actpipe.stage import RunContext
from actpipe.stores.reading import ActivationStore
from actpipe.stores.results import Result, ResultWriter
from actpipe.target_choice import check_targets, choose_grouping, choose_target
from actpipe.telemetry import Meter

_ROUNDING = {"float32": 1e-3, "float16": 1e-1, "bfloat16": 1.0}
"""How far the sum may be from the model's own logit, by element type on disk."""
_SHOWN = 10


@dataclass(frozen=True)
class AttributeLogits:
    """Share a logit of each row out over components, heads and neurons."""

    config: AttributeLogitsConfig
    needs: ClassVar[tuple[str, ...]] = ("store",)
    gives: ClassVar[str] = "results"

    def check(self, context: RunContext) -> None:
        """Refuse a store that will lack a component or a head, and tokens or groups that are not there."""
        config, shape = self.config, context.spec.shape
        require_sum(context, config, native=True)
        if config.target == "next":
            require_every_token(context, config)
        if config.neurons:
            require_neurons(context, config)
        check_targets(context, config)
        components = residual_components(context.spec.hook_points, shape.n_layers)
        target = Target("top") if config.target == "top" or isinstance(config.target, TopTokens) else None
        options: dict[str, Any] = {"heads": config.heads, "neurons": config.neurons > 0, "target": target}
        require_hooks(context, config, needed_arrays(components, shape, **options))

    def run(self, context: RunContext) -> None:
        """Compute the attribution, unless it is there."""

        def compute(store: ActivationStore, writer: ResultWriter, meter: Meter) -> Result:
            columns = [one for one in (self.config.target, self.config.minus) if isinstance(one, FromColumn)]
            target = choose_target(context, self.config, store.documents if columns else None)
            weights = attribution_weights(context.model, heads=self.config.heads, neurons=self.config.neurons > 0)
            return self._compute(store, weights, target, writer, meter)

        result = run_analysis(context, self.config, "attribution", compute)
        context.findings.extend(_describe(result, place_of(result, self.config)))

    def _whose(self) -> str:
        """Return whose logit it is, for people."""
        target, minus = self.config.target, self.config.minus
        if isinstance(target, TopTokens):
            whose = f"the model's top {target.top} tokens"
        elif isinstance(target, FromColumn):
            whose = f"the token in column {target.column!r}"
        else:
            known = {"next": "the correct next token", "top": "the model's top token"}
            whose = known.get(str(target), f"token {target!r}")
        if minus is None:
            return whose
        return f"{whose} minus {f'that in {minus.column!r}' if isinstance(minus, FromColumn) else f'token {minus!r}'}"

    def _compute(
        self, store: ActivationStore, weights: AttributionWeights, target: Target, writer: ResultWriter, meter: Meter
    ) -> Result:
        config = self.config
        options: dict[str, Any] = {"block_bytes": config.block_bytes, "done": meter.advance}
        sizes = [len(branch.W) for branch in weights.mlps or ()]
        neuron_sums: NeuronSums | None = None
        neurons: Neurons = ()
        if config.neurons:
            neuron_sums = sum_neurons(store, weights, target, **options)
            neurons = largest_neurons(neuron_sums.modulus.sum(0), config.neurons, weights.mlps or ())
        grouping = choose_grouping(config, TokensOfRows(store, target, weights.unembedding), done=meter.advance)
        if grouping is not None:
            options["groups"] = grouping.groups
        columns = attribution_columns(
            components_of(store), store.shape, heads=config.heads, neurons=neurons if config.neurons else None
        )
        is_ranked = isinstance(config.target, TopTokens)
        if config.keep_rows:
            options["keep"] = _keeper(writer, store, len(columns), target.n_ranks if is_ranked else None)
        sums = attribute_store(store, weights, target=target, neurons=neurons, **options)
        result = AttributionResult(sums, columns, target.n_ranks, is_ranked, grouping, neuron_sums, sizes)
        if not result.n_rows:
            raise IncompleteStoreError(
                f"attribute_logits: no row of {store.folder.store} has {self._whose()}; choose another `target`, "
                "`minus` or `rows`"
            )
        summary: dict[str, int | float | str] = {"n_rows": result.n_rows, "logit": self._whose()}
        summary["n_rows_left_out"] = store.n_rows - result.n_rows
        allowed = _ROUNDING[store.array("hook_embed").manifest.dtype]
        if logits_to_compare(store, target) is not None:
            summary["worst_sum_error"] = _within(
                sums.worst, allowed, "the attributions do not add up to the model's logit"
            )
        if config.heads:
            what = "the heads of a layer do not add up to what its attention adds to the logit"
            summary["worst_head_error"] = _within(sums.worst_part, allowed, what)
        if neuron_sums is not None:
            what = "the neurons of a layer do not add up to what its MLP adds to the logit"
            summary["worst_neuron_error"] = _within(neuron_sums.worst, allowed, what)
        return writer.commit(dataset=result.dataset, table=result.table, summary=summary)


def _within(error: float, allowed: float, what: str) -> float:
    """Return an error that rounding explains.

    Raises:
        IdentityError: It does not.
    """
    if not error <= allowed:
        raise IdentityError(f"{what}: off by {error:.1e} (at most {allowed:.0e} is rounding of what is stored)")
    return error


def _keeper(writer: ResultWriter, store: ActivationStore, n_columns: int, n_ranks: int | None) -> KeepRows:
    """Return what keeps every row's attributions, and the tokens that they are of."""
    ranks, rank_axis = ((), ()) if n_ranks is None else ((n_ranks,), ("rank",))
    chunk_rows = store.manifest.rows_per_part
    write_rows = writer.open_rows(
        "attribution",
        (store.n_rows, *ranks, n_columns),
        axes=("row", *rank_axis, "component"),
        chunk_rows=chunk_rows,
    )
    write_tokens = writer.open_rows(
        "token_id", (store.n_rows, *ranks), axes=("row", *rank_axis), chunk_rows=chunk_rows, dtype="int32"
    )

    def keep(start: int, rows: np.ndarray, tokens: np.ndarray) -> None:
        write_rows(start, rows if ranks else rows[:, 0])
        write_tokens(start, tokens if ranks else tokens[:, 0])

    return keep


def _describe(result: Result, where: str) -> Iterator[Finding]:
    table, summary = result.table, result.record.summary
    whose = summary["logit"]
    if "rank" in table:
        table = table[table["rank"] == 0]
        whose = f"{whose}, the first of them"
    components = table[~table["kind"].isin(["head", "attn_bias", "neuron", "other_neurons", "mlp_bias"])]
    error = summary.get("worst_sum_error")
    note = "" if error is None else f"sum off from the model's own logit by at most {error:.1e}"
    yield Finding(f"Logit of {whose}, by component: {where}", *_lines(components), note)
    neurons = table[table["kind"] == "neuron"].sort_values("mean_modulus", ascending=False, kind="stable")
    if len(neurons):
        title = f"Logit of {whose}, neurons with the largest mean modulus: {where}"
        yield Finding(title, *_lines(neurons.head(_SHOWN)))


def _lines(table: Any) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    rows = tuple((str(row.component), f"{row.mean:+.3f}", f"{row.std:.3f}") for row in table.itertuples())
    return ("component", "mean", "std"), rows

"""Store -> what each component writes to the residual stream (Dask)."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import Any, ClassVar

from actpipe.schemas.attribution_analyses import DecomposeResidualConfig

from actpipe.analysis import place_of, require_hooks, require_neurons, require_sum, run_analysis
from actpipe.attribution_results import table_of
from actpipe.compute.residual import ResidualSums, residual_components
from actpipe.errors import IdentityError, RecipeError
from actpipe.hooks import ModelShape
from actpipe.jobs.neuron_attribution import largest_neurons, neuron_shares
from actpipe.jobs.residual import components_of, measure_residual
from actpipe.jobs.residual_sources import BranchAt, Column, Source, Stored, Wanted, sources_of
from actpipe.jobs.stacks import accumulated_streams
from actpipe.jobs.written import branch_of
from actpipe.records import Finding
from actpipe.stage import RunContext
from actpipe.stores.reading import ActivationStore
from actpipe.stores.results import Result, ResultWriter
from actpipe.telemetry import Meter

_ROUNDING = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
"""How far the sum may be from the residual stream, relative to its largest entry, by element type on disk."""


@dataclass(frozen=True)
class DecomposeResidual:
    """Measure each component's length and its share of the residual stream."""

    config: DecomposeResidualConfig
    needs: ClassVar[tuple[str, ...]] = ("store",)
    gives: ClassVar[str] = "results"

    def check(self, context: RunContext) -> None:
        """Refuse a layer that is not there, and a store that will lack a component."""
        config, shape = self.config, context.spec.shape
        parted = config.heads or config.neurons > 0
        require_sum(context, config, native=parted)
        last = shape.n_layers - (1 if config.mlp_input else 0)
        if config.layer is not None and config.layer > last:
            what = "no MLP reads it" if config.layer == shape.n_layers else f"the model has {shape.n_layers}"
            raise RecipeError(f"decompose_residual: layer {config.layer} is not one of 0 to {last}: {what}")
        between = f"blocks.{config.layer or 0}.hook_resid_mid"
        if (config.mlp_input or config.incl_mid) and between not in context.spec.hook_points:
            raise RecipeError(
                "decompose_residual: attention and MLP of this model read the same stream, and there is none between "
                "them; leave out `mlp_input` and `incl_mid`"
            )
        if config.neurons:
            require_neurons(context, config)
        components = residual_components(context.spec.hook_points, shape.n_layers, config.layer)
        sources = self._sources(components, shape, context.planned_hooks(config.corpus), _no_weights)
        if not sources:
            raise RecipeError(
                "decompose_residual: nothing writes to this stream but the embeddings, which are left out"
            )
        names = [name for source in sources for name in source.arrays]
        require_hooks(context, config, dict.fromkeys([*names, self._stream(sources, shape)]))

    def run(self, context: RunContext) -> None:
        """Compute the shares, unless they are there."""

        def compute(store: ActivationStore, writer: ResultWriter, meter: Meter) -> Result:
            return self._compute(
                lambda layer, which: branch_of(context.model.weights, store.shape, layer, which), store, writer, meter
            )

        result = run_analysis(context, self.config, "residual", compute)
        context.findings.append(_describe(result, place_of(result, self.config)))

    def _wanted(self, shape: ModelShape, neurons: list[tuple[int, int]]) -> Wanted:
        config = self.config
        return Wanted(
            layer=shape.n_layers if config.layer is None else config.layer,
            attention=config.mode != "mlp",
            mlps=config.mode != "attn",
            embeds=config.incl_embeds,
            mlp_input=config.mlp_input,
            heads=config.heads,
            neurons=neurons if config.neurons else None,
        )

    def _sources(
        self,
        components: list[Any],
        shape: ModelShape,
        stored: Container[str],
        branch_at: BranchAt,
        neurons: list[tuple[int, int]] | None = None,
    ) -> list[Source]:
        config, wanted = self.config, self._wanted(shape, neurons or [])
        if not config.accumulated:
            return sources_of(wanted, components, shape, branch_at)
        options = {"incl_mid": config.incl_mid, "mlp_input": config.mlp_input}
        streams = accumulated_streams(stored, shape.n_layers, wanted.layer, **options)
        layers = {label: int(label.split("_")[0]) for label in streams if label != "final_post"}
        return [Stored(Column(label, "resid", layers.get(label)), hook) for label, hook in streams.items()]

    def _stream(self, sources: list[Source], shape: ModelShape) -> str:
        """Name what parts are compared with."""
        return sources[-1].arrays[0] if self.config.accumulated else self._wanted(shape, []).stream(shape.n_layers)

    def _compute(self, branch_at: BranchAt, store: ActivationStore, writer: ResultWriter, meter: Meter) -> Result:
        config, shape = self.config, store.shape
        options: dict[str, Any] = {"block_bytes": config.block_bytes, "done": meter.advance}
        components = components_of(store, config.layer)
        sources = self._sources(components, shape, store, branch_at)
        stream = self._stream(sources, shape)
        mlps = [one.layer for one in components if one.kind == "mlp_out" and one.layer is not None]
        if config.neurons and mlps:
            branches = [branch_at(layer, "mlp") for layer in mlps]
            shares = neuron_shares(store, branches, stream, **options)
            neurons = largest_neurons(shares, config.neurons, branches)
            sources = self._sources(components, shape, store, branch_at, neurons)
        is_whole = not config.accumulated and self._wanted(shape, []).is_whole
        sums = measure_residual(store, sources, stream, is_whole=is_whole, **options)
        summary: dict[str, int | float | str] = {"n_rows": sums.n_rows, "stream": stream}
        if is_whole:
            allowed = _ROUNDING[store.array(stream).manifest.dtype]
            if not sums.worst <= allowed:
                raise IdentityError(
                    f"the components do not add up to {stream}: off by {sums.worst:.1e} of its size "
                    f"(at most {allowed:.0e} is rounding)"
                )
            summary["worst_sum_error"] = sums.worst
        columns = [column for source in sources for column in source.columns]
        return writer.commit(table=_table(columns, sums), summary=summary)


def _no_weights(*_: Any) -> Any:
    raise AssertionError("names of arrays follow from the model's shape")


def _table(columns: list[Column], sums: ResidualSums) -> Any:
    return table_of(columns).assign(
        mean_norm=sums.norm / sums.n_rows,
        mean_share=sums.share / sums.n_rows,
        mean_cosine=sums.cosine / sums.n_rows,
        variance_share=sums.variance_share,
    )


def _describe(result: Result, where: str) -> Finding:
    summary = result.record.summary
    is_accumulated = bool(result.record.settings.get("accumulated"))
    shown = result.table if is_accumulated else result.table.sort_values("mean_share", ascending=False).head(5)
    rows = tuple(
        (
            str(row.component),
            f"{row.mean_share:.1%}",
            f"{row.variance_share:.1%}",
            f"{row.mean_cosine:+.3f}",
            f"{row.mean_norm:.2f}",
        )
        for row in shown.itertuples()
    )
    error = summary.get("worst_sum_error")
    note = f"of {summary['stream']}"
    if error is not None:
        note += f"; sum of components off by at most {error:.1e} of the stream's size"
    title = "Residual stream by layer" if is_accumulated else "Residual stream, largest components"
    return Finding(f"{title}: {where}", ("component", "share", "of variance", "cosine", "mean norm"), rows, note=note)

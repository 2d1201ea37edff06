"""Store -> directions that tell the values of a label apart, and how well probes do (Dask)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from actpipe.schemas.direction_analyses import FitDirectionsConfig

from actpipe.activation_choice import Choice, choose_activations, whole_rows
from actpipe.analysis import place_of, run_analysis
from actpipe.compute.probing import Fit
from actpipe.direction_results import Found, direction_files, directions_of, results_dataset, results_table
from actpipe.jobs.blocks import require_arrays
from actpipe.jobs.directions import TrainingSums, fit_probe, is_exact, judge, sum_training
from actpipe.jobs.labels import ClassLabels, label_rows
from actpipe.jobs.samples import PooledRows, Rows
from actpipe.label_choice import require_labels
from actpipe.records import Finding
from actpipe.stage import RunContext
from actpipe.stores.documents import RowDocuments
from actpipe.stores.reading import ActivationStore
from actpipe.stores.results import Result, ResultWriter
from actpipe.stores.token_table import TokenTable
from actpipe.telemetry import Meter


@dataclass(frozen=True)
class FitDirections:
    """Fit mean differences, principal axes and probes on some documents, and judge them on the others."""

    config: FitDirectionsConfig
    needs: ClassVar[tuple[str, ...]] = ("store",)
    gives: ClassVar[str] = "results"

    def check(self, context: RunContext) -> None:
        """Refuse activations that will not be stored, labels that are not there, and classes without documents."""
        self._choices(context)
        require_labels(context, self.config, [self.config.label], "the stage")
        folder = context.corpus(self.config)
        if TokenTable.exists(folder):
            self._labels(RowDocuments(TokenTable(folder)))

    def run(self, context: RunContext) -> None:
        """Compute them, unless they are there."""
        choices = self._choices(context)

        def compute(store: ActivationStore, writer: ResultWriter, meter: Meter) -> Result:
            return self._compute(choices, store, writer, meter)

        result = run_analysis(context, self.config, "directions", compute)
        context.findings.append(_describe(result, place_of(result, self.config)))

    def _choices(self, context: RunContext) -> tuple[Choice, ...]:
        return whole_rows(self.config, choose_activations(context, self.config, self.config.hooks))

    def _labels(self, documents: RowDocuments) -> ClassLabels:
        config = self.config
        return label_rows(
            documents,
            config.label,
            classes=config.classes,
            max_classes=config.max_classes,
            fraction=config.validation_fraction,
            seed=config.split_seed,
            is_pooled=config.pool is not None,
        )

    def _compute(self, choices: Sequence[Choice], store: ActivationStore, writer: ResultWriter, meter: Meter) -> Result:
        names = [choice.name for choice in choices]
        require_arrays(store, names, "fit_directions")
        labels = self._labels(store.documents)
        found = [self._fit(self._samples(store, name, labels, meter)) for name in names]
        table = results_table(found, labels)
        return writer.commit(
            dataset=results_dataset(found, labels),
            table=table,
            summary={
                "n_classes": len(labels.classes),
                "best_hook": str(table["hook"][int(table["accuracy"].argmax())]),
                "accuracy": float(table["accuracy"].max()),
                "auc": "exact" if is_exact(labels, self.config.exact_scores) else "scores in bins of 1/128",
            },
            files=direction_files(found, labels),
        )

    def _samples(self, store: ActivationStore, name: str, labels: ClassLabels, meter: Meter) -> Rows:
        config = self.config
        if config.pool is None:
            return Rows(store, name, labels, config.block_bytes, meter.advance)
        return PooledRows(store, name, labels, config.block_bytes, meter.advance, config.pool)

    def _fit(self, rows: Rows) -> Found:
        """Fit everything of one activation, and judge it on the documents that are held out."""
        config = self.config
        sums = sum_training(rows)
        fit = self._probe(rows, sums)
        directions = directions_of(rows.name, sums, fit, config.components)
        options = {"n_bins": config.bins, "exact_scores": config.exact_scores}
        judged = judge(rows, sums, fit.weights, directions.differences, **options)
        control = None
        if config.control:
            shuffled = replace(rows, labels=rows.labels.shuffled(config.split_seed))
            dealt = self._probe(shuffled, sums)
            control = judge(shuffled, sums, dealt.weights, directions.differences, **options)
        return Found(directions, fit, judged, control)

    def _probe(self, rows: Rows, sums: TrainingSums) -> Fit:
        config = self.config
        return fit_probe(
            rows,
            sums,
            is_balanced=config.class_weights == "balanced",
            penalty=config.penalty,
            tolerance=config.tolerance,
            max_iterations=config.max_iterations,
        )


def _describe(result: Result, where: str) -> Finding:
    rows = tuple(
        (
            str(row.hook),
            f"{row.accuracy:.3f}",
            f"{row.balanced_accuracy:.3f}",
            f"{row.majority:.3f}",
            f"{row.control_accuracy:.3f}",
            f"{row.auc:.3f}",
            f"{row.control_auc:.3f}",
            f"{row.calibration_error:.3f}",
        )
        for row in result.table.itertuples()
    )
    return Finding(
        f"Probes of {result.record.settings['label']}, held-out documents: {where}",
        ("activation", "accuracy", "balanced", "largest class", "shuffled", "AUC", "shuffled AUC", "calibration error"),
        rows,
        note=f"{result.record.summary['n_classes']} classes; AUC {result.record.summary['auc']}; directions are in "
        f"{result.files.name}",
    )

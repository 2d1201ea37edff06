"""Model -> how well it does on tasks made on the spot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import xarray as xr
from actpipe.schemas.eval_analyses import EvaluateModelConfig
from actpipe.schemas.results import ResultRecord

from actpipe.compute.evaluating import second_copy
from actpipe.errors import RecipeError
from actpipe.extraction.evaluating import InductionAnswers, NameAnswers, answer_induction, answer_names, stop_id
from actpipe.model_inputs import check_length
from actpipe.records import Finding
from actpipe.stage import RunContext
from actpipe.stores.results import Result, ResultWriter, current_result, labels

_NOT_THE_NUMBERS = {"name", "corpus", "batch_tokens", "stage"}


@dataclass(frozen=True)
class EvaluateModel:
    """Ask the model to repeat random tokens, and to name the indirect object."""

    config: EvaluateModelConfig
    needs: ClassVar[tuple[str, ...]] = ()
    gives: ClassVar[str] = "results"

    def check(self, context: RunContext) -> None:
        """Refuse models that do not predict the next token, and tasks that do not fit it."""
        shape = context.spec.shape
        if not shape.causal or shape.encoder_decoder:
            family = context.spec.anatomy.family.name
            raise RecipeError(
                f"evaluate_model is for models that predict the next token, and this {family} "
                "model sees a text whole; leave the stage out"
            )
        if self.config.induction is not None:
            stop_id(self.config.induction, shape.d_vocab)
            check_length(context, 2 * self.config.induction.length, what="two copies of induction.length")

    def run(self, context: RunContext) -> None:
        """Run the tasks, unless that was done."""
        folder, config = context.corpus(self.config), self.config
        wanted = ResultRecord(
            name=config.name or config.stage,
            kind="evaluation",
            corpus=config.corpus,
            settings={
                **config.model_dump(mode="json", exclude=_NOT_THE_NUMBERS),
                "convention": context.recipe.model.convention,
                "dtype": context.spec.identity.dtype,
            },
            model_fingerprint=context.spec.identity.fingerprint,
        )
        result = current_result(folder, wanted)
        if result is None:
            result = self._evaluate(context, ResultWriter(folder, wanted), wanted.name)
        context.findings.append(_describe(result))

    def _evaluate(self, context: RunContext, writer: ResultWriter, name: str) -> Result:
        config, model = self.config, context.model
        summary: dict[str, float | int | str] = {}
        dataset, rows = xr.Dataset(), []
        with context.telemetry.progress(name, None, "tokens") as meter:
            if config.induction is not None:
                answers = answer_induction(model, config.induction, config.batch_tokens, meter.advance)
                rows += _induction_rows(answers, config.induction.length)
                dataset = dataset.merge(_induction_arrays(answers))
            if config.ioi is not None:
                named = answer_names(model, config.ioi, config.batch_tokens, meter.advance)
                rows += _name_rows(named)
                dataset = dataset.merge(_name_arrays(named))
                summary["ioi_n_distinct"] = named.n_distinct
        for row in rows:
            if row["group"] == "all":
                summary[f"{row['task']}_{row['measure']}"] = row["mean"]
        return writer.commit(dataset=dataset, table=pd.DataFrame(rows), summary=summary)


def _row(task: str, group: str, measure: str, values: Any) -> dict[str, Any]:
    n_values = len(values)
    error = float(values.std(ddof=1) / np.sqrt(n_values)) if n_values > 1 else float("nan")
    mean = float(values.mean()) if n_values else float("nan")
    return {"task": task, "group": group, "measure": measure, "n": n_values, "mean": mean, "standard_error": error}


def _induction_rows(answers: InductionAnswers, length: int) -> list[dict[str, Any]]:
    """Summarize over sequences, of equal length, so that the means are those over tokens."""
    of_sequence = {
        measure: second_copy(values, length).mean(1)
        for measure, values in (("loss", answers.loss), ("accuracy", answers.correct))
    }
    return [_row("induction", "all", measure, values) for measure, values in of_sequence.items()]


def _name_rows(named: NameAnswers) -> list[dict[str, Any]]:
    groups = {"all": np.ones(len(named.template), bool)}
    groups |= {text: named.template == number for number, text in enumerate(named.templates)}
    measures = {"logit_difference": named.logit_difference, "accuracy": (named.logit_difference > 0).astype(np.float64)}
    return [
        _row("ioi", group, measure, values[chosen])
        for group, chosen in groups.items()
        for measure, values in measures.items()
    ]


def _induction_arrays(answers: InductionAnswers) -> xr.Dataset:
    axes = ("sequence", "position")
    return xr.Dataset(
        {"induction_loss": (axes, answers.loss), "induction_correct": (axes, answers.correct)},
        coords={"sequence": np.arange(len(answers.loss)), "position": np.arange(answers.loss.shape[1])},
    )


def _name_arrays(named: NameAnswers) -> xr.Dataset:
    return xr.Dataset(
        {
            "ioi_logit_difference": ("sample", named.logit_difference),
            "ioi_template": ("sample", labels([named.templates[number] for number in named.template])),
        },
        coords={"sample": np.arange(len(named.template))},
    )


def _describe(result: Result) -> Finding:
    table = result.table[result.table["group"] == "all"]
    rows = tuple(
        (str(row.task), str(row.measure).replace("_", " "), f"{row.mean:.4f}", f"{row.standard_error:.4f}")
        for row in table.itertuples(name="Row")
    )
    return Finding(f"Evaluation: {result.record.name}", ("task", "measure", "mean", "standard error"), rows)

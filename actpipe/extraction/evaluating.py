"""Run a model on tasks made on the spot."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from actpipe.compute.evaluating import FIRST_ID, STOP_ID, first_difference, repeated_ids
from actpipe.compute.next_token import next_token_metrics
from actpipe.errors import RecipeError
from actpipe.models.hooked_model import HookedModel
from actpipe.models.taps import UNEMBED_INPUT
from actpipe.schemas.eval_analyses import IndirectObjectConfig, InductionConfig
from actpipe.text.indirect_objects import NAMES, NOUNS, TEMPLATES, NamePrompt, draw_prompts

Floats = npt.NDArray[np.float64]
Done = Callable[[int], None]
_LOGIT_ROWS = 512
"""Rows whose logits are in memory together."""


@dataclass(frozen=True)
class InductionAnswers:
    """Loss (nats) and correctness of every predicted token, `(sequence, predicted)`."""

    loss: Floats
    correct: Floats


@dataclass(frozen=True)
class NameAnswers:
    """Logit differences, right name minus wrong, of prompts, and the template of each."""

    logit_difference: Floats
    template: npt.NDArray[np.int64]
    templates: tuple[str, ...]
    n_distinct: int


def induction_ids(model: HookedModel, config: InductionConfig) -> npt.NDArray[np.int64]:
    """Return the repeated random tokens of the task."""
    wants_bos = config.bos == "overwrite" or (config.bos == "model" and model.prompts.prepend_bos)
    bos = model.prompts.encode("", prepend_bos=True)[0][0, 0] if wants_bos else None
    return repeated_ids(
        n_sequences=config.n_sequences,
        length=config.length,
        first_id=config.first_id,
        stop_id=stop_id(config, model.shape.d_vocab),
        bos_id=None if bos is None else int(bos),
        seed=config.seed,
    )


def stop_id(config: InductionConfig, d_vocab: int) -> int:
    """Return one past the highest id that is drawn.

    Raises:
        RecipeError: There is none.
    """
    stop = min(STOP_ID, d_vocab) if config.stop_id is None else config.stop_id
    if not config.first_id < stop <= d_vocab:
        raise RecipeError(
            f"evaluate_model: no tokens from {config.first_id} up to {stop} among the {d_vocab} of this model; change "
            f"induction.first_id (now {config.first_id}, usually {FIRST_ID}) or induction.stop_id"
        )
    return stop


@torch.no_grad()
def answer_induction(model: HookedModel, config: InductionConfig, batch_tokens: int, done: Done) -> InductionAnswers:
    """Run the model over repeated random tokens."""
    ids = torch.from_numpy(induction_ids(model, config))
    size = max(1, batch_tokens // ids.shape[1])
    found: dict[str, list[torch.Tensor]] = {"loss": [], "correct": []}
    for start in range(0, len(ids), size):
        batch = ids[start : start + size]
        (residual,) = _unembed_inputs(model, batch)
        flat, targets = residual[:, :-1].flatten(0, 1), batch[:, 1:].flatten()
        rows = list(_metrics(model, flat, targets))
        for name, values in found.items():
            values.append(torch.cat([row[name] for row in rows]).view(len(batch), -1).double().cpu())
        done(batch.numel())
    return InductionAnswers(*(torch.cat(values).numpy() for values in found.values()))


def _metrics(model: HookedModel, flat: torch.Tensor, targets: torch.Tensor) -> Iterator[dict[str, torch.Tensor]]:
    for start in range(0, len(flat), _LOGIT_ROWS):
        rows, wanted = (part[start : start + _LOGIT_ROWS] for part in (flat, targets))
        logits = model.conventional(model.unembed(rows))
        yield next_token_metrics(logits, wanted.to(logits.device), ("loss", "correct"))


def _unembed_inputs(model: HookedModel, ids: torch.Tensor) -> list[torch.Tensor]:
    kept: list[torch.Tensor] = []
    with model.capture([UNEMBED_INPUT], lambda _, rows: kept.append(rows.clone()), stop=True) as capture:
        capture.run(**model.inputs_for(ids, None))
    return kept


def name_prompts(config: IndirectObjectConfig) -> tuple[list[NamePrompt], tuple[str, ...]]:
    """Return the prompts of the task, and its templates."""
    templates = config.templates or TEMPLATES
    prompts = draw_prompts(
        n_samples=config.n_samples,
        symmetric=config.symmetric,
        seed=config.seed,
        templates=templates,
        names=config.names or NAMES,
        nouns=NOUNS if config.nouns is None else config.nouns,
    )
    return prompts, templates


@torch.no_grad()
def answer_names(model: HookedModel, config: IndirectObjectConfig, batch_tokens: int, done: Done) -> NameAnswers:
    """Ask the model for the name that comes next, at the first token in which the two differ.

    Prompts of one length run together, without padding.
    """
    prompts, templates = name_prompts(config)
    before, pairs = zip(*(_question(model, prompt, config) for prompt in prompts), strict=True)
    lengths = np.array([len(ids) for ids in before])
    differences = np.empty(len(prompts))
    for length in np.unique(lengths):
        same = np.flatnonzero(lengths == length)
        size = max(1, batch_tokens // int(length))
        for start in range(0, len(same), size):
            chosen = same[start : start + size]
            (residual,) = _unembed_inputs(model, torch.tensor([before[index] for index in chosen]))
            logits = model.conventional(model.unembed(residual[:, -1])).double().cpu().numpy()
            names = np.array([pairs[index] for index in chosen])
            at_names = np.take_along_axis(logits, names, axis=1)
            differences[chosen] = at_names[:, 0] - at_names[:, 1]
            done(int(length) * len(chosen))
    template = np.array([prompt.template for prompt in prompts])
    return NameAnswers(differences, template, templates, len({prompt.right for prompt in prompts}))


def _question(
    model: HookedModel, prompt: NamePrompt, config: IndirectObjectConfig
) -> tuple[list[int], tuple[int, int]]:
    """Return the ids before the first token in which the names differ, and that token of each."""
    bos = None if config.prepend_bos == "model" else config.prepend_bos
    right, wrong = (
        model.prompts.encode(text, prepend_bos=bos, truncate=False)[0][0].tolist()
        for text in (prompt.right, prompt.wrong)
    )
    try:
        place = first_difference(right, wrong)
    except ValueError as error:
        raise RecipeError(
            f"evaluate_model: in {prompt.right!r} and {prompt.wrong!r} one name is the beginning of the other; "
            "choose other `names`"
        ) from error
    if not place:
        raise RecipeError(f"evaluate_model: nothing stands before the name in {prompt.right!r}; choose other templates")
    return right[:place], (right[place], wrong[place])

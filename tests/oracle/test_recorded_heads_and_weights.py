"""Scores of heads, weights, evaluations, encoders: what TransformerLens 2.16 gave, as in `test_recorded_methods`."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from actpipe.schemas.eval_analyses import IndirectObjectConfig, InductionConfig
from recordings import (
    N_HEADS,
    OF_WEIGHTS,
    STACKS,
    TOLERANCE,
    WITH_KEY_GROUPS,
    Call,
    Subject,
    assert_close,
    calls,
    error,
    loaded,
    recorded,
    subject_of,
)
from support import INDUCTION, MODELS

import actpipe
from actpipe import FactoredMatrix, HookedModel
from actpipe.compute.evaluating import second_copy
from actpipe.compute.heads import MEASURES, score_heads
from actpipe.compute.patterns import NAMED_PATTERNS
from actpipe.errors import UnsupportedModelError
from actpipe.extraction.evaluating import answer_names, induction_ids, name_prompts
from actpipe.jobs.heads import score_store_heads
from actpipe.models.circuits import open_circuits, score_circuits, score_compositions
from actpipe.models.processing import process_weights

pytestmark = pytest.mark.usefixtures("no_threads")


def recorded_pattern(name: str, ids: np.ndarray) -> np.ndarray:
    """Return a detection pattern by name, or the custom one of the recording: attention to all alike."""
    if name == "uniform":
        return (np.tril(np.ones((len(ids), len(ids)))) / np.arange(1, len(ids) + 1)[:, None]).astype(np.float32)
    return NAMED_PATTERNS[name].of(ids)


def scores(subject: Subject, sequence: int, pattern: str, **options: bool) -> np.ndarray:
    """Return the scores of all heads in one sequence, `(measure, layer, head)`."""
    wanted = recorded_pattern(pattern, subject.ids[sequence])
    found = [score_heads(attention[sequence], wanted, **options).means for attention in subject.patterns]
    return np.stack(found).transpose(2, 0, 1)


def test_scores_of_heads_are_those_of_detect_head(subject):
    found = calls(subject.family, "detect_head")
    assert len(found) == 64
    n_other = 0
    for call in found:
        options = dict(call.arguments)
        measure, ours = options.pop("error_measure"), scores(subject, options.pop("sequence"), **options)
        difference = np.abs(ours[MEASURES.index(measure)] - call.values)
        if measure == "mul":
            assert difference.max() < TOLERANCE, call.arguments
        else:  # rounded to three decimals in both: what stands in the middle may go either way
            assert difference.max() < 1.1e-3, call.arguments
            n_other += int((difference > TOLERANCE).sum())
    assert n_other <= 2


@pytest.mark.parametrize("options", [{}, {"exclude_bos": True, "exclude_current_token": True}])
def test_scores_of_a_store_are_the_means_of_its_sequences_and_keep_the_options(subject, options):
    both = {"exclude_bos": False, "exclude_current_token": False} | options
    patterns = ("previous_token_head", "induction_head")
    found = score_store_heads(
        subject.store, [NAMED_PATTERNS[name] for name in patterns], (0, 1), **both, block_bytes=2**20
    )
    ours = found.scores

    assert found.n_sequences == 2
    for measure, pattern in ((measure, pattern) for measure in ("mul", "abs") for pattern in patterns):
        theirs = calls(subject.family, "detect_head", error_measure=measure, pattern=pattern, **both)
        found = ours[MEASURES.index(measure), patterns.index(pattern)]
        assert np.abs(found - np.mean([call.values for call in theirs], 0)).max() < (
            1e-4 if measure == "mul" else 1.1e-3
        )


def test_for_a_list_of_prompts_detect_head_drops_what_it_was_asked_for(subject):
    (call,) = calls(subject.family, "detect_head, list of prompts")
    if subject.family == "qwen3":  # `run_with_cache(remove_batch_dim=True)` fails on norms of queries and keys there
        assert call.values is None
        return
    asked_for = {"exclude_bos": True, "exclude_current_token": False}
    ours = score_store_heads(
        subject.store, [NAMED_PATTERNS["induction_head"]], (0, 1), **asked_for, block_bytes=2**20
    ).scores
    plain = [
        one.values
        for one in calls(
            subject.family,
            "detect_head",
            pattern="induction_head",
            error_measure="mul",
            exclude_bos=False,
            exclude_current_token=False,
        )
    ]

    assert call.arguments == {"pattern": "induction_head", "error_measure": "abs", "exclude_bos": True}
    assert_close(np.mean(plain, 0), call.values)
    assert error(ours[MEASURES.index("abs"), 0], call.values) > 0.1


def test_detect_head_with_exclusions_changes_what_the_next_call_finds(subject):
    (call,) = calls(subject.family, "detect_head, after one with exclude_bos")
    first = scores(subject, 0, call.arguments["pattern"], exclude_bos=True)[0]
    second = scores(subject, 0, call.arguments["pattern"])[0]

    assert_close(first, call.values)
    assert error(second, call.values) > 0.005
    (alone,) = calls(subject.family, "detect_head, some heads")
    assert alone.values[1, 2] == pytest.approx(second[1, 2], abs=TOLERANCE)
    assert (np.delete(alone.values.ravel(), N_HEADS + 2) == -1).all()


@pytest.mark.parametrize("family", OF_WEIGHTS)
@pytest.mark.parametrize("processed", [False, True])
def test_composition_scores_are_theirs(family, processed):
    ours = score_compositions(open_circuits(loaded(family).weights, loaded(family).shape, processed=processed))
    for call in calls(family, "all_composition_scores", on="processed" if processed else "native"):
        assert_close(ours["QKV".index(call.arguments["mode"])], call.values, call.arguments)


@pytest.mark.parametrize("family", OF_WEIGHTS)
@pytest.mark.parametrize("processed", [False, True])
def test_copying_and_matching_scores_are_those_of_the_eigenvalues_there(family, processed):
    circuits = open_circuits(loaded(family).weights, loaded(family).shape, processed=processed)
    ours = score_circuits(circuits, n_tokens=1)
    for name in ("ov_copying", "qk_matching"):
        (call,) = calls(family, name, on="processed" if processed else "native")
        assert_close(ours[name], call.values, call.arguments)


def of_matrix(matrix: FactoredMatrix, result: str) -> torch.Tensor:
    """Return what was recorded of a factored matrix of all layers and heads."""
    vector = torch.linspace(-1, 1, matrix.rdim)
    left, right = matrix[1, 0].collapse_r(), matrix[0, 2].collapse_l()
    return {
        "AB": lambda: matrix[1, 2].AB,
        "BA": lambda: matrix.BA,
        "U S": lambda: left @ left.mT,
        "S Vh": lambda: right.mT @ right,
        "S": lambda: matrix.S,
        "eigenvalues": lambda: matrix.eigenvalues,
        "norm": matrix.norm,
        "make_even": lambda: matrix.make_even()[0, 1].AB,
        "T": lambda: matrix.T[0, 3].AB,
        "corner": lambda: matrix.get_corner(2),
        "@ vector": lambda: matrix @ vector,
        "vector @": lambda: vector @ matrix,
        "@ matrix": lambda: (matrix @ (2 * torch.eye(matrix.rdim)[:, :3])).AB,
        "index": lambda: matrix[1, :2, 3, 2:5].AB,
    }[result]()


@pytest.mark.parametrize("family", OF_WEIGHTS)
@pytest.mark.parametrize("name", ["OV", "QK"])
def test_factored_matrices_give_what_they_give_there(family, name):
    matrix = getattr(open_circuits(loaded(family).weights, loaded(family).shape, processed=False), name)
    found = calls(family, "FactoredMatrix", matrix=name)
    assert len(found) == 14
    for call in found:
        ours = of_matrix(matrix, call.arguments["result"]).numpy()
        if np.iscomplexobj(call.values):  # in no order
            assert ours.shape == call.values.shape
            distance = np.abs(ours[..., :, None] - call.values[..., None, :])
            assert max(distance.min(-1).max(), distance.min(-2).max()) < TOLERANCE * max(1, np.abs(ours).max())
        else:
            assert_close(ours, call.values, call.arguments)


@pytest.mark.parametrize("family", OF_WEIGHTS)
@pytest.mark.parametrize("on", ["native", "processed"])
def test_singular_vectors_in_the_vocabulary_are_those_of_the_interpreter(family, on):
    weights = loaded(family).weights.state_dict()
    weights = process_weights(weights, loaded(family).shape) if on == "processed" else weights
    for call in calls(family, "get_singular_vectors", on=on):
        kind, head = call.arguments["vector_type"], call.arguments["head_index"]
        if kind == "OV" and family in WITH_KEY_GROUPS:  # not there: the names of shared values are others
            assert call.values is None
            continue
        if kind == "OV":
            vectors = FactoredMatrix(weights["blocks.1.attn.W_V"][head], weights["blocks.1.attn.W_O"][head]).Vh.T
        else:
            matrix = weights[f"blocks.1.mlp.{'W_in' if kind == 'w_in' else 'W_out'}"]
            matrix = matrix.T * weights.get("blocks.1.ln2.w", 1) if kind == "w_in" else matrix
            vectors = torch.linalg.svd(matrix).Vh
        ours = (vectors[:5] @ weights["unembed.W_U"]).T[:, None].numpy()
        signs = np.sign((ours * call.values).sum((0, 1)))  # a singular vector has none of its own
        assert_close(ours * signs, call.values, call.arguments)


@pytest.fixture(scope="module")
def trained() -> HookedModel:
    return HookedModel.from_pretrained(str(INDUCTION), dtype="float32", device="cpu")


@pytest.mark.parametrize("bos", ["overwrite", "none"])
def test_the_induction_loss_of_the_same_tokens_is_theirs(trained, bos):
    number = ["overwrite", "none"].index(bos)
    (call,) = calls("induction-2l", "induction_loss", prepend_bos=bos == "overwrite")
    ids = recorded("induction-2l")[1][f"induction_loss ids/{number}"].astype(int)
    length = call.arguments["subseq_len"]
    losses = trained.forward(torch.from_numpy(ids), return_type="loss", loss_per_token=True)

    assert_close(second_copy(losses.detach().numpy(), length).mean(), call.values)
    ours = induction_ids(trained, InductionConfig(n_sequences=3, length=length, bos=bos))
    for drawn in (ours, ids):
        assert drawn.shape == (3, 2 * length)
        assert (drawn[:, 1:length] == drawn[:, length + 1 :]).all()
        assert (drawn[:, 0] == drawn[:, length]).any() == (bos == "none")
        assert drawn[:, 1:].min() >= 100


def ask_for_names(trained: HookedModel, call: Call, **options: Any) -> tuple[np.ndarray, list[str]]:
    """Return the logit differences of our prompts of a recorded task, and their texts."""
    task = {name: call.arguments[name] for name in ("templates", "names", "nouns", "symmetric")}
    config = IndirectObjectConfig.model_validate_json(
        json.dumps({**task, "n_samples": 6, "prepend_bos": True, **options})
    )
    found = answer_names(trained, config, 4096, lambda _: None)
    return found.logit_difference, [prompt.right for prompt in name_prompts(config)[0]]


def test_the_answers_to_prompts_with_exchanged_names_are_theirs(trained):
    (call,) = calls("induction-2l", "ioi_eval", symmetric=True)
    differences, texts = ask_for_names(trained, call)

    assert set(texts) == set(call.labels)
    assert len(set(texts)) == 2
    assert_close([differences.mean(), (differences > 0).mean()], call.values)


def test_the_names_dataset_has_one_prompt_there_and_different_ones_here(trained):
    (call,) = calls("induction-2l", "IOIDataset")
    assert call.values == 100
    assert len(call.labels) == 1
    assert len({prompt.right for prompt in name_prompts(IndirectObjectConfig(n_samples=100))[0]}) > 50

    (call,) = calls("induction-2l", "ioi_eval", symmetric=False)
    differences, texts = ask_for_names(trained, call, seed=1)
    assert len(set(call.labels)) == 1
    assert len(set(texts)) == 2
    assert_close(differences[texts.index(call.labels[0])], call.values[0])


def test_stacks_of_an_encoder_are_theirs_but_for_the_one_that_does_not_add_up(tmp_path):
    ids = np.load(MODELS / "bert" / "inputs.npz")["ids"]
    subject = subject_of("bert", ids, tmp_path)
    (streams, *normed), (parts,), (heads,) = (calls("bert", name) for name in (STACKS[1], STACKS[0], STACKS[2]))
    stack, labels = actpipe.accumulated_resid(subject.store)
    results, names = actpipe.stack_head_results(subject.store, subject.model.weights)

    assert (labels, names) == (streams.labels, heads.labels)
    assert_close(subject.by_position(stack)[:, :, -1], streams.values)
    assert_close(subject.by_position(results)[:, :, -1], heads.values)
    assert error(parts.values.sum(0), streams.values[-1]) > 0.5
    with pytest.raises(UnsupportedModelError, match="no sum of"):
        actpipe.decompose_resid(subject.store)
    assert [one.values is None for one in normed] == [True, False]
    for layer in (None, 1):  # `blocks.1.ln1`, by which 2.16 divides, follows attention
        with pytest.raises(UnsupportedModelError, match="bert has no norm that reads the stream"):
            actpipe.accumulated_resid(subject.store, layer, apply_ln=True)


def test_the_decoder_of_t5_sees_later_tokens_there_and_not_here():
    model, inputs = (
        HookedModel.from_pretrained(str(MODELS / "t5"), dtype="float32", device="cpu"),
        np.load(MODELS / "t5" / "inputs.npz"),
    )
    theirs = [call.values for call in calls("t5", "T5 decoder")]
    assert [call.arguments["changed_at"] for call in calls("t5", "T5 decoder")] == [None, 5]
    ours = []
    for change in (0, 3):
        decoder = inputs["decoder_input_ids"].copy()
        decoder[:, 5] = (decoder[:, 5] + change) % model.shape.d_vocab
        logits = model.forward(torch.from_numpy(inputs["ids"]), decoder_input_ids=torch.from_numpy(decoder))
        ours.append(logits.detach().numpy()[:2, :2])

    assert error(theirs[0], theirs[1]) > 0.01
    assert error(ours[0], ours[1]) < 1e-6
    np.testing.assert_allclose(ours[0], inputs["logits"][:2, :2], atol=TOLERANCE)

"""What TransformerLens 2.16's own methods give, recorded, beside what is computed here from a store of the same tokens.

A test takes every recorded call of a method, with its arguments. Values agree to 1e-4 of the largest value of the
call, or to 1e-4 where that is below 1.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache

import dask
import numpy as np
import pytest
import torch
from recordings import (
    BEHIND_A_NORM,
    FAMILIES,
    STACKS,
    Call,
    Subject,
    assert_close,
    calls,
    chosen,
    error,
    place,
    through_the_norm,
)
from support import MODELS

import actpipe
from actpipe.compute.attribution import attribute_components
from actpipe.errors import ActpipeError, IncompleteStoreError
from actpipe.jobs.attribution import attribute_store
from actpipe.jobs.attribution_columns import attribution_columns
from actpipe.jobs.attribution_targets import Target
from actpipe.jobs.residual import components_of
from actpipe.lenses import attribution_weights, lens_of
from actpipe.unembedding import folded_unembedding

pytestmark = pytest.mark.usefixtures("no_threads")

FULL = "get_full_resid_decomposition"


def stacks_of(subject: Subject, method: str) -> Iterator[tuple[Call, np.ndarray, list[str]]]:
    """Yield every recorded call that succeeded there, with our stack and labels; what failed there fails here."""
    weights, stacks = [] if method in STACKS[:2] else [subject.model.weights], []
    for call in calls(subject.family, method):
        options = {name: value for name, value in call.arguments.items() if name != "pos_slice"}
        if (neurons := options.pop("neuron_slice", None)) is not None:
            options["neurons"] = place(neurons)
        if call.values is None:
            with pytest.raises((IncompleteStoreError, ValueError)):
                getattr(actpipe, method)(subject.store, *weights, **options)
        else:
            stacks.append((call, *getattr(actpipe, method)(subject.store, *weights, **options)))
    arrays = dask.compute(*(stack for _, stack, _ in stacks))
    for (call, _, labels), array in zip(stacks, arrays, strict=True):
        yield call, chosen(subject.by_position(array), call.arguments), labels


@pytest.mark.parametrize("method", [*STACKS, FULL])
def test_stacks_and_their_labels_are_those_of_the_activation_cache(subject, method):
    n_compared = 0
    for call, stack, labels in stacks_of(subject, method):
        assert labels == call.labels, call.arguments
        theirs = through_the_norm(subject, call) if subject.family == BEHIND_A_NORM else call.values
        if labels == ["remainder"]:  # at layer 0: the last layer's stream there, the one that enters layer 0 here
            last, first = (subject.stored(f"blocks.{name}") for name in ("1.hook_resid_post", "0.hook_resid_pre"))
            assert_close(chosen(last, call.arguments, 0)[None], theirs)
            theirs = chosen(first, call.arguments, 0)[None]
        assert_close(stack, theirs, call.arguments)
        n_compared += 1
    assert n_compared == sum(call.values is not None for call in calls(subject.family, method)) >= 9


def test_what_the_activation_cache_cannot_stack_is_what_cannot_be_stacked_here():
    failed = {
        (family, method, json.dumps({k: v for k, v in call.arguments.items() if k not in ("pos_slice", "apply_ln")}))
        for family in FAMILIES
        for method in (*STACKS, FULL)
        for call in calls(family, method)
        if call.values is None
    }
    after_the_last = '{"layer": 2, "mlp_input": true, "mode": "all"}'
    between = ('{"layer": null, "incl_mid": true}', '{"layer": 1, "incl_mid": true}', '{"layer": 1, "mlp_input": true}')

    assert failed == {(family, "decompose_resid", after_the_last) for family in FAMILIES} | {
        ("phi", "accumulated_resid", arguments) for arguments in between
    }


def test_heads_behind_a_norm_add_up_here_and_not_there():
    for call in calls(BEHIND_A_NORM, FULL, layer=1, mlp_input=False, expand_neurons=False, apply_ln=False):
        (whole,) = calls(BEHIND_A_NORM, "accumulated_resid", layer=1, incl_mid=False, apply_ln=False)
        assert whole.labels[-1] == "1_pre"
        assert error(call.values.sum(0), whole.values[-1]) > 0.1
    for family in sorted(set(FAMILIES) - {BEHIND_A_NORM}):
        (call,) = calls(family, FULL, layer=1, mlp_input=False, expand_neurons=False, apply_ln=False)
        (whole,) = calls(family, "accumulated_resid", layer=1, incl_mid=False, apply_ln=False)
        assert_close(call.values.sum(0), whole.values[-1])


def test_biases_add_up_as_they_do_there(subject):
    for call in calls(subject.family, "accumulated_bias"):
        if call.values is None:
            with pytest.raises(ActpipeError, match="no weight"):
                actpipe.accumulated_bias(subject.model.weights, **call.arguments)
        else:
            assert_close(actpipe.accumulated_bias(subject.model.weights, **call.arguments), call.values)


def test_a_stack_after_a_norm_is_theirs(subject):
    stack, _ = actpipe.accumulated_resid(subject.store)
    for call in calls(subject.family, "apply_ln_to_stack"):
        options = {name: value for name, value in call.arguments.items() if not name.endswith("slice")}
        ours = actpipe.apply_ln_to_stack(subject.store, stack, **options)
        assert_close(chosen(subject.by_position(ours), call.arguments), call.values, call.arguments)


@pytest.mark.parametrize("metric", ["loss", "correct"])
def test_losses_and_accuracies_of_every_token_are_theirs(subject, metric):
    ours = subject.by_position(subject.store[f"metrics/{metric}"].compute()[None])[0]
    (theirs,) = (
        calls(subject.family, "loss", loss_per_token=True) if metric == "loss" else calls(subject.family, "lm_accuracy")
    )

    assert_close(ours[:, :-1], theirs.values)
    assert np.isnan(ours[:, -1]).all()


def test_mean_losses_with_and_without_padding_are_theirs(subject):
    mask = np.load(MODELS / subject.family / "inputs.npz")["mask"][: len(subject.ids)]
    assert not mask.all()
    for call in calls(subject.family, "loss"):
        if "loss_per_token" not in call.arguments:
            padding = torch.from_numpy(mask) if call.arguments else None
            ours = subject.model.forward(torch.from_numpy(subject.ids), padding, return_type="loss")
            assert_close(ours, call.values, call.arguments)


def test_logits_of_every_stream_at_the_last_ones_scale_are_theirs(subject):
    (call,) = calls(subject.family, "logit_lens")
    lens = lens_of(subject.model, final_scale=True)
    scale = torch.from_numpy(chosen(subject.stored("ln_final.hook_scale"), call.arguments, 0))
    streams, labels = actpipe.accumulated_resid(subject.store)
    cap = subject.store.shape.logit_softcap

    assert labels == call.labels
    for stream, theirs in zip(chosen(subject.by_position(streams), call.arguments), call.values, strict=True):
        rows = torch.from_numpy(stream).flatten(0, 1)
        ours = lens.unembed(lens.norm(rows, scale.flatten(0, 1))).detach().numpy().reshape(theirs.shape)
        assert_close(ours, theirs if cap is None else cap * np.tanh(theirs / cap))


@cache
def attribution(subject: Subject, target: Target) -> dict[str, np.ndarray]:
    """Return what every component and head adds to a logit, `(batch, position)` by label."""
    rows: list[np.ndarray] = []
    attribute_store(
        subject.store,
        attribution_weights(subject.model),
        block_bytes=2**20,
        target=target,
        keep=lambda _, block, __: rows.append(block[:, 0]),
    )
    columns = attribution_columns(components_of(subject.store), subject.store.shape, heads=True)
    labels = [column.label for column in columns]
    return dict(zip(labels, subject.by_position(np.concatenate(rows).T), strict=True))


def asked(subject: Subject, call: Call) -> Target:
    """Return whose logit a recorded call is about; texts of tokens are `t` and the id."""
    if call.arguments["tokens"] == "following":
        return Target("next")
    ids = (call.arguments.get(name) for name in ("tokens", "incorrect_tokens"))
    return Target(*(int(one[1:]) if isinstance(one, str) else one for one in ids))


def shared_out(subject: Subject, call: Call) -> np.ndarray:
    """Return our attribution of a recorded call, for the components of its stack."""
    of_label = attribution(subject, asked(subject, call))
    stack = call.arguments["stack"]
    labels = [
        label
        for label in of_label
        if (label[0] == "L" if stack == "stack_head_results" else label[0] != "L" and not label.endswith("bias"))
    ]
    return chosen(np.stack([of_label[label] for label in labels]), call.arguments)


def known_tokens(call: Call, array: np.ndarray) -> np.ndarray:
    """Return a recorded call's positions that a token follows; the recording has the first one after the last."""
    return array[..., :-1] if call.arguments["tokens"] == "following" and "pos_slice" not in call.arguments else array


def test_logits_are_shared_out_as_with_folded_weights(subject):
    for call in calls(subject.family, "logit_attrs", weights="folded"):
        if subject.family == BEHIND_A_NORM and call.arguments["stack"] == "stack_head_results":
            continue  # heads there are those before the norm behind attention
        ours, theirs = (known_tokens(call, array) for array in (shared_out(subject, call), call.values))
        assert_close(ours, theirs, call.arguments)


def test_centred_weights_share_out_logits_less_their_mean_over_the_vocabulary(subject):
    components, _ = actpipe.decompose_resid(subject.store)
    mean = np.broadcast_to(folded_unembedding(subject.model).directions.mean(0), components.shape[1:])
    scale = subject.store["ln_final.hook_scale"].compute()[:, 0]
    of_mean = subject.by_position(attribute_components(components.compute(), mean, scale).T)

    for call in calls(subject.family, "logit_attrs", weights="processed", stack="decompose_resid"):
        ours = shared_out(subject, call)
        if "incorrect_tokens" not in call.arguments and subject.store.shape.logit_softcap is None:
            ours = ours - chosen(of_mean, call.arguments)
        assert_close(known_tokens(call, ours), known_tokens(call, call.values), call.arguments)


def test_only_here_do_shares_from_native_weights_add_up_to_the_logit(subject):
    logit = subject.model.forward(torch.from_numpy(subject.ids)).detach().numpy()[..., 77]
    constant, cap = attribution(subject, Target(77))["bias"], subject.store.shape.logit_softcap
    (call,) = [
        call
        for call in calls(subject.family, "logit_attrs", weights="native", stack="decompose_resid", tokens=77)
        if "incorrect_tokens" not in call.arguments
    ]

    ours, theirs = (
        total if cap is None else cap * np.tanh(total / cap)
        for total in (shared_out(subject, call).sum(0) + constant, call.values.sum(0) + constant)
    )
    assert_close(ours, logit)
    assert error(theirs, logit) > 0.05

"""Find which modules' outputs add up to what a block does to the residual stream."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch

from actpipe.models.recognition.values import as_norm, one_of, pair_of, same, three_of
from actpipe.models.recognition.watching import Call


def find_branches(
    inside: Sequence[Call], stream: torch.Tensor, added: torch.Tensor, scales: Sequence[float]
) -> tuple[list[Call], float]:
    """Return the calls whose outputs, times a factor, make up `added`, and that factor; none where there are no such.

    Args:
        inside: What ran inside the block, outermost first.
        stream: `(batch, position, d_model)`, what the block took.
        added: What it gave, less the stream.
        scales: Factors to try, in order.
    """
    calls = stream_sized(inside, stream)
    values = flat_outputs(calls)
    for scale in scales:
        found = _one_to_three(values, added.reshape(-1) / scale) or _step_by_step(
            values, [(halfway - stream).reshape(-1) / scale for halfway in [*_halfway(inside, stream), stream + added]]
        )
        if found:
            return sorted((calls[i] for i in found), key=lambda call: call.ended), scale
    return [], 1.0


def stream_sized(inside: Sequence[Call], stream: torch.Tensor) -> list[Call]:
    """Return the calls that gave as many vectors as the stream has, of each value the outermost one."""
    kept: list[Call] = []
    for call in inside:
        if is_stream_sized(call, stream) and not any(same(call.output, other.output) for other in kept):
            kept.append(call)
    return kept


def is_stream_sized(call: Call, stream: torch.Tensor) -> bool:
    """Whether a call gave as many vectors of the same length as the stream has, with or without a batch axis."""
    out = call.output
    return out is not None and out.numel() == stream.numel() and out.shape[-1] == stream.shape[-1]


def flat_outputs(calls: Sequence[Call]) -> torch.Tensor:
    """Return `(call, batch * position * d_model)`, what each call gave."""
    outputs = [call.output.float().reshape(-1) for call in calls if call.output is not None]
    return torch.stack(outputs) if outputs else torch.empty(0)


def mlp_of(branches: Sequence[Call], block_class: str, *, alone: bool) -> Call | None:
    """Return the branch that is the block's MLP: the one that says so, or else the last; none where two say so."""
    named = [branch for branch in branches if _looks_like_mlp(branch, block_class)]
    if named or alone:
        return named[0] if len(named) == 1 else None
    return branches[-1] if branches else None


def _looks_like_mlp(call: Call, block_class: str) -> bool:
    """Whether a module's path or class says that it is an MLP; the model's own name, in every class of it, does not."""
    own = type(call.module).__name__
    shared = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(own, block_class, strict=False))
    own = own[len(list(shared)) :]
    return any(word in f"{call.path} {own}".lower() for word in ("mlp", "moe", "ffn", "feed_forward", "feedforward"))


def _one_to_three(values: torch.Tensor, target: torch.Tensor) -> tuple[int, ...]:
    return one_of(values, target) or pair_of(values, target) or three_of(values, target)


def _halfway(inside: Sequence[Call], stream: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield what the block's norms read, which is where the stream may be seen between two sums."""
    for call in inside:
        if call.input is not None and call.input.shape == stream.shape and as_norm(call) is not None:
            yield call.input


def _step_by_step(values: torch.Tensor, reached: Sequence[torch.Tensor]) -> tuple[int, ...]:
    """Return which rows of `values` lead from one state of the stream to the next; the last state must be reached."""
    found: tuple[int, ...] = ()
    before = torch.zeros_like(reached[-1])
    step: tuple[int, ...] = ()
    for after in reached:
        step = _one_to_three(values, after - before)
        if step and not set(step) & set(found):
            found, before = (*found, *step), after
    return found if torch.equal(before, reached[-1]) else ()

"""Prove the hooks on the very model at hand: each value must agree with the model's own arithmetic.

Every identity computes one activation a second time, from other activations and the weights, and
compares. A name is proven when at least one identity that reads it holds in every layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from actpipe.models.hooked_model import HookedModel
from actpipe.models.law import Law
from actpipe.models.laws import all_laws
from actpipe.models.probe import Probe

_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_TOLERANCE_QUANTISED = 5e-2
"""Kernels for quantised weights may round their inputs to eight bits as well."""
_LONGEST_PROBE = 512
"""Windows beyond this are not probed: the scores of a sequence that long would not fit beside the model."""


@dataclass(frozen=True)
class Outcome:
    """One identity on one model."""

    statement: str
    kinds: tuple[str, ...]
    """The hook points, without layer, that it proves."""
    error: float
    """Largest difference over all layers, relative to the largest value compared."""
    tolerance: float
    where: str
    """Where the largest difference was."""
    layers: tuple[int | None, ...] = (None,)
    """Blocks that it was checked in; None for what is not of a block."""

    @property
    def holds(self) -> bool:
        """Whether the difference is within the tolerance; never so for NaN."""
        return self.error <= self.tolerance


def check_identities(model: HookedModel, ids: torch.Tensor) -> list[Outcome]:
    """Run the model on a probe batch and check every identity that it should satisfy.

    Args:
        model: The model.
        ids: `(batch, position)` token ids, two sequences or more of four tokens or more.

    Returns:
        One outcome per identity; those that do not hold come first.
    """
    probe = Probe(model, ids)
    outcomes = [outcome for law in all_laws(model) if (outcome := _evaluate(law, probe)) is not None]
    return sorted(outcomes, key=lambda outcome: outcome.holds)


def probe_ids(model: HookedModel, length: int = 16) -> torch.Tensor:
    """Return `(2, length)` token ids spread over the vocabulary, the same every time.

    They are longer where that makes them longer than the attention's window.
    """
    generator = torch.Generator().manual_seed(0)
    window = getattr(model.native.config, "sliding_window", None) or getattr(model.native.config, "window_size", None)
    if isinstance(window, int) and length <= window < _LONGEST_PROBE:
        length = window + 4
    length = min(length, model.shape.n_ctx)
    return torch.randint(0, model.shape.d_vocab, (2, length), generator=generator)


def _evaluate(law: Law, probe: Probe) -> Outcome | None:
    """Check a law in every layer that it speaks of; None where there is no such layer."""
    worst, where = 0.0, "everywhere"
    layers = _layers_of(law, probe)
    for layer in layers:
        try:
            left, right = law.sides(probe, layer)
        except LookupError:  # something that it reads is withheld: it proves nothing here
            return None
        except RuntimeError:  # what it reads does not fit together
            left, right = torch.zeros(1), torch.full((1,), torch.inf)
        error = difference(left, right)
        if not error <= worst:
            worst, where = error, f"layer {layer}" if law.per_layer else "the whole model"
    tolerance = 0.0 if law.exact else max(rounding(probe.model), law.least_tolerance)
    checked = tuple(layers) if law.per_layer else (None,)
    return Outcome(law.statement, law.kinds, worst, tolerance, where, checked) if layers else None


def rounding(model: HookedModel) -> float:
    """Return how far two ways to compute the same may lie apart in this model's arithmetic, relative to the largest."""
    quantised = getattr(model.native, "is_quantized", False)
    return max(_TOLERANCE[model.dtype], _TOLERANCE_QUANTISED if quantised else 0.0)


def _layers_of(law: Law, probe: Probe) -> list[int]:
    if not law.per_layer:
        return [0] if all(kind in probe.cache for kind in law.kinds) else []
    return [
        layer
        for layer, block in enumerate(probe.shape.blocks)
        if law.when(block) and all(probe.has(layer, kind) for kind in law.kinds)
    ]


def difference(left: torch.Tensor, right: torch.Tensor) -> float:
    """Return the largest difference relative to the largest finite value of `left`; inf for other shapes or NaN."""
    left, right = left.float(), right.float().to(left.device)
    if left.shape != right.shape:
        return float("inf")
    same = left == right
    difference = torch.where(same, 0.0, (left - right).abs())
    size = left[torch.isfinite(left)].abs().max() if bool(torch.isfinite(left).any()) else torch.ones(())
    worst = difference.max() / size.clamp_min(1e-6)
    return float(worst) if not bool(worst.isnan()) else float("inf")


def unproven(model: HookedModel, outcomes: Sequence[Outcome], names: Sequence[str]) -> dict[str, Outcome]:
    """Return those of `names` that take part in an identity that fails, with that identity.

    A failing identity of the whole model (bare logits, independence of the batch) concerns every name.
    """
    failing = [outcome for outcome in outcomes if not outcome.holds]
    found: dict[str, Outcome] = {}
    for name in names:
        kind = model.hook_points[name].kind
        for outcome in failing:
            if not outcome.kinds or kind in outcome.kinds:
                found[name] = outcome
                break
    return found

"""What the model thinks of the next token: loss, entropy, whether it was right."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int

METRICS = ("loss", "entropy", "correct", "correct_logit")


def next_token_metrics(
    logits: Float[torch.Tensor, "row d_vocab"], targets: Int[torch.Tensor, " row"], wanted: tuple[str, ...]
) -> dict[str, Float[torch.Tensor, " row"]]:
    """Compute metrics of each row's prediction of the token that follows it.

    Args:
        logits: The model's logits, in any floating type; computed in float32.
        targets: Id of the next token, or -1 where there is none.
        wanted: Some of `METRICS`.

    Returns:
        By name, in float32: `loss` (nats, of the target), `entropy` (nats, of the prediction),
        `correct` (1 where the most likely token is the target, else 0), `correct_logit` (of the
        target). NaN where there is no target, the entropy aside.

    Source:
        TransformerLens 2.16, `utils.lm_cross_entropy_loss` and `lm_accuracy`.
    """
    unknown = set(wanted) - set(METRICS)
    if unknown:
        raise ValueError(f"unknown metrics {sorted(unknown)}; there are {METRICS}")
    logits = logits.float()
    absent = targets < 0
    at_target = logits.gather(-1, targets.clamp_min(0)[:, None])[:, 0]
    metrics: dict[str, torch.Tensor] = {}
    if "loss" in wanted or "entropy" in wanted:
        log_total = logits.logsumexp(-1)
        if "loss" in wanted:
            metrics["loss"] = (log_total - at_target).masked_fill(absent, torch.nan)
        if "entropy" in wanted:
            expected = (logits.softmax(-1) * logits).nan_to_num(nan=0.0).sum(-1)
            metrics["entropy"] = log_total - expected
    if "correct" in wanted:
        metrics["correct"] = (logits.argmax(-1) == targets).float().masked_fill(absent, torch.nan)
    if "correct_logit" in wanted:
        metrics["correct_logit"] = at_target.masked_fill(absent, torch.nan)
    return metrics

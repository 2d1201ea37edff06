"""Granite: Llama's layout with a factor on the embedding, on what is added to the stream, and on the logits."""

from actpipe.models.families.entry import llama_layout

FAMILIES = (
    llama_layout(
        "granite",
        "granite",
        embed_scale=lambda config: config.embedding_multiplier,
        branch_scale=lambda config: config.residual_multiplier,
        logit_scale=lambda config: 1 / config.logits_scaling,
    ),
)

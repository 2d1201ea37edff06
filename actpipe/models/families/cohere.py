"""Cohere: parallel blocks, one LayerNorm without bias, scaled logits."""

from actpipe.models.families.entry import llama_layout

FAMILIES = (
    llama_layout(
        "cohere",
        "cohere",
        norm="LN",
        ln2="input_layernorm",
        parallel=True,
        q_norm="self_attn.q_norm",
        k_norm="self_attn.k_norm",
        qk_norm="LN",
        logit_scale=lambda config: config.logit_scale,
    ),
)

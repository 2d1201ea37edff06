"""Gemma 1 to 3: a scaled embedding, RMSNorm with weight 1 + w, from the second on norms after each branch."""

from actpipe.models.families.entry import llama_layout

_SHARED = {"norm_offset": 1.0, "embed_scale": lambda config: config.hidden_size**0.5}
_SANDWICH = {
    "ln1_post": "post_attention_layernorm",
    "ln2": "pre_feedforward_layernorm",
    "ln2_post": "post_feedforward_layernorm",
}

FAMILIES = (
    llama_layout("gemma", "gemma", **_SHARED),
    llama_layout("gemma2", "gemma2", **_SHARED, **_SANDWICH),
    llama_layout(
        "gemma3",
        "gemma3_text",
        q_norm="self_attn.q_norm",
        k_norm="self_attn.k_norm",
        qk_norm_input="heads_first",
        **_SHARED,
        **_SANDWICH,
    ),
)

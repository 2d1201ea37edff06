"""StableLM: LayerNorm, partial rotary, parallel blocks in some sizes."""

from actpipe.models.families.entry import llama_layout

FAMILIES = (
    llama_layout(
        "stablelm",
        "stablelm",
        norm="LN",
        ln2=("post_attention_layernorm", "input_layernorm"),
        parallel=lambda config: config.use_parallel_residual,
        q_norm="self_attn.q_layernorm",
        k_norm="self_attn.k_layernorm",
        qk_norm="LN",
        qk_norm_input="heads_first",
    ),
)

"""OLMo 1 (LayerNorm without weights), OLMo 2 (norms after each branch only) and OLMoE (experts)."""

from actpipe.models.families.entry import llama_layout

_QK_NORM = {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm", "qk_norm_input": "all_heads"}

FAMILIES = (
    llama_layout("olmo", "olmo", norm="LN", norm_epsilon=1e-5),
    llama_layout(
        "olmo2",
        "olmo2",
        ln1=None,
        ln1_post="post_attention_layernorm",
        ln2=None,
        ln2_post="post_feedforward_layernorm",
        **_QK_NORM,
    ),
    llama_layout("olmoe", "olmoe", router="mlp.gate", **_QK_NORM),
)

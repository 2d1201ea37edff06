"""GPT-2 and GPT-BigCode (SantaCoder, StarCoder): LayerNorm, learned positions, q, k and v in one module."""

from actpipe.models.families.entry import fused, gpt_layout, n_heads

FAMILIES = (
    gpt_layout("gpt2", "gpt2", pos_embed="wpe", **fused("attn.c_attn", "columns")),
    gpt_layout(
        "gpt_bigcode",
        "gpt_bigcode",
        pos_embed="wpe",
        n_kv_heads=lambda config: 1 if config.multi_query else n_heads(config),
        **fused("attn.c_attn", lambda config: "columns" if config.multi_query else "grouped"),
    ),
)

"""GPT-NeoX (Pythia): LayerNorm, partial rotary, parallel blocks, q, k and v interleaved by head."""

from actpipe.models.families.entry import Family, Projection, fused

FAMILIES = (
    Family(
        name="gpt_neox",
        model_types=("gpt_neox",),
        norm="LN",
        embed="embed_in",
        blocks="layers",
        final_norm="final_layer_norm",
        ln1="input_layernorm",
        attention="attention",
        **fused("attention.query_key_value", "grouped"),
        out="attention.dense",
        ln2="post_attention_layernorm",
        mlp="mlp",
        w_in=Projection("mlp.dense_h_to_4h"),
        w_out="mlp.dense_4h_to_h",
        rotary=True,
        parallel=lambda config: config.use_parallel_residual,
    ),
)

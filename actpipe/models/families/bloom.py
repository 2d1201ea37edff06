"""Bloom: ALiBi, a norm after the embedding, modules that add the residual stream themselves."""

from actpipe.models.families.entry import Family, Projection, fused

FAMILIES = (
    Family(
        name="bloom",
        model_types=("bloom",),
        norm="LN",
        embed="word_embeddings",
        embed_norm="word_embeddings_layernorm",
        blocks="h",
        final_norm="ln_f",
        ln1="input_layernorm",
        attention="self_attention",
        attn_out="self_attention.dense",
        **fused("self_attention.query_key_value", "grouped"),
        out="self_attention.dense",
        ln2="post_attention_layernorm",
        mlp="mlp.dense_4h_to_h",
        w_in=Projection("mlp.dense_h_to_4h"),
        w_out="mlp.dense_4h_to_h",
        alibi=True,
        sees_attention_by="softmax",
        default_prepend_bos=False,
    ),
)

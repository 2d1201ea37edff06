"""Falcon: three generations in one class, told apart by the configuration; adds to the MLP's output in place."""

from typing import Any

from actpipe.models.families.entry import Family, Layout, Projection, fused, n_heads


def _n_kv_heads(config: Any) -> int:
    if config.new_decoder_architecture:
        return int(config.num_kv_heads)
    return 1 if config.multi_query else n_heads(config)


def _layout(config: Any) -> Layout:
    return "columns" if config.multi_query and not config.new_decoder_architecture else "grouped"


FAMILIES = (
    Family(
        name="falcon",
        model_types=("falcon",),
        norm="LN",
        embed="word_embeddings",
        blocks="h",
        final_norm="ln_f",
        ln1=("ln_attn", "input_layernorm"),
        attention="self_attention",
        **fused("self_attention.query_key_value", _layout),
        out="self_attention.dense",
        ln2=("ln_mlp", "post_attention_layernorm", "input_layernorm"),
        mlp="mlp",
        w_in=Projection("mlp.dense_h_to_4h"),
        w_out="mlp.dense_4h_to_h",
        rotary=lambda config: not config.alibi,
        alibi=lambda config: config.alibi,
        parallel=lambda config: config.new_decoder_architecture or config.parallel_attn,
        n_kv_heads=_n_kv_heads,
        sees_attention_by="softmax",
    ),
)

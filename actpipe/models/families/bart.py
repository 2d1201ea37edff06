"""BART: norms after each sum as in BERT, in an encoder and a decoder."""

from typing import Any

from actpipe.models.families.entry import CrossAttention, Family, Projection, llama_layout


def _stack(name: str, which: str, *model_types: str, **differences: Any) -> Family:
    return llama_layout(
        name,
        *model_types,
        norm="LN",
        embed=f"{which}.embed_tokens",
        embed_scale=lambda config: config.d_model**0.5 if config.scale_embedding else 1.0,
        pos_embed=f"{which}.embed_positions",
        pos_embed_offset=2,
        embed_norm=f"{which}.layernorm_embedding",
        blocks=f"{which}.layers",
        final_norm=None,
        ln1="self_attn_layer_norm",
        out="self_attn.out_proj",
        mlp="fc2",
        w_in=Projection("fc1"),
        w_gate=None,
        w_out="fc2",
        rotary=False,
        post_norm=True,
        **differences,
    )


_DECODER = _stack(
    "bart's decoder",
    "decoder",
    cross=CrossAttention(
        attention="encoder_attn",
        q=Projection("encoder_attn.q_proj"),
        k=Projection("encoder_attn.k_proj"),
        v=Projection("encoder_attn.v_proj"),
        out="encoder_attn.out_proj",
    ),
    ln2="encoder_attn_layer_norm",
    ln3="final_layer_norm",
    n_heads=lambda config: config.decoder_attention_heads,
    n_kv_heads=lambda config: config.decoder_attention_heads,
)

FAMILIES = (
    _stack(
        "bart",
        "encoder",
        "bart",
        ln2="final_layer_norm",
        causal=False,
        task="seq2seq",
        decoder=_DECODER,
        logit_bias="final_logits_bias",
        takes_position_ids=False,
    ),
)

"""Llama and what shares its layout: RMSNorm, rotary, grouped queries, gated MLP."""

from actpipe.models.families.entry import Family, Projection


def _llama_like(name: str, *model_types: str, default_prepend_bos: bool = True) -> Family:
    return Family(
        name=name,
        model_types=model_types,
        norm="RMS",
        embed="embed_tokens",
        blocks="layers",
        final_norm="norm",
        ln1="input_layernorm",
        attention="self_attn",
        q=Projection("self_attn.q_proj"),
        k=Projection("self_attn.k_proj"),
        v=Projection("self_attn.v_proj"),
        out="self_attn.o_proj",
        ln2="post_attention_layernorm",
        mlp="mlp",
        w_in="mlp.up_proj",
        w_gate="mlp.gate_proj",
        w_out="mlp.down_proj",
        rotary=True,
        default_prepend_bos=default_prepend_bos,
    )


FAMILIES = (
    _llama_like("llama", "llama"),
    _llama_like("mistral", "mistral"),
    _llama_like("qwen2", "qwen2", default_prepend_bos=False),
)

"""GPT-2: LayerNorm, learned positions, q, k and v in one Conv1D."""

from actpipe.models.families.entry import Family, Projection

FAMILIES = (
    Family(
        name="gpt2",
        model_types=("gpt2",),
        norm="LN",
        embed="wte",
        pos_embed="wpe",
        blocks="h",
        final_norm="ln_f",
        ln1="ln_1",
        attention="attn",
        q=Projection("attn.c_attn", "columns"),
        k=Projection("attn.c_attn", "columns"),
        v=Projection("attn.c_attn", "columns"),
        out="attn.c_proj",
        ln2="ln_2",
        mlp="mlp",
        w_in="mlp.c_fc",
        w_out="mlp.c_proj",
    ),
)

"""MPT: ALiBi, LayerNorm without biases, an MLP that adds the residual stream itself."""

from actpipe.models.families.entry import Projection, fused, gpt_layout

FAMILIES = (
    gpt_layout(
        "mpt",
        "mpt",
        blocks="blocks",
        final_norm="norm_f",
        ln1="norm_1",
        **fused("attn.Wqkv", "columns"),
        out="attn.out_proj",
        ln2="norm_2",
        mlp="ffn.down_proj",
        w_in=Projection("ffn.up_proj"),
        w_out="ffn.down_proj",
        alibi=True,
        sees_attention_by="softmax",
    ),
)

"""GPT-Neo: learned positions, local and global attention in turn, scores that are not scaled."""

from actpipe.models.families.entry import Projection, gpt_layout

FAMILIES = (
    gpt_layout(
        "gpt_neo",
        "gpt_neo",
        pos_embed="wpe",
        q=Projection("attn.attention.q_proj"),
        k=Projection("attn.attention.k_proj"),
        v=Projection("attn.attention.v_proj"),
        out="attn.attention.out_proj",
        sees_attention_by="softmax",
    ),
)

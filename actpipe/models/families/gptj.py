"""GPT-J and CodeGen: rotary, parallel blocks in which one norm serves attention and MLP."""

from actpipe.models.families.entry import Projection, fused, gpt_layout

_SHARED = {
    "ln2": "ln_1",
    "out": "attn.out_proj",
    "w_in": Projection("mlp.fc_in"),
    "w_out": "mlp.fc_out",
    "rotary": True,
    "parallel": True,
    "sees_attention_by": "softmax",
}

FAMILIES = (
    gpt_layout(
        "gptj",
        "gptj",
        q=Projection("attn.q_proj"),
        k=Projection("attn.k_proj"),
        v=Projection("attn.v_proj"),
        **_SHARED,
    ),
    gpt_layout("codegen", "codegen", **fused("attn.qkv_proj", "codegen"), **_SHARED),
)

"""Phi 1 to 2 (parallel blocks, one LayerNorm) and Phi 3 to 4 (Llama's layout, fused projections)."""

from actpipe.models.families.entry import Projection, fused, llama_layout

FAMILIES = (
    llama_layout(
        "phi",
        "phi",
        norm="LN",
        final_norm="final_layernorm",
        out="self_attn.dense",
        ln2="input_layernorm",
        w_in=Projection("mlp.fc1"),
        w_gate=None,
        w_out="mlp.fc2",
        parallel=True,
        q_norm="self_attn.q_layernorm",
        k_norm="self_attn.k_layernorm",
        qk_norm="LN",
        qk_norm_input="heads_first",
    ),
    llama_layout(
        "phi3",
        "phi3",
        **fused("self_attn.qkv_proj", "columns"),
        w_in=Projection("mlp.gate_up_proj", "second_half"),
        w_gate=Projection("mlp.gate_up_proj", "first_half"),
    ),
)

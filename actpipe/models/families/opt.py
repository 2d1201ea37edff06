"""OPT and XGLM: no MLP module, positions with rows in front, projections directly in the block."""

from actpipe.models.families.entry import Projection, llama_layout

_SHARED = {
    "norm": "LN",
    "pos_embed_offset": 2,
    "ln1": "self_attn_layer_norm",
    "out": "self_attn.out_proj",
    "ln2": "final_layer_norm",
    "mlp": "fc2",
    "w_in": Projection("fc1"),
    "w_gate": None,
    "w_out": "fc2",
    "rotary": False,
}

FAMILIES = (
    llama_layout(
        "opt",
        "opt",
        embed="decoder.embed_tokens",
        pos_embed="decoder.embed_positions",
        blocks="decoder.layers",
        final_norm="decoder.final_layer_norm",
        flat_mlp=True,
        **_SHARED,
    ),
    llama_layout(
        "xglm",
        "xglm",
        pos_embed="embed_positions",
        final_norm="layer_norm",
        embed_scale=lambda config: config.d_model**0.5 if config.scale_embedding else 1.0,
        sees_attention_by="softmax",
        **_SHARED,
    ),
)

"""StarCoder 2: LayerNorm, rotary, grouped queries, a plain MLP."""

from actpipe.models.families.entry import Projection, llama_layout

FAMILIES = (
    llama_layout("starcoder2", "starcoder2", norm="LN", w_in=Projection("mlp.c_fc"), w_gate=None, w_out="mlp.c_proj"),
)

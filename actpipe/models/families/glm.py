"""GLM and GLM-4 (0414): one module for both branches of the MLP; GLM-4 has norms after each branch."""

from actpipe.models.families.entry import Projection, llama_layout

_SHARED = {
    "w_in": Projection("mlp.gate_up_proj", "second_half"),
    "w_gate": Projection("mlp.gate_up_proj", "first_half"),
}

FAMILIES = (
    llama_layout("glm", "glm", **_SHARED),
    llama_layout("glm4", "glm4", ln1_post="post_self_attn_layernorm", ln2_post="post_mlp_layernorm", **_SHARED),
)

"""DeepSeek V2 and V3: queries, keys and values from latent vectors (MLA), experts after the first blocks."""

from actpipe.models.families.entry import latent_size, llama_layout

_LATENT = {"q": None, "k": None, "v": None, "router": "mlp.gate", "d_qk": latent_size}

FAMILIES = (
    llama_layout("deepseek_v2", "deepseek_v2", **_LATENT),
    llama_layout("deepseek_v3", "deepseek_v3", router_scores="sigmoid", **_LATENT),
)

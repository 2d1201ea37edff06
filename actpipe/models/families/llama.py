"""Llama and what shares its layout: RMSNorm, rotary, grouped queries, gated MLP."""

from actpipe.models.families.entry import llama_layout

_QK_NORM = {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}

FAMILIES = (
    llama_layout("llama", "llama"),
    llama_layout("mistral", "mistral"),
    llama_layout("mixtral", "mixtral", router="mlp.gate"),
    llama_layout("smollm3", "smollm3"),
    llama_layout("qwen2", "qwen2", default_prepend_bos=False),
    llama_layout("qwen2_moe", "qwen2_moe", router="mlp.gate", default_prepend_bos=False),
    llama_layout("qwen3", "qwen3", default_prepend_bos=False, **_QK_NORM),
    llama_layout("qwen3_moe", "qwen3_moe", router="mlp.gate", default_prepend_bos=False, **_QK_NORM),
    llama_layout("gpt_oss", "gpt_oss", router="mlp.router", sinks="self_attn.sinks"),
)

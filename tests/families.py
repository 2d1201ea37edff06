"""Tiny models with random weights of every family that has an entry, and of their variants."""

from __future__ import annotations

from typing import Any

import torch

from actpipe.models.hooked_model import HookedModel
from actpipe.models.loading import ModelSource
from actpipe.models.model_class import auto_class

_SIZES = {
    "vocab_size": 199,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
_OLD = {"vocab_size": 199, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 48}
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
_WITH_HEAD_SIZE = {**_GROUPED, "head_dim": 8}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "mlp_only_layers": [0]}
_LATENT = {
    **_SIZES,
    "num_key_value_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
_IN_TURN = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
_FALCON = {**_SIZES, "new_decoder_architecture": False, "multi_query": True, "parallel_attn": True}

_T5 = {
    "vocab_size": 199,
    "d_model": 32,
    "d_kv": 6,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 10,
    "decoder_start_token_id": 0,
}
_BART = {
    "vocab_size": 199,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 40,
    "max_position_embeddings": 64,
}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", _OLD),
    "gpt2, scaled by layer": ("gpt2", {**_OLD, "scale_attn_by_inverse_layer_idx": True}),
    "gpt_bigcode": ("gpt_bigcode", _OLD),
    "gpt_bigcode, multi-head": ("gpt_bigcode", {**_OLD, "multi_query": False}),
    "gpt_neo": (
        "gpt_neo",
        {
            "vocab_size": 199,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 6,
            "max_position_embeddings": 64,
        },
    ),
    "gpt_neox": ("gpt_neox", _SIZES),
    "gpt_neox, sequential": ("gpt_neox", {**_SIZES, "use_parallel_residual": False}),
    "gptj": ("gptj", {**_OLD, "rotary_dim": 4}),
    "codegen": ("codegen", {**_OLD, "rotary_dim": 4}),
    "opt": ("opt", {**_SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "xglm": (
        "xglm",
        {
            "vocab_size": 199,
            "d_model": 32,
            "num_layers": 2,
            "attention_heads": 4,
            "ffn_dim": 48,
            "max_position_embeddings": 64,
        },
    ),
    "bloom": ("bloom", {"vocab_size": 199, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "falcon, 7b": ("falcon", _FALCON),
    "falcon, 40b": ("falcon", {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon, alibi": ("falcon", {**_FALCON, "multi_query": False, "parallel_attn": False, "alibi": True}),
    "mpt": ("mpt", {"vocab_size": 199, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}),
    "llama": ("llama", _GROUPED),
    "llama, biases": ("llama", {**_GROUPED, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {**_WITH_HEAD_SIZE, "sliding_window": 6}),
    "mixtral": ("mixtral", {**_WITH_HEAD_SIZE, "num_local_experts": 4}),
    "smollm3": ("smollm3", {**_GROUPED, "no_rope_layers": [1, 0]}),
    "qwen2": ("qwen2", _GROUPED),
    "qwen2_moe": ("qwen2_moe", {**_GROUPED, **_EXPERTS, "shared_expert_intermediate_size": 24}),
    "qwen3": ("qwen3", _WITH_HEAD_SIZE),
    "qwen3, heads wider than the stream": ("qwen3", {**_GROUPED, "head_dim": 16}),
    "qwen3_moe": ("qwen3_moe", {**_WITH_HEAD_SIZE, **_EXPERTS}),
    "gpt_oss": ("gpt_oss", {**_WITH_HEAD_SIZE, **_IN_TURN, "num_local_experts": 4}),
    "gemma": ("gemma", _WITH_HEAD_SIZE),
    "gemma2": ("gemma2", {**_WITH_HEAD_SIZE, "sliding_window": 6, "query_pre_attn_scalar": 8}),
    "gemma3": ("gemma3_text", {**_WITH_HEAD_SIZE, **_IN_TURN, "query_pre_attn_scalar": 8}),
    "phi": ("phi", {**_SIZES, "partial_rotary_factor": 0.5}),
    "phi, norms": ("phi", {**_SIZES, "qk_layernorm": True}),
    "phi3": ("phi3", {**_GROUPED, "sliding_window": 6}),
    "glm": ("glm", _WITH_HEAD_SIZE),
    "glm4": ("glm4", _WITH_HEAD_SIZE),
    "olmo": ("olmo", _GROUPED),
    "olmo2": ("olmo2", _GROUPED),
    "olmoe": ("olmoe", {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2}),
    "stablelm": ("stablelm", {**_GROUPED, "qk_layernorm": True}),
    "stablelm, parallel": ("stablelm", {**_GROUPED, "use_parallel_residual": True}),
    "cohere": ("cohere", {**_GROUPED, "use_qk_norm": True}),
    "granite": (
        "granite",
        {
            **_GROUPED,
            "residual_multiplier": 0.7,
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
            "attention_multiplier": 0.3,
        },
    ),
    "starcoder2": ("starcoder2", _GROUPED),
    "nemotron": ("nemotron", _WITH_HEAD_SIZE),
    "deepseek_v2": ("deepseek_v2", _LATENT),
    "deepseek_v3": ("deepseek_v3", _LATENT),
    "bert": ("bert", _SIZES),
    "bert, next sentence": ("bert", {**_SIZES, "architectures": ["BertForPreTraining"]}),
    "roberta": ("roberta", _SIZES),
    "xlm-roberta": ("xlm-roberta", _SIZES),
    "camembert": ("camembert", _SIZES),
    "distilbert": (
        "distilbert",
        {"vocab_size": 199, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64},
    ),
    "t5": ("t5", _T5),
    "t5, gated": ("t5", {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "mt5": ("mt5", _T5),
    "bart": ("bart", _BART),
    "bart, scaled": ("bart", {**_BART, "scale_embedding": True}),
}


def build(name: str, dtype: torch.dtype = torch.float32) -> HookedModel:
    """Return a tiny model; norms and biases are not those that training begins with."""
    from transformers import AutoConfig

    model_type, settings = CONFIGS[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **settings)
    native = auto_class(config).from_config(config).eval()
    with torch.no_grad():
        for parameter in native.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2 if parameter.ndim == 1 else 0.1)
    return HookedModel(native.to(dtype).requires_grad_(False), ModelSource(name))

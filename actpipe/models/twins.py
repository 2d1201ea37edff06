"""A model's small twin: the same code and the same switches, few and random weights.

What a forward pass does to what can be tried on the twin in a moment, before the model itself is loaded.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from actpipe.errors import UnsupportedModelError
from actpipe.models.anatomy import told
from actpipe.models.model_class import auto_class

WINDOW = 6
"""Windows, chunks and top-k of a twin; probes are longer."""

_SIZES = {
    199: "vocab_size vocab_size_per_layer_input",
    64: "max_position_embeddings n_positions max_seq_len seq_length max_sequence_length n_ctx "
    "attention_hidden_size mamba_d_ssm",
    48: "intermediate_size ffn_dim n_inner d_ff dff ffn_hidden_size encoder_ffn_dim decoder_ffn_dim d_inner "
    "shared_intermediate_size dense_intermediate_size block_ff_dim",
    32: "hidden_size d_model n_embd embed_dim dim emb_dim word_embed_proj_dim embedding_size embedding_dim lru_width "
    "hidden_dim index_n_heads",
    16: "moe_intermediate_size moe_ffn_hidden_size expert_ffn_hidden_size shared_expert_intermediate_size "
    "expert_intermediate_size kv_lora_rank moe_shared_expert_intermediate_size attention_head_dim",
    12: "q_lora_rank qk_head_dim",
    8: "head_dim d_kv kv_channels swa_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim "
    "global_head_dim mamba_head_dim mamba_d_head mamba_headdim index_head_dim v_head_dim qk_nope_head_dim "
    "swa_v_head_dim hidden_size_per_layer_input mamba_n_heads mamba_num_heads n_mamba_heads "
    "mamba_chunk_size chunk_size",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads attention_heads "
    "num_experts n_routed_experts num_local_experts moe_num_experts linear_num_key_heads linear_num_value_heads "
    "linear_num_heads qk_rope_head_dim rotary_dim",
}
_LIMITS = {
    WINDOW: "sliding_window window_size index_topk attention_chunk_size local_window_size attention_window_size",
    2: "num_experts_per_tok moe_topk num_experts_per_token moe_k top_k_experts moe_top_k n_groups mamba_n_groups "
    "mamba_ngroups",
    1: "n_group topk_group",
}
_SMALL = {name: size for size, names in _SIZES.items() for name in names.split()}
_AT_MOST = {name: size for size, names in _LIMITS.items() for name in names.split()}
_HEADS = ["num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"]
_KEY_HEADS = ["num_key_value_heads", "n_head_kv", "num_kv_heads", "kv_n_heads", "multi_query_group_num"]
_TOKENS = ["bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"]


def build_twin(config: Any, *, trust_remote_code: bool = False, seed: int = 0) -> PreTrainedModel:
    """Build the twin of a configuration, in float32 on the CPU, with every parameter random.

    Raises:
        UnsupportedModelError: The library cannot build it from a configuration alone.
    """
    small = shrink(config)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            native: PreTrainedModel = auto_class(small).from_config(small, trust_remote_code=trust_remote_code)
            native = native.float().eval().requires_grad_(False)
            shake(native)
    except Exception as error:  # whatever foreign code raises, the reason is what a user can act on
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise refusal(config, "no small one of this configuration can be built to find out", reason) from error
    return native


def twin_ids() -> torch.Tensor:
    """Return ids to try a twin with: more positions than any window or top-k of it, and no other size of it."""
    return torch.randint(2, _SMALL["vocab_size"], (2, 4 * WINDOW - 1), generator=torch.Generator().manual_seed(0))


def refusal(config: Any, what: str, reason: str) -> UnsupportedModelError:
    """Return the error of a model without an entry that its twin does not explain; the reason stands last."""
    return UnsupportedModelError(
        f"no entry says where the parts of a {config.model_type!r} model are, and {what}: {reason}"
    )


def shrink(config: Any) -> Any:
    """Return a copy of a configuration with the same switches, layers and ratios, and small sizes."""
    small = copy.deepcopy(config)
    for part in _parts(small):
        _shrink_in_place(part)
    small.dtype = torch.float32
    return small


def _parts(config: Any) -> Iterator[Any]:
    yield config
    for name in getattr(config, "sub_configs", None) or {}:
        part = getattr(config, name, None)
        if part is not None:
            yield from _parts(part)


def _shrink_in_place(config: Any) -> None:
    _share_keys_alike(config)
    for name, size in _SMALL.items():
        unsaid = name.endswith(("head_dim", "d_head")) and (_lacks(config, name) or vars(config).get(name) == "auto")
        if _size(config, name) or unsaid:
            _set(config, name, size)
    for name, most in _AT_MOST.items():
        if _size(config, name):
            _set(config, name, min(most, _size(config, name)))
    if _size(config, "qk_rope_head_dim"):
        _set(config, "head_dim", _SMALL["qk_rope_head_dim"])
    if _size(config, "expand") and _size(config, "num_heads"):
        _set(config, "num_heads", config.expand * config.hidden_size // config.head_dim)
    for name in _TOKENS:
        if _size(config, name) >= _SMALL["vocab_size"]:
            _set(config, name, 1)


def _share_keys_alike(config: Any) -> None:
    """Let as many heads share keys as before: all, some or none."""
    heads = next((_size(config, name) for name in _HEADS if _size(config, name)), 0)
    for name in _KEY_HEADS:
        n = _size(config, name)
        if n or _lacks(config, name):
            _set(config, name, _SMALL["num_heads"] if n in (heads, 0) else min(n, 2))


def _size(config: Any, name: str) -> int:
    """Return a size that a configuration has, 0 where it has none."""
    return told(config, name) or 0


def _lacks(config: Any, name: str) -> bool:
    """Whether a configuration has a size's name without a value."""
    return name in vars(config) and vars(config)[name] is None


def _set(config: Any, name: str, value: int) -> None:
    """Set what can be set; some names are worked out from others, or belong to single layers."""
    with suppress(AttributeError, ValueError, NotImplementedError, RuntimeError):
        setattr(config, name, value)


def shake(native: nn.Module) -> None:
    """Give every parameter, and every learned bias in a buffer, values that matter, so that no wrong reading is unseen.

    Libraries start norms at one, biases and gates at zero: a norm that was read wrong would look right.
    """
    for name, parameter in native.named_parameters():
        if not parameter.is_floating_point():
            continue
        if parameter.ndim >= 2:
            parameter.data.normal_(std=0.5 * parameter.shape[-1] ** -0.5 if "embed" not in name else 0.5)
        else:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    for name, buffer in native.named_buffers():
        if name.endswith("bias") and buffer.ndim == 1 and buffer.is_floating_point():
            buffer.add_(torch.randn_like(buffer) * 0.1)

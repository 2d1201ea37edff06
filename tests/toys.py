"""A language model of our own whose blocks do what is asked of them; it keeps what it computed, as the truth."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


class ToyConfig(PretrainedConfig):
    model_type = "toy"
    ways: tuple = ()
    """What the blocks do beside the usual; see `ToyBlock`."""
    vocab_size: int = 199
    hidden_size: int = 32
    num_hidden_layers: int = 3
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    other_num_key_value_heads: int = 4
    head_dim: int = 8
    intermediate_size: int = 48
    sliding_window: int = 6
    tie_word_embeddings: bool = False


class ToyNorm(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), 1e-6

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


def attend(module, query, key, value, attention_mask, scaling, s_aux=None, **_):
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-1, -2) * scaling + attention_mask
    if s_aux is not None:
        scores = torch.cat([scores, s_aux.view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)], dim=-1)
    pattern = scores.softmax(-1)[..., : key.shape[2]]
    module.truth = {"attn.hook_pattern": pattern}
    return (pattern @ value).transpose(1, 2), pattern


class ToyAttention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.config, self.layer, self.size = config, layer, config.head_dim
        n_heads, n_keys = config.num_attention_heads, config.num_key_value_heads
        if "more key heads in one layer" in config.ways and layer == 1:
            n_keys = config.other_num_key_value_heads
        self.q_proj = nn.Linear(config.hidden_size, n_heads * self.size)
        self.k_proj = nn.Linear(config.hidden_size, n_keys * self.size)
        self.v_proj = nn.Linear(config.hidden_size, n_keys * self.size)
        self.o_proj = nn.Linear(n_heads * self.size, config.hidden_size)
        self.gate = nn.Linear(config.hidden_size, n_heads * self.size)
        sinks = "sinks in one layer" in config.ways and layer == 1
        self.sinks = nn.Parameter(torch.zeros(n_heads)) if sinks else None

    def mask(self, length):
        distance = torch.arange(length)[:, None] - torch.arange(length)
        allowed = distance >= 0
        if "window in one layer" in self.config.ways and self.layer == 1:
            allowed = allowed & (distance < self.config.sliding_window)
        if "looks ahead" in self.config.ways:
            allowed = distance >= -1
        return torch.zeros(length, length).masked_fill(~allowed, torch.finfo(torch.float32).min)[None, None]

    def forward(self, hidden_states):
        ways, heads = self.config.ways, (*hidden_states.shape[:2], -1, self.size)
        q, k, v = (f(hidden_states).view(heads) for f in (self.q_proj, self.k_proj, self.v_proj))
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, attend)
        mask, more = self.mask(hidden_states.shape[1]), {"s_aux": self.sinks}
        if "passes a tensor" in ways:
            more["indices"] = torch.zeros(1)
        z, _ = attention(self, *(x.transpose(1, 2) for x in (q, k, v)), mask, scaling=self.size**-0.5, **more)
        self.truth |= {"attn.hook_q": q, "attn.hook_k": k, "attn.hook_v": v, "attn.hook_z_ungated": z}
        if "gate" in ways:
            z = z * self.gate(hidden_states).view(heads).sigmoid()
        self.truth["attn.hook_z"] = z
        return self.o_proj(z.flatten(2))


class ToyMLP(nn.Module):
    def __init__(self, size, width):
        super().__init__()
        self.up, self.down = nn.Linear(size, width), nn.Linear(width, size)

    def forward(self, x):
        self.truth = {"mlp.hook_pre": self.up(x)}
        return self.down(self.truth["mlp.hook_pre"].relu())


class ToyBlock(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.ways, self.layer = config.ways, layer
        width = config.intermediate_size + (8 * layer if "wider in every layer" in config.ways else 0)
        self.norm1, self.norm2 = ToyNorm(config.hidden_size), ToyNorm(config.hidden_size)
        self.attention, self.mlp = ToyAttention(config, layer), ToyMLP(config.hidden_size, width)
        self.side = nn.Linear(config.hidden_size, config.hidden_size) if "adds after its MLP" in self.ways else None
        n_more = 2 if "three MLPs" in config.ways else 0
        self.more = nn.ModuleList(ToyMLP(config.hidden_size, width) for _ in range(n_more))

    def forward(self, hidden_states):
        if "adds what no module puts out" in self.ways:
            hidden_states = hidden_states + 0.1 * hidden_states.sin()
        attn_out = self.attention(self.norm1(hidden_states))
        mid = hidden_states * (0.9 if "scales the stream" in self.ways else 1.0) + attn_out
        if "adds so in one layer" in self.ways and self.layer == 1:
            mid = mid + 0.1 * mid.sin()
        mlp_out = self.mlp(self.norm2(mid))
        self.truth = {"hook_attn_out": attn_out, "hook_mlp_out": mlp_out, "hook_resid_mid": mid}
        after = mid + mlp_out
        if self.side is not None:
            self.truth["side.hook_out"] = self.side(after)
            after = after + self.truth["side.hook_out"]
        for number, mlp in enumerate(self.more):
            self.truth[f"more.{number}.hook_out"] = mlp(self.norm2(after))
            after = after + self.truth[f"more.{number}.hook_out"]
        return after


class ToyModel(PreTrainedModel):
    config_class = ToyConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        blocks = [ToyBlock(config, layer) for layer in range(config.num_hidden_layers)]
        self.blocks = nn.ModuleList(blocks[:1] * len(blocks) if "one block for all" in config.ways else blocks)
        self.norm = ToyNorm(config.hidden_size)
        self.post_init()

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class ToyForCausalLM(PreTrainedModel):
    config_class = ToyConfig
    base_model_prefix = "model"

    def __init__(self, config):
        super().__init__(config)
        self.model = ToyModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, attention_mask=None, **_: Any):
        return CausalLMOutput(logits=self.lm_head(self.model(input_ids)))

    def truth(self, layer):
        """Return what one block computed in the last run, by kind of hook point."""
        block = self.model.blocks[layer]
        return {**block.truth, **block.attention.truth, **block.mlp.truth}


AutoConfig.register("toy", ToyConfig)
AutoModelForCausalLM.register(ToyConfig, ToyForCausalLM)

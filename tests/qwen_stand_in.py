"""A small stand-in laid out as the first Qwen is, whose own code this version of transformers does not run."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from toys import ToyNorm
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class QwenConfig(PretrainedConfig):
    model_type = "qwen_stand_in"
    vocab_size: int = 199
    hidden_size: int = 32
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    kv_channels: int = 8
    intermediate_size: int = 48
    max_position_embeddings: int = 64
    tie_word_embeddings: bool = False


class Attention(nn.Module):
    """One module for queries, keys and values, with a bias; rotary over whole heads; a softmax of its own."""

    def __init__(self, config):
        super().__init__()
        self.num_heads, self.head_dim = config.num_attention_heads, config.kv_channels
        width = self.num_heads * self.head_dim
        self.c_attn = nn.Linear(config.hidden_size, 3 * width)
        self.c_proj = nn.Linear(width, config.hidden_size, bias=False)

    def rotate(self, x):
        half = self.head_dim // 2
        angles = torch.arange(x.shape[1])[:, None] * 10000.0 ** (-torch.arange(half) / half)
        cos, sin = (torch.cat([f(angles)] * 2, dim=-1)[:, None] for f in (torch.cos, torch.sin))
        return x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (self.num_heads, self.head_dim)) for part in self.c_attn(x).chunk(3, dim=-1))
        q, k, v = self.rotate(q).transpose(1, 2), self.rotate(k).transpose(1, 2), v.transpose(1, 2)
        scores = torch.matmul(q, k.transpose(-1, -2)) / self.head_dim**0.5
        ahead = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        pattern = nn.functional.softmax(scores.masked_fill(ahead, torch.finfo(scores.dtype).min), dim=-1)
        return self.c_proj(torch.matmul(pattern, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """`w2` is the gate; each branch has half of the configuration's size."""

    def __init__(self, config):
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size // 2, bias=False)
        self.w2 = nn.Linear(config.hidden_size, config.intermediate_size // 2, bias=False)
        self.c_proj = nn.Linear(config.intermediate_size // 2, config.hidden_size, bias=False)

    def forward(self, x):
        return self.c_proj(self.w1(x) * nn.functional.silu(self.w2(x)))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1, self.ln_2 = ToyNorm(config.hidden_size), ToyNorm(config.hidden_size)
        self.attn, self.mlp = Attention(config), MLP(config)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return (x + self.mlp(self.ln_2(x)),)


class QwenModel(PreTrainedModel):
    config_class = QwenConfig

    def __init__(self, config):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.h = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.ln_f = ToyNorm(config.hidden_size)
        self.post_init()

    def forward(self, input_ids):
        x = self.wte(input_ids)
        for block in self.h:
            (x,) = block(x)
        return self.ln_f(x)


class QwenForCausalLM(PreTrainedModel):
    config_class = QwenConfig
    base_model_prefix = "transformer"

    def __init__(self, config):
        super().__init__(config)
        self.transformer = QwenModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.transformer.wte

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, **_: Any):
        return CausalLMOutput(logits=self.lm_head(self.transformer(input_ids)))


AutoConfig.register("qwen_stand_in", QwenConfig)
AutoModelForCausalLM.register(QwenConfig, QwenForCausalLM)

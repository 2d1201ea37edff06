"""Nemotron: LayerNorm with weight 1 + w, a plain MLP."""

from actpipe.models.families.entry import llama_layout

FAMILIES = (llama_layout("nemotron", "nemotron", norm="LN", norm_offset=1.0, w_gate=None),)

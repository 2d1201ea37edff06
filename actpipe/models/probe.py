"""One forward pass with every hook, as the laws read it."""

from __future__ import annotations

import torch

from actpipe.models.capture import uncompiled
from actpipe.models.hooked_model import HookedModel

COPIES = ("hook_attn_in", "hook_q_input", "hook_k_input", "hook_v_input")


class Probe:
    """What the laws read: one forward pass with every hook, one without, and the weights."""

    def __init__(self, model: HookedModel, ids: torch.Tensor) -> None:
        self.model = model
        self.shape = model.shape
        self.ids = ids.to(model.device)
        with uncompiled(model.native):
            self.bare = model.forward(ids)
        # Copies are n_heads times the stream: one layer's are enough to show what they are.
        names = [name for name, point in model.hook_points.items() if point.kind not in COPIES or point.layer == 0]
        self.logits, self.cache = model.run_with_cache(ids, names=names)
        half = ids[:1, : max(1, ids.shape[1] // 2)]
        self.alone = model.run_with_cache(half, names=["blocks.*.hook_resid_post"])[1]

    def get(self, layer: int, kind: str) -> torch.Tensor:
        """Return an activation of one block in float32."""
        return self.cache[f"blocks.{layer}.{kind}"].float()

    def has(self, layer: int, kind: str) -> bool:
        """Whether the block has it."""
        return f"blocks.{layer}.{kind}" in self.cache

    def weight(self, layer: int, kind: str) -> torch.Tensor:
        """Return a weight of one block in float32, where the activations are."""
        return self.model.weights[f"blocks.{layer}.{kind}"].float().to(self.cache["hook_embed"].device)

    def second_input(self, layer: int) -> torch.Tensor:
        """Return what the MLP's side of the block reads."""
        return self.get(layer, "hook_resid_pre" if self.shape.blocks[layer].parallel else "hook_resid_mid")

    def normed(self, prefix: str, layer: int | None) -> torch.Tensor:
        """Return what a norm puts out, with weight and bias, from `hook_normalized`."""
        name = prefix if layer is None else f"blocks.{layer}.{prefix}"
        normalized = self.cache[f"{name}.hook_normalized"].float()
        return normalized if self.shape.norm == "LN" else normalized * self._weight(f"{name}.w")

    def attention_input(self, layer: int) -> torch.Tensor:
        """Return what q, k and v are projections of."""
        return self.normed("ln1", layer) if self.shape.blocks[layer].ln1 else self.get(layer, "hook_resid_pre")

    def mlp_input(self, layer: int) -> torch.Tensor:
        """Return what the MLP's first projections, or the router, read."""
        return self.normed("ln2", layer) if self.shape.blocks[layer].ln2 else self.second_input(layer)

    def renormalized(self, source: torch.Tensor, name: str) -> torch.Tensor:
        """Return `hook_normalized` as the scale and the norm's own input give it."""
        scale = self.cache[f"{name}.hook_scale"].float()
        if self.shape.norm == "RMS":
            return source / scale
        centered = source - source.mean(-1, keepdim=True)
        return centered / scale * self._weight(f"{name}.w") + self._weight(f"{name}.b")

    def rotated_from(self, layer: int, which: str) -> torch.Tensor:
        """Return queries or keys as rotary gets them: `(batch, position, head, d_qk)`."""
        plain = self.get(layer, f"attn.hook_{which}")
        if self.shape.blocks[layer].qk_norm == "none":
            return plain
        normalized = self.get(layer, f"attn.{which}_norm.hook_normalized")
        scaled = normalized * self.weight(layer, f"attn.{which}_norm.w") + self.weight(layer, f"attn.{which}_norm.b")
        return scaled.reshape(plain.shape)

    def repeated(self, heads: torch.Tensor, layer: int) -> torch.Tensor:
        """Repeat key or value heads for the queries that share them."""
        return heads.repeat_interleave(self.shape.blocks[layer].n_heads // heads.shape[2], dim=2)

    def _weight(self, name: str) -> torch.Tensor:
        return self.model.weights[name].float().to(self.cache["hook_embed"].device)

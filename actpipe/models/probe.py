"""One forward pass with every hook, as the laws read it."""

from __future__ import annotations

from contextlib import ExitStack
from functools import cached_property, partial
from typing import Any

import torch

from actpipe.models.anatomy import find_part
from actpipe.models.capture import uncompiled
from actpipe.models.hooked_model import HookedModel

COPIES = ("hook_attn_in", "hook_q_input", "hook_k_input", "hook_v_input")


class Probe:
    """What the laws read: one forward pass with every hook, one without, and the weights."""

    def __init__(self, model: HookedModel, ids: torch.Tensor) -> None:
        self.model = model
        self.shape = model.shape
        self.ids = ids.to(model.device)
        self.others = other_inputs(model, self.ids)
        with uncompiled(model.native):
            self.bare = model.forward(ids, **self.others)
        # Copies are n_heads times the stream: one layer's are enough to show what they are.
        first = next((layer for layer, block in enumerate(model.shape.blocks) if block.attention), 0)
        names = [name for name, point in model.hook_points.items() if point.kind not in COPIES or point.layer == first]
        self.logits, self.cache = model.run_with_cache(ids, names=names, **self.others)
        self._run_alone(max(1, ids.shape[1] // 2))

    def _run_alone(self, length: int) -> None:
        """Run the beginning of the first row alone; where tokens look ahead, once more with the rest masked."""
        names = [name for name, point in self.model.hook_points.items() if point.kind == "hook_resid_post"]
        first = {name: values[:1] for name, values in self.others.items()}
        if "token_type_ids" in first:
            first["token_type_ids"] = first["token_type_ids"][:, :length]
        self.alone = self.model.run_with_cache(self.ids[:1, :length], names=names, **first)[1]
        self.together = self.cache
        if not self.shape.causal:
            mask = torch.ones_like(self.ids)
            mask[0, length:] = 0
            self.together = self.model.run_with_cache(self.ids, mask, names=names, **self.others)[1]

    @property
    def device(self) -> torch.device:
        """Where the activations are."""
        return next(iter(self.cache.values())).device

    @cached_property
    def routed(self) -> dict[int, tuple[torch.Tensor, ...]]:
        """Everything that the router of each block gives, in one more forward pass."""
        given: dict[int, tuple[torch.Tensor, ...]] = {}
        anatomy = self.model.anatomy
        with ExitStack() as stack:
            stack.enter_context(uncompiled(self.model.native))
            for layer in range(self.shape.n_layers):
                router = find_part(anatomy.blocks[layer], anatomy.family_at(layer).router)
                if router is not None:
                    keep = partial(_keep, given, layer)
                    stack.callback(router.register_forward_hook(keep).remove)
            self.model.forward(self.ids, **self.others)
        return given

    def name(self, layer: int, kind: str) -> str:
        """Return the name of an activation or a weight of one block."""
        return f"{self.shape.block_name(layer)}.{kind}"

    def get(self, layer: int, kind: str) -> torch.Tensor:
        """Return an activation of one block in float32."""
        return self.cache[self.name(layer, kind)].float()

    def has(self, layer: int, kind: str) -> bool:
        """Whether the block has it."""
        return self.name(layer, kind) in self.cache

    def weight(self, layer: int, kind: str) -> torch.Tensor:
        """Return a weight of one block in float32, where the activations are."""
        return self.outer_weight(self.name(layer, kind))

    def outer_weight(self, name: str) -> torch.Tensor:
        """Return a weight by its whole name in float32, where the activations are."""
        return self.model.weights[name].float().to(self.device)

    def second_input(self, layer: int) -> torch.Tensor:
        """Return the stream that the MLP's side of the block reads."""
        return self.get(layer, self.shape.blocks[layer].mlp_stream)

    def read_by(self, norm: str, layer: int) -> torch.Tensor:
        """Return the stream that a norm of the block reads."""
        block = self.shape.blocks[layer]
        if block.post_norm:
            after = {"ln1": "hook_resid_mid", "ln2": "hook_resid_mid_cross", block.mlp_norm: "hook_resid_post"}
            return self.get(layer, after[norm])
        if norm == block.mlp_norm:
            return self.second_input(layer)
        return self.get(layer, "hook_resid_pre" if norm == "ln1" else "hook_resid_mid")

    def normed(self, prefix: str, layer: int | None) -> torch.Tensor:
        """Return what a norm puts out, with weight and bias, from `hook_normalized`."""
        name = prefix if layer is None else self.name(layer, prefix)
        normalized = self.cache[f"{name}.hook_normalized"].float()
        return normalized if self.shape.norm == "LN" else normalized * self.outer_weight(f"{name}.w")

    def attention_input(self, layer: int, which: str, where: str) -> torch.Tensor:
        """Return what queries, keys or values are projections of."""
        block = self.shape.blocks[layer]
        if where == "cross_attn":
            return self.encoder_output() if which != "q" else self.normed("ln1" if block.post_norm else "ln2", layer)
        return self.normed("ln1", layer) if block.ln1 and not block.post_norm else self.get(layer, "hook_resid_pre")

    def encoder_output(self) -> torch.Tensor:
        """Return what a decoder gets of its encoder."""
        if self.shape.final_norm:
            return self.normed("encoder_final_ln", None)
        last = sum(block.stack == "encoder" for block in self.shape.blocks) - 1
        return self.get(last, "hook_normalized_resid_post")

    def mlp_input(self, layer: int) -> torch.Tensor:
        """Return what the MLP's first projections, or the router, read."""
        block = self.shape.blocks[layer]
        if block.post_norm:
            return self.normed("ln2" if block.cross else "ln1", layer)
        return self.normed(block.mlp_norm, layer) if block.ln2 else self.second_input(layer)

    def renormalized(self, source: torch.Tensor, name: str) -> torch.Tensor:
        """Return `hook_normalized` as the scale and the norm's own input give it."""
        scale = self.cache[f"{name}.hook_scale"].float()
        if self.shape.norm == "RMS":
            return source / scale
        centered = source - source.mean(-1, keepdim=True)
        return centered / scale * self.outer_weight(f"{name}.w") + self.outer_weight(f"{name}.b")

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


def _keep(given: dict[int, Any], layer: int, _module: Any, _args: Any, output: Any) -> None:
    given[layer] = output


def other_inputs(model: HookedModel, ids: torch.Tensor) -> dict[str, Any]:
    """Return two segments where the model tells them apart, and another text for a decoder beside an encoder."""
    n_positions = ids.shape[1]
    if model.shape.token_types > 1:
        segments = (torch.arange(n_positions, device=ids.device) >= n_positions // 3).long()
        return {"token_type_ids": segments.expand_as(ids)}
    if model.shape.encoder_decoder:
        return {"decoder_input_ids": ids.flip(-1)[:, : max(1, n_positions - 3)]}
    return {}

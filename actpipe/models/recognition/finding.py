"""Find the parts of a block by what passes through its modules: every role is a statement about values."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from actpipe.hooks import BlockShape
from actpipe.models.families.entry import Layout, Projection
from actpipe.models.families.fused import Part, split_heads
from actpipe.models.recognition.branches import find_branches, flat_outputs, is_stream_sized, mlp_of, stream_sized
from actpipe.models.recognition.values import (
    Norm,
    activated,
    as_norm,
    is_linear,
    one_of,
    rotated,
    same,
    same_size,
)
from actpipe.models.recognition.watching import Attention, Call
from actpipe.models.routing import of_chosen, shares

_LAYOUTS: tuple[Layout, ...] = ("whole", "columns", "grouped", "codegen")


@dataclass
class BlockParts:
    """What was found of one block; paths start there."""

    branches: list[Call] = field(default_factory=list)
    """Whose outputs are added to the stream, in order."""
    scale: float = 1.0
    parallel: bool = False
    post_norm: bool = False
    norms: dict[str, str] = field(default_factory=dict)
    """`ln1`, `ln2`, `ln1_post`, `ln2_post` -> path."""
    norm: Norm | None = None
    attention: str | None = None
    own_code: bool = False
    attention_branch: str | None = None
    mlp_branch: str | None = None
    mixer_branch: str | None = None
    others: dict[str, str] = field(default_factory=dict)
    projections: dict[str, Projection] = field(default_factory=dict)
    qk_norms: dict[str, str] = field(default_factory=dict)
    qk_norm: Norm | None = None
    qk_norm_input: str = "positions_first"
    sinks: str | None = None
    out: str | None = None
    gated: bool = False
    rotary: bool = False
    mlp: str | None = None
    w_in: Projection | None = None
    w_gate: Projection | None = None
    w_out: str | None = None
    flat_mlp: bool = False
    latent: bool = False
    router: str | None = None
    router_scores: str = "softmax"


class BlockFinder:
    """Finds the parts of one block from one run of it.

    Args:
        block: The block's own call.
        inside: What ran inside, outermost first.
        attention: Attention that ran inside, where there was one.
        n_heads: Query heads.
        n_kv_heads: Key and value heads.
        scales: Numbers of the configuration that branches may be multiplied with.
    """

    def __init__(
        self,
        block: Call,
        inside: Sequence[Call],
        attention: Attention | None,
        n_heads: int,
        n_kv_heads: int,
        scales: Sequence[float],
    ) -> None:
        assert block.input is not None
        self.stream, self._class = block.input, type(block.module).__name__
        after = next(tensor for tensor in block.outputs if tensor.shape == self.stream.shape)
        self.added = after - self.stream
        self.inside = inside
        self.attention = attention
        self.heads = BlockShape(n_heads, n_kv_heads, 1, 1, 0, "opaque")
        self.scales = scales
        self.parts = BlockParts()

    def find(self) -> BlockParts:
        """Find everything that can be found; what is not found is left out."""
        parts = self.parts
        parts.branches, parts.scale = find_branches(self.inside, self.stream, self.added, self.scales)
        if parts.branches:
            self._find_roles()
        else:
            self._find_norms_after_sums()
        if not parts.branches:
            self._find_first_norm()
            self._find_attention(None)
            return parts
        self._find_attention(self._branch(parts.attention_branch))
        self._find_mlp()
        return parts

    # ---- what is added to the stream

    def _find_norms_after_sums(self) -> None:
        """Find `norm(norm(stream + attention) + MLP)`, the order of the first transformers."""
        calls = stream_sized(self.inside, self.stream)
        norms = [(call, norm) for call in self.inside if (norm := as_norm(call)) is not None]
        values = flat_outputs(calls)
        last = next((call for call, _ in norms if same(call.output, self.stream + self.added)), None)
        for call, norm in norms if last is not None else ():
            assert last is not None
            if call is last or call.input is None or last.input is None or call.output is None:
                continue
            if call.input.shape != self.stream.shape:
                continue
            attention = one_of(values, (call.input - self.stream).reshape(-1))
            mlp = one_of(values, (last.input - call.output).reshape(-1))
            if attention and mlp:
                parts = self.parts
                parts.branches = [calls[attention[0]], calls[mlp[0]]]
                parts.attention_branch, parts.mlp_branch = (branch.path for branch in parts.branches)
                parts.norms, parts.norm, parts.post_norm = {"ln1": call.path, "ln2": last.path}, norm, True
                self.mid = call.output
                return

    def _branch(self, path: str | None) -> Call | None:
        return next((call for call in self.parts.branches if call.path == path), None)

    def _find_roles(self) -> None:
        parts, branches = self.parts, self.parts.branches
        if len(branches) > 3:  # more than one attention or MLP: none of them is the block's own
            parts.others = {f"{call.path}.hook_out": call.path for call in branches}
            self._find_first_norm()
            return
        rest = list(branches)
        if self.attention is not None:
            mine = next((b for b in branches if b.ended > self.attention.call.started), None)
            if mine is not None:
                parts.attention_branch = mine.path
                rest.remove(mine)
        mlp = mlp_of(rest, self._class, alone=len(branches) == 1)
        if mlp is not None:
            parts.mlp_branch = mlp.path
            rest.remove(mlp)
        if rest and parts.attention_branch is None:
            parts.mixer_branch = rest.pop(0).path
            parts.others["mixer.hook_out"] = parts.mixer_branch
        parts.others |= {f"{call.path}.hook_out": call.path for call in rest}
        if parts.mixer_branch is not None:
            self._find_projections_of_mixer(parts.mixer_branch)
        before_mlp = branches if mlp is None else branches[: branches.index(mlp)]
        self.mid = self.stream + parts.scale * sum(_shaped(b.output, self.stream) for b in before_mlp)
        beside = mlp is not None and len(branches) > 1
        parts.parallel = beside and not (before_mlp and any(same(c.input, self.mid) for c in self.inside))
        self._find_norms()

    def _find_projections_of_mixer(self, path: str) -> None:
        module = next(call.path for call in self.inside if call.path == path)
        for call in self.inside:
            inner = call.path.removeprefix(f"{module}.")
            if inner != call.path and is_linear(call.module) and self._has_positions(call.output):
                self.parts.others[f"mixer.{inner}.hook_out"] = call.path

    def _has_positions(self, tensor: torch.Tensor | None) -> bool:
        return tensor is not None and tensor.ndim == 3 and tensor.shape[:2] == self.stream.shape[:2]

    def _find_first_norm(self) -> list[Call]:
        """Find what normalizes the block's input, and return every such norm."""
        norms = [call for call in self.inside if as_norm(call) is not None]
        reading = [c for c in norms if same(c.input, self.stream) and c.input.shape[-1] == self.stream.shape[-1]]  # type: ignore[union-attr]
        if reading:
            self.parts.norms["ln1"], self.parts.norm = reading[0].path, as_norm(reading[0])
        return reading

    def _find_norms(self) -> None:
        parts = self.parts
        norms = [(call, norm) for call in self.inside if (norm := as_norm(call)) is not None]
        reading = self._find_first_norm()
        if parts.mlp_branch is not None and parts.parallel and reading:
            parts.norms["ln2"] = reading[-1].path
        elif parts.mlp_branch is not None and not parts.parallel:
            second = [(c, n) for c, n in norms if same(c.input, self.mid)]
            if second:
                parts.norms["ln2"] = second[0][0].path
                parts.norm = parts.norm or second[0][1]
        for name, path in (("ln1_post", parts.attention_branch), ("ln2_post", parts.mlp_branch)):
            for call, norm in norms:
                if call.path == path and path not in parts.norms.values():
                    parts.norms[name] = path
                    parts.norm = parts.norm or norm
        if len(parts.branches) == 1 and parts.mlp_branch is not None and "ln1" in parts.norms:
            parts.norms["ln2"] = parts.norms.pop("ln1")

    def _output_of(self, path: str) -> torch.Tensor | None:
        return next((call.output for call in self.inside if call.path == path), None)

    def _before_norm(self, path: str | None, post: str) -> torch.Tensor | None:
        """Return what a branch computes before the norm that may follow it."""
        call = self._branch(path)
        if call is None:
            return None
        return call.input if post in self.parts.norms else call.output

    # ---- attention

    def _find_attention(self, branch: Call | None) -> None:
        if self.attention is None:
            return
        parts, seen = self.parts, self.attention.seen
        parts.attention, parts.own_code = self.attention.call.path, self.attention.own_code
        linears = [call for call in self.inside if is_linear(call.module) and self._has_positions(call.output)]
        if not self._find_values(linears):
            return
        for which in ("q", "k"):
            self._find_queries(linears, which)
        parts.sinks = self._find_sinks(getattr(seen, "sinks", None))
        parts.latent = seen.query.shape[-1] != self._values.shape[-1]
        mixed = seen.pattern.transpose(1, 2)
        mixed = torch.einsum("bqhk,bkhd->bqhd", mixed, self._repeated(self._values))
        parts.out = next((call.path for call in linears if same(call.input, mixed)), None)
        if parts.out is None and branch is not None:
            wanted = self._before_norm(parts.attention_branch, "ln1_post")
            parts.out = next((call.path for call in linears if same(call.output, wanted)), None)
            parts.gated = parts.out is not None
            if parts.gated and seen.output is None:
                parts.out, parts.gated = None, False

    def _find_sinks(self, sinks: torch.Tensor | None) -> str | None:
        for call in self.inside if sinks is not None else ():
            for name, parameter in call.module.named_parameters(recurse=False):
                if parameter.ndim == 1 and same(parameter, sinks):
                    return f"{call.path}.{name}"
        return None

    def _repeated(self, heads: torch.Tensor) -> torch.Tensor:
        return heads.float().repeat_interleave(self.heads.n_heads // heads.shape[2], dim=2)

    def _find_values(self, linears: Sequence[Call]) -> bool:
        assert self.attention is not None
        seen = self.attention.seen
        if seen.value is not None:
            n = seen.value.shape[1] // self.heads.n_kv_heads
            self._values = seen.value[:, :: max(n, 1)].transpose(1, 2)
            for call, layout, heads in self._split(linears, "v"):
                if same(heads, self._values):
                    self.parts.projections["v"] = Projection(call.path, layout)
                    break
            return True
        inputs = [call.input for call in self.inside if is_linear(call.module) and call.input is not None]
        for call, layout, heads in self._split(linears, "v"):
            mixed = torch.einsum("bhqk,bkhd->bqhd", seen.pattern, self._repeated(heads))
            if any(same(tensor, mixed) for tensor in inputs):
                self.parts.projections["v"] = Projection(call.path, layout)
                self._values = heads
                return True
        return False

    def _split(self, linears: Sequence[Call], part: Part) -> Iterator[tuple[Call, Layout, torch.Tensor]]:
        for call, layout in itertools.product(linears, _LAYOUTS):
            try:
                assert call.output is not None
                heads = split_heads(call.output, layout, part, self.heads)
            except RuntimeError:
                continue
            yield call, layout, heads

    def _find_queries(self, linears: Sequence[Call], which: Literal["q", "k"]) -> None:
        assert self.attention is not None
        seen = self.attention.seen
        target = seen.query if which == "q" else seen.key
        n = target.shape[1] // (self.heads.n_heads if which == "q" else self.heads.n_kv_heads)
        target = target[:, :: max(n, 1)].transpose(1, 2)
        for call, layout, heads in self._split(linears, which):
            if heads.shape != target.shape:
                continue
            turned = rotated(heads, target)
            norm = None if turned is not None else self._find_qk_norm(heads, target)
            if turned is None and norm is None:
                continue
            self.parts.projections[which] = Projection(call.path, layout)
            if norm is not None:
                self.parts.qk_norms[f"{which}_norm"], turned = norm
            self.parts.rotary = self.parts.rotary or bool(turned)
            return

    def _find_qk_norm(self, heads: torch.Tensor, target: torch.Tensor) -> tuple[str, bool] | None:
        for call in self.inside:
            norm = as_norm(call)
            if norm is None:
                continue
            assert call.input is not None
            assert call.output is not None
            if call.input.shape[-1] == heads.shape[-2] * heads.shape[-1] and same(call.input, heads):
                way, out = "all_heads", call.output.reshape(heads.shape)
            elif call.input.shape == heads.shape and same(call.input, heads):
                way, out = "positions_first", call.output
            elif call.input.shape == heads.transpose(1, 2).shape and same(call.input, heads.transpose(1, 2)):
                way, out = "heads_first", call.output.transpose(1, 2)
            else:
                continue
            turned = rotated(out, target)
            if turned is not None:
                self.parts.qk_norm, self.parts.qk_norm_input = norm, way
                return call.path, turned
        return None

    # ---- MLP

    def _find_mlp(self) -> None:
        parts = self.parts
        wanted, branch = self._before_norm(parts.mlp_branch, "ln2_post"), self._branch(parts.mlp_branch)
        if wanted is None:
            return
        sized = [call for call in self.inside if is_stream_sized(call, self.stream)]
        parts.mlp = next((call.path for call in sized if same(call.output, wanted)), None)
        given: torch.Tensor | None = self.stream if parts.parallel else self.mid
        if "ln2" in parts.norms and not parts.post_norm:
            given = self._output_of(parts.norms["ln2"])
        linears = [call for call in self.inside if is_linear(call.module)]
        out = next((call for call in linears if same(call.output, wanted)), None)
        parts.flat_mlp = any(call.output is not None and call.output.ndim == 2 for call in (branch, out) if call)
        if out is None:
            self._find_router(given)
            return
        reading = [call for call in linears if same(call.input, given) and call.ended < out.started]
        self._find_neurons(reading, out)

    def _find_neurons(self, reading: Sequence[Call], out: Call) -> None:
        parts, post = self.parts, out.input
        assert post is not None
        size = post.shape[-1]
        for call in reading:
            assert call.output is not None
            if call.output.shape[-1] == size and activated(post, call.output):
                parts.w_in, parts.w_out = Projection(call.path), out.path
                return
            if call.output.shape[-1] == 2 * size:
                first, second = call.output[..., :size], call.output[..., size:]
                for gate, linear, layouts in (
                    (first, second, ("first_half", "second_half")),
                    (second, first, ("second_half", "first_half")),
                ):
                    if activated(post, gate, linear):
                        parts.w_gate, parts.w_in = (Projection(call.path, layout) for layout in layouts)  # type: ignore[arg-type]
                        parts.w_out = out.path
                        return
        for one, other in itertools.permutations([c for c in reading if same_size(c.output, post)], 2):
            if activated(post, one.output, other.output):
                parts.w_gate, parts.w_in, parts.w_out = Projection(one.path), Projection(other.path), out.path
                return

    def _find_router(self, given: torch.Tensor | None) -> None:
        for call in self.inside:
            weight = getattr(call.module, "weight", None)
            if len(call.outputs) != 3 or weight is None or weight.ndim != 2 or not same(call.input, given):
                continue
            logits, _, indices = call.outputs
            if indices.is_floating_point() or logits.shape[-1] != weight.shape[0]:
                continue
            self.parts.router = call.path
            sigmoid = logits.float().sigmoid().gather(-1, indices.long())
            alike = same(shares(of_chosen(call.outputs[1], indices)), shares(sigmoid))
            self.parts.router_scores = "sigmoid" if alike else "softmax"
            return


def _shaped(tensor: torch.Tensor | None, stream: torch.Tensor) -> torch.Tensor:
    assert tensor is not None
    return tensor.float().reshape(stream.shape)

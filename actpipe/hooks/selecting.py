"""From what people write to names: `blocks.[0-5].hook_resid_post`, `blocks.*.attn.hook_*`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from actpipe.errors import UnknownHookError, did_you_mean
from actpipe.hooks.catalogue import HookPoint
from actpipe.hooks.naming import get_act_name

HookName = str | tuple[str, int] | tuple[str, int, str]
"""A full name, a pattern, a short name (`pattern3`), or `("resid_post", 3)`; the last may name a part: `"ln1"`."""

_STACKS = ("blocks", "encoder", "decoder")
_LAYERS = re.compile(r"\[([^\]]*)\]")
_ITEM = re.compile(r"(-?\d+)(?:-(\d+))?")


def select_hooks(patterns: Iterable[HookName], catalogue: Mapping[str, HookPoint], *, n_layers: int) -> tuple[str, ...]:
    """Resolve names and patterns to names of the catalogue, in firing order, each once.

    In the place of the layer number stand a number (negative counts from the last), `*` for
    all, or a list of numbers and ranges in brackets, ends included: `[0-5]`, `[0,4,-1]`.
    Elsewhere `*` matches any run of characters, dots included. What another name gives
    (`hook_result`, `hook_q_input`) is reached by a wildcard only where that matches nothing else.
    TransformerLens' short names (`"k6"`, `("resid_post", -1)`) are taken as `get_act_name` takes them.

    Args:
        patterns: Names or patterns as the user wrote them.
        catalogue: The model's hook points by name.
        n_layers: Layers of the model, to resolve ranges and negative numbers.

    Raises:
        UnknownHookError: A pattern matches nothing; names the pattern and the nearest name.
    """
    wanted: set[str] = set()
    for written in patterns:
        pattern = _spell_out(written, n_layers)
        matched = _match(pattern, catalogue)
        if not matched:
            raise UnknownHookError(_explain(pattern, catalogue, n_layers))
        wanted.update(matched)
    return tuple(name for name in catalogue if name in wanted)


def _spell_out(written: HookName, n_layers: int) -> str:
    """Return a full name or pattern for what may be a short name."""
    if isinstance(written, str):
        return get_act_name(written) if re.fullmatch(r"[a-z]+\d+[a-z0-9_]*", written) else written
    name, layer, *place = written
    return get_act_name(name, layer + n_layers if layer < 0 else layer, *place)


def _match(pattern: str, catalogue: Mapping[str, HookPoint]) -> list[str]:
    if pattern in catalogue:
        return [pattern]
    pieces = pattern.split(".")
    if pieces[0] in _STACKS and len(pieces) > 2 and (numbers := _numbers_in(pieces[0], catalogue)):
        layers = {f"{pieces[0]}.{layer}" for layer in _parse_layers(pieces[1], pattern, len(numbers))}
        tails = _glob(".".join(pieces[2:]))
        candidates = [p for p in catalogue.values() if p.block in layers and tails.fullmatch(p.kind)]
    else:
        whole = _glob(pattern)
        candidates = [p for p in catalogue.values() if whole.fullmatch(p.name)]
    ordinary = [point.name for point in candidates if not point.on_request]
    return ordinary or [point.name for point in candidates]


def _numbers_in(stack: str, catalogue: Mapping[str, HookPoint]) -> set[str]:
    """Return the blocks of a stack; those of an encoder-decoder are counted apart."""
    return {point.block for point in catalogue.values() if point.block.startswith(f"{stack}.")}


def _glob(text: str) -> re.Pattern[str]:
    return re.compile(".*".join(re.escape(piece) for piece in text.split("*")))


def _parse_layers(text: str, pattern: str, n_layers: int) -> set[int]:
    """Return the layers that the second piece of a pattern names."""
    if text == "*":
        return set(range(n_layers))
    bracketed = _LAYERS.fullmatch(text)
    layers: set[int] = set()
    for item in (bracketed.group(1) if bracketed else text).split(","):
        found = _ITEM.fullmatch(item.strip())
        if found is None:
            raise UnknownHookError(
                f"cannot read the layers {text!r} of hook {pattern!r}: write a number, `*`, or a list of "
                "numbers and ranges such as [0-5] or [0,4,-1]"
            )
        first = int(found.group(1))
        first = first + n_layers if first < 0 else first
        last = int(found.group(2)) if found.group(2) else first
        if not 0 <= first <= last < n_layers:
            raise UnknownHookError(
                f"hook {pattern!r} asks for layer {item.strip()}, but this model has layers 0 to {n_layers - 1}"
            )
        layers.update(range(first, last + 1))
    return layers


def _explain(pattern: str, catalogue: Mapping[str, HookPoint], n_layers: int) -> str:
    if re.search(r"[^\w.*\[\],-]", pattern):
        return f"hook {pattern!r} has characters that no hook name has; `actpipe hooks MODEL` lists the names"
    numberless = re.sub(r"^(blocks|encoder|decoder)\.[^.]+\.", r"\1.0.", pattern)
    hint = did_you_mean(numberless, catalogue)
    return f"no hook of this {n_layers}-layer model matches {pattern!r} (`actpipe hooks MODEL` lists them){hint}"

"""Short names: `get_act_name("resid_post", 3)`, `"k6"`, `"scale4ln1"`.

Source: TransformerLens 2.16, `utils.get_act_name`.
"""

from __future__ import annotations

import re

_SHORT = re.compile(r"([a-z]+)(\d+)([a-z]?.*)")
_SAME = {
    "attn": "pattern",
    "attn_logits": "attn_scores",
    "key": "k",
    "query": "q",
    "value": "v",
    "mlp_pre": "pre",
    "mlp_mid": "mid",
    "mlp_post": "post",
}
_OF_ATTENTION = {"k", "v", "q", "z", "rot_k", "rot_q", "result", "pattern", "attn_scores"}
_OF_MLP = {"pre", "post", "mid", "pre_linear"}
_OF_NORM = {"scale", "normalized"}
_PLACES = {"a": "attn", "m": "mlp", "b": "", "block": "", "blocks": "", "attention": "attn"}


def get_act_name(name: str, layer: int | str | None = None, layer_type: str | None = None) -> str:
    """Return the full name of an activation from a short one.

    Args:
        name: `resid_post`, `q`, `pattern`, an alias of one (`attn`, `query`, `mlp_post`), or a short
            name with its layer in it (`k6`, `scale4ln1`). A full name comes back as it is.
        layer: Layer of the block; None for what is outside the blocks.
        layer_type: `attn`, `mlp`, `ln1`, `ln2`, `ln1_post`, ... or `a`, `m`, `b`.

    Examples:
        >>> get_act_name("k", 6)
        'blocks.6.attn.hook_k'
        >>> get_act_name("scale4ln1")
        'blocks.4.ln1.hook_scale'
        >>> get_act_name("normalized")
        'ln_final.hook_normalized'
    """
    if ("." in name or name.startswith("hook_")) and layer is None and layer_type is None:
        return name
    found = _SHORT.fullmatch(name)
    if found is not None:
        name, layer = found.group(1), int(found.group(2))
        layer_type = found.group(3) or layer_type
    place = "" if layer_type is None else _PLACES.get(layer_type, layer_type)
    name = _SAME.get(name, name)
    if name in _OF_ATTENTION:
        place = "attn"
    elif name in _OF_MLP:
        place = "mlp"
    prefix = "" if layer is None else f"blocks.{layer}."
    prefix += f"{place}." if place else ""
    if name in _OF_NORM and layer is None:
        prefix = "ln_final."
    return f"{prefix}hook_{name}"

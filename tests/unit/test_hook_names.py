"""From what people write to names."""

from __future__ import annotations

import pytest

from actpipe.errors import UnknownHookError
from actpipe.hooks import BlockShape, ModelShape, build_catalogue, select_hooks

BLOCK = BlockShape(n_heads=4, n_kv_heads=2, d_head=2, d_qk=2, d_mlp=16, mlp="gated", rotary=True)
SHAPE = ModelShape(d_model=8, d_vocab=50, n_ctx=32, norm="RMS", learned_positions=False, blocks=(BLOCK,) * 12)
CATALOGUE = build_catalogue(SHAPE)


def select(*patterns):
    return select_hooks(patterns, CATALOGUE, n_layers=12)


@pytest.mark.parametrize(
    ("pattern", "layers"),
    [
        ("blocks.*.hook_resid_post", range(12)),
        ("blocks.3.hook_resid_post", [3]),
        ("blocks.-1.hook_resid_post", [11]),
        ("blocks.[0-5].hook_resid_post", range(6)),
        ("blocks.[9-11].hook_resid_post", [9, 10, 11]),
        ("blocks.[0,4,-1].hook_resid_post", [0, 4, 11]),
        ("blocks.[0-1, 10].hook_resid_post", [0, 1, 10]),
    ],
)
def test_layers_may_be_numbers_lists_and_ranges(pattern, layers):
    assert select(pattern) == tuple(f"blocks.{layer}.hook_resid_post" for layer in layers)


def test_names_come_once_and_in_firing_order():
    names = select("blocks.1.hook_resid_post", "blocks.[0-1].hook_resid_*", "hook_embed", "hook_embed")

    assert names == tuple(name for name in CATALOGUE if name in names)
    assert len(names) == 7


def test_a_star_at_the_end_takes_all_of_a_block_but_what_is_made_on_request():
    names = select("blocks.2.*")

    assert "blocks.2.attn.hook_pattern" in names
    assert "blocks.2.attn.hook_result" not in names
    assert len(names) == sum(point.layer == 2 and not point.on_request for point in CATALOGUE.values())


def test_what_is_made_on_request_is_reached_by_its_name():
    assert select("blocks.*.attn.hook_result") == tuple(f"blocks.{i}.attn.hook_result" for i in range(12))


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("blocks.3.hook_resid_pots", "did you mean 'blocks.0.hook_resid_post'"),
        ("blocks.12.hook_resid_post", "layers 0 to 11"),
        ("blocks.[3-1].hook_resid_post", "layers 0 to 11"),
        ("blocks.x.hook_resid_post", "cannot read the layers 'x'"),
        ("hook_pos_embed", "no hook of this 12-layer model"),
        ("blocks.0.attn.hook z", "characters that no hook name has"),
        ("", "no hook"),
    ],
)
def test_a_name_that_means_nothing_is_refused_with_the_nearest(pattern, message):
    with pytest.raises(UnknownHookError, match=message):
        select(pattern)


def test_grouped_keys_are_not_repeated_and_patterns_are_as_long_as_the_context():
    shapes = {name: point.row_shape(SHAPE, 32) for name, point in CATALOGUE.items()}

    assert shapes["blocks.0.attn.hook_q"] == (4, 2)
    assert shapes["blocks.0.attn.hook_k"] == (2, 2)
    assert shapes["blocks.0.attn.hook_pattern"] == (4, 32)
    assert shapes["blocks.0.attn.hook_result"] == (4, 8)
    assert shapes["ln_final.hook_scale"] == (1,)

"""What is stored of activations where it is not all of them equals what the activations themselves give."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import zarr
from safetensors.torch import save_file
from support import TEXTS, make_recipe, run

import actpipe
from actpipe.describing import verify_run
from actpipe.errors import ActpipeError
from actpipe.repairing import recheck_run

RESIDUAL, Z, PATTERN = "blocks.0.hook_resid_post", "blocks.1.attn.hook_z", "blocks.1.attn.hook_pattern"
D_MODEL, D_SAE = 128, 300


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "lines.txt"
    path.write_text("\n".join(TEXTS * 3))
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    draw = torch.Generator().manual_seed(0)
    basis = {"W": torch.randn(D_MODEL, 5, generator=draw), "mean": torch.randn(D_MODEL, generator=draw)}
    encoder = {
        "W_enc": torch.randn(D_MODEL, D_SAE, generator=draw),
        "b_enc": torch.randn(D_SAE, generator=draw) - 20,
        "b_dec": torch.randn(D_MODEL, generator=draw),
        "threshold": torch.rand(D_SAE, generator=draw) * 5,
    }
    save_file(basis, folder / "basis.safetensors")
    save_file(encoder, folder / "sae.safetensors")
    return {"folder": folder, "basis": basis, "encoder": encoder}


def derive(corpus, out, *entries, **extract):
    run(make_recipe(corpus, hooks=[], derive=list(entries), **extract), out)
    return actpipe.open_store(out)


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    run(make_recipe(corpus, hooks=[RESIDUAL, Z, PATTERN]), out)
    store = actpipe.open_store(out)
    return {name: store[name].compute() for name in (RESIDUAL, Z, PATTERN)}


def test_heads_and_channels_are_those_of_the_activation(corpus, whole, tmp_path):
    store = derive(
        corpus,
        tmp_path,
        {"name": "few", "hooks": [Z, PATTERN], "heads": [3, "0-1"]},
        {"name": "some", "hooks": [RESIDUAL], "channels": [0, "10-12", 127]},
    )
    for name in (Z, PATTERN):
        np.testing.assert_array_equal(store[f"derived/few/{name}"].compute(), whole[name][:, [3, 0, 1]])
    np.testing.assert_array_equal(store[f"derived/some/{RESIDUAL}"].compute(), whole[RESIDUAL][:, [0, 10, 11, 12, 127]])
    assert store.hook_names == ()


def test_a_matrix_is_applied_to_the_row_or_along_its_last_axis(corpus, whole, files, tmp_path):
    basis = str(files["folder"] / "basis.safetensors")
    small = {"W": torch.randn(32, 3)}
    save_file(small, tmp_path / "small.safetensors")
    store = derive(
        corpus,
        tmp_path / "run",
        {"name": "pca", "hooks": [RESIDUAL, Z], "matrix": basis},
        {"name": "small", "hooks": [Z], "matrix": str(tmp_path / "small.safetensors")},
    )
    W, mean = files["basis"]["W"].numpy(), files["basis"]["mean"].numpy()
    for name in (RESIDUAL, Z):
        flat = whole[name].reshape(-1, D_MODEL)
        np.testing.assert_allclose(store[f"derived/pca/{name}"].compute(), (flat - mean) @ W, rtol=1e-4, atol=1e-3)
    expected = whole[Z] @ small["W"].numpy()
    assert expected.shape[1:] == (4, 3)
    np.testing.assert_allclose(store[f"derived/small/{Z}"].compute(), expected, atol=1e-4)


def test_random_directions_keep_lengths_and_come_from_the_seed(corpus, whole, tmp_path):
    entry = {"name": "sketch", "hooks": [RESIDUAL], "random": 2000, "seed": 1}
    sketch = derive(corpus, tmp_path / "a", entry)[f"derived/sketch/{RESIDUAL}"].compute()
    again = derive(corpus, tmp_path / "b", entry)[f"derived/sketch/{RESIDUAL}"].compute()
    other = derive(corpus, tmp_path / "c", {**entry, "seed": 2})[f"derived/sketch/{RESIDUAL}"].compute()

    np.testing.assert_array_equal(sketch, again)
    assert not np.allclose(sketch, other)
    lengths = np.linalg.norm(sketch, axis=1) / np.linalg.norm(whole[RESIDUAL], axis=1)
    assert np.abs(lengths - 1).max() < 0.15
    W = np.random.Generator(np.random.PCG64(1)).standard_normal((D_MODEL, 2000), np.float32) / np.sqrt(2000)
    np.testing.assert_allclose(sketch, whole[RESIDUAL] @ W, atol=1e-3)


@pytest.mark.parametrize("center", [False, True])
def test_latents_of_a_sparse_autoencoder(corpus, whole, files, tmp_path, center):
    sae = str(files["folder"] / "sae.safetensors")
    store = derive(
        corpus,
        tmp_path,
        {"name": "top", "hooks": [RESIDUAL], "encoder": sae, "top_k": 8, "center": center},
        {"name": "all", "hooks": [RESIDUAL], "encoder": sae, "center": center},
    )
    encoder = {name: tensor.double().numpy() for name, tensor in files["encoder"].items()}
    before = (whole[RESIDUAL] - center * encoder["b_dec"]) @ encoder["W_enc"] + encoder["b_enc"]
    expected = np.where(before > np.maximum(encoder["threshold"], 0), before, 0)
    np.testing.assert_allclose(store[f"derived/all/{RESIDUAL}"].compute(), expected, rtol=1e-3, atol=1e-2)

    values, indices = (store[f"derived/top/{RESIDUAL}/{part}"].compute() for part in ("values", "indices"))
    n_active = (expected > 0).sum(1)
    assert n_active.min() < 8 < n_active.max()
    np.testing.assert_allclose(values, -np.sort(-expected, axis=1)[:, :8], rtol=1e-3, atol=1e-2)
    rows = np.arange(len(values))[:, None]
    np.testing.assert_allclose(np.where(indices >= 0, expected[rows, indices], 0), values, rtol=1e-3, atol=1e-2)
    assert ((indices >= 0) == (values > 0)).all()


def test_it_goes_with_everything_else(corpus, files, tmp_path):
    entry = {"name": "sae", "hooks": [RESIDUAL], "encoder": str(files["folder"] / "sae.safetensors"), "top_k": 8}
    store = derive(corpus, tmp_path, entry, keep={"every": 2}, metrics=["loss"], chunk_tokens=8)
    name = f"derived/sae/{RESIDUAL}/values"

    assert verify_run(tmp_path)[0] == []
    assert recheck_run(tmp_path)[1]
    plain = zarr.open_group(tmp_path / "store.zarr", mode="r")[name]
    np.testing.assert_array_equal(plain[:], store[name].compute())
    assert store.to_xarray()[name].dims == ("row", "rank")
    batch = next(iter(actpipe.ActivationLoader(store, [name], batch_size=4, drop_last=False)))
    np.testing.assert_array_equal(batch[name].numpy(), store.rows(name, batch["row"].numpy()))


def test_it_may_be_quantised(corpus, whole, tmp_path):
    store = derive(corpus, tmp_path, {"name": "few", "hooks": [Z], "heads": [0]}, dtype="int8")
    np.testing.assert_allclose(store[f"derived/few/{Z}"].compute(), whole[Z][:, :1], atol=0.05)


def test_other_weights_in_the_same_file_are_noticed(corpus, files, tmp_path):
    path = tmp_path / "basis.safetensors"
    save_file(files["basis"], path)
    entry = {"name": "pca", "hooks": [RESIDUAL], "matrix": str(path)}
    derive(corpus, tmp_path / "run", entry)
    save_file({"W": files["basis"]["W"] + 1}, path)
    with pytest.raises(ActpipeError, match=r"its derived/pca/blocks.0.hook_resid_post is"):
        derive(corpus, tmp_path / "run", entry)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"hooks": [RESIDUAL]}, "exactly one of"),
        ({"hooks": [RESIDUAL], "heads": [0]}, "has no heads"),
        ({"hooks": [Z], "heads": [4]}, "has 4 places along head"),
        ({"hooks": [RESIDUAL], "channels": ["100-128"]}, "has 128 places"),
        ({"hooks": [PATTERN], "random": 4}, "no space of directions"),
        ({"hooks": ["blocks.0.hook_mlp_uot"], "random": 4}, "did you mean"),
        ({"hooks": [RESIDUAL], "matrix": "nowhere.safetensors"}, "cannot read"),
        ({"hooks": ["blocks.0.mlp.hook_post"], "matrix": "basis"}, "takes 128 values"),
        ({"hooks": [RESIDUAL], "encoder": "basis"}, "lacks W_enc, b_enc; it holds W, mean"),
        ({"hooks": [RESIDUAL], "encoder": "sae", "top_k": 301}, "above the 300 latents"),
        ({"hooks": [RESIDUAL], "random": 4, "top_k": 3}, "belong to `encoder`"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_before_anything_runs(corpus, files, tmp_path, entry, message):
    entry = {
        key: str(files["folder"] / f"{value}.safetensors") if value in ("basis", "sae") else value
        for key, value in entry.items()
    }
    with pytest.raises(ActpipeError, match=message):
        derive(corpus, tmp_path / "run", {"name": "one", **entry})
    assert not (tmp_path / "run").exists()

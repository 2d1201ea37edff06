"""Stores in the formats of others: what they read, and what comes back."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from feeding import POST, PRE, write_store
from rich.console import Console
from support import ROOT, all_bytes, make_recipe, run
from typer.testing import CliRunner

import actpipe
from actpipe.cli import app
from actpipe.errors import IncompleteStoreError, InterchangeError, UnknownHookError
from actpipe.interchange import formats
from actpipe.stores.layout import RunFolder
from actpipe.stores.verifying import find_problems
from actpipe.telemetry import Telemetry

FORMATS = ("sae_lens", "safetensors", "datasets", "npy")
HOOK = "blocks.0.hook_resid_post"
QUIET = Telemetry(Console(quiet=True))


def export(run_folder, out, kind, **options):
    return actpipe.export_run(run_folder, out, format=kind, telemetry=QUIET, **options)


def bring(source, out, kind):
    actpipe.import_run(source, out, format=kind, telemetry=QUIET)
    assert find_problems(RunFolder(out)) == []
    return actpipe.open_store(out)


def values(store, name):
    return np.asarray(store.array(name).read(0, store.n_rows))


@pytest.fixture
def stored(corpus, tmp_path):
    recipe = make_recipe(corpus, hooks=[HOOK, "blocks.0.attn.hook_z"], metrics=["loss"], dtype="bfloat16")
    recipe["stages"][0]["max_tokens"] = 160
    run(recipe, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("kind", FORMATS)
def test_what_comes_back_is_what_went_out_to_the_bit(stored, tmp_path, kind, monkeypatch):
    monkeypatch.setattr(formats, "BLOCK_BYTES", 50_000)
    export(stored, tmp_path / "out", kind)

    before, after = actpipe.open_store(stored), bring(tmp_path / "out", tmp_path / "back", kind)
    names = [n for n in before.array_names if kind != "sae_lens" or "metrics/" not in n]
    assert set(after.array_names) == set(names)
    for name in names:
        assert values(after, name).dtype == values(before, name).dtype
        assert values(after, name).tobytes() == values(before, name).tobytes()
    assert after.manifest.model == before.manifest.model
    assert after.document(1).text == before.document(1).text
    assert after.document(1)[HOOK].tobytes() == before.document(1)[HOOK].tobytes()


def test_bits_of_bfloat16_come_back_from_npy(stored, tmp_path):
    out = export(stored, tmp_path / "out", "npy", bfloat16="bits")

    assert np.load(out / f"{HOOK}.npy", mmap_mode="r").dtype == np.uint16
    after = bring(out, tmp_path / "back", "npy")
    assert values(after, HOOK).tobytes() == values(actpipe.open_store(stored), HOOK).tobytes()


def test_npy_files_map_with_numpy_alone(stored, tmp_path):
    out = export(stored, tmp_path / "out", "npy")

    mapped = np.load(out / f"{HOOK}.npy", mmap_mode="r")
    np.testing.assert_array_equal(mapped, values(actpipe.open_store(stored), HOOK).astype(np.float32))
    assert np.load(out / "tokens/input_ids.npy", mmap_mode="r").dtype == np.int32


def test_shards_open_with_safetensors_itself_and_keep_bfloat16(stored, tmp_path, monkeypatch):
    from safetensors.torch import load_file

    monkeypatch.setattr(formats, "BLOCK_BYTES", 50_000)
    shards = sorted(export(stored, tmp_path / "out", "safetensors").glob("*.safetensors"))

    assert len(shards) > 1
    joined = torch.cat([load_file(shard)[HOOK] for shard in shards])
    expected = values(actpipe.open_store(stored), HOOK)
    assert joined.dtype == torch.bfloat16
    assert joined.view(torch.int16).numpy().tobytes() == expected.tobytes()


def test_datasets_reads_a_row_for_each_token(stored, tmp_path):
    import datasets

    loaded = datasets.load_from_disk(str(export(stored, tmp_path / "out", "datasets")))
    store = actpipe.open_store(stored)
    assert len(loaded) == store.n_rows
    row = loaded.with_format("numpy")[7]
    np.testing.assert_array_equal(row[HOOK], store.rows(HOOK, [7])[0].astype(np.float32))
    assert row["blocks.0.attn.hook_z"].shape == (4, 32)


def test_the_cache_of_saelens_has_its_features_and_values(stored, tmp_path):
    import datasets

    loaded = datasets.load_from_disk(str(export(stored, tmp_path / "out", "sae_lens")))
    store = actpipe.open_store(stored)
    assert loaded.features[HOOK] == datasets.Array2D(shape=(32, 128), dtype="float32")
    assert loaded.features["token_ids"] == datasets.Sequence(datasets.Value("int32"), length=32)
    whole = loaded.with_format("numpy")[:]
    np.testing.assert_array_equal(np.reshape(whole[HOOK], (-1, 128)), values(store, HOOK).astype(np.float32))
    np.testing.assert_array_equal(np.reshape(whole["token_ids"], -1), values(store, "tokens/input_ids"))


@pytest.mark.slow
def test_saelens_own_store_loads_the_cache(stored, tmp_path):
    found = sorted(ROOT.glob("benchmarks/.envs/sae-lens-*/bin/python"))
    python = os.environ.get("ACTPIPE_SAE_LENS_PYTHON") or (found[0] if found else None)
    if python is None:
        pytest.skip("needs an environment with sae-lens: set ACTPIPE_SAE_LENS_PYTHON to its interpreter")
    out = export(stored, tmp_path / "out", "sae_lens", hooks=[HOOK])
    arguments = [python, ROOT / "tests/sae_lens_reader.py", out, HOOK, "32", "128", tmp_path / "read.npz"]
    subprocess.run([*map(str, arguments)], check=True)

    store, read = actpipe.open_store(stored), np.load(tmp_path / "read.npz")
    np.testing.assert_array_equal(read["activations"], values(store, HOOK).astype(np.float32))
    np.testing.assert_array_equal(read["token_ids"], values(store, "tokens/input_ids"))


def test_a_last_sequence_that_is_shorter_is_left_out_of_the_cache(corpus, tmp_path):
    recipe = make_recipe(corpus)
    recipe["stages"][0]["max_tokens"] = 150
    run(recipe, tmp_path / "run")
    export(tmp_path / "run", tmp_path / "out", "sae_lens")

    after = bring(tmp_path / "out", tmp_path / "back", "sae_lens")
    assert after.n_rows == 128
    np.testing.assert_array_equal(values(after, HOOK), values(actpipe.open_store(tmp_path / "run"), HOOK)[:128])


@pytest.mark.parametrize("kind", FORMATS)
def test_what_others_wrote_becomes_a_store_of_an_unknown_model(stored, tmp_path, kind):
    out = export(stored, tmp_path / "out", kind, hooks=[HOOK])
    shutil.rmtree(out / "actpipe")

    after = bring(out, tmp_path / "back", kind)
    expected = values(actpipe.open_store(stored), HOOK).astype(np.float32)
    np.testing.assert_array_equal(values(after, HOOK).astype(np.float32), expected)
    assert after.manifest.model.name == "unknown"
    assert "documents unknown" in after.tokens.manifest.dataset
    np.testing.assert_array_equal(after.document(0).input_ids, values(after, "tokens/input_ids"))


def test_a_plain_array_feeds_training_though_its_tokens_are_unknown(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(12_000, dtype=np.float32).reshape(3000, 4))
    store = bring(tmp_path / "x.npy", tmp_path / "back", "npy")

    assert store.array_names == ("activations/x",)
    assert store.tokens.manifest.dataset.endswith("(imported, documents unknown, tokens unknown)")
    assert {int(i) for s in store.tokens.read_sequences() for i in s.ids} == {-1}
    loader = actpipe.ActivationLoader(tmp_path / "back", "x", batch_size=1000)
    assert sum(len(batch["x"]) for batch in loader) == 3000
    assert CliRunner().invoke(app, ["info", str(tmp_path / "back")]).exit_code == 0


def test_quantised_arrays_go_out_as_they_are_read(corpus, tmp_path):
    run(make_recipe(corpus, dtype="int8"), tmp_path / "run")
    out = export(tmp_path / "run", tmp_path / "out", "npy")

    np.testing.assert_array_equal(np.load(out / f"{HOOK}.npy"), values(actpipe.open_store(tmp_path / "run"), HOOK))
    assert values(bring(out, tmp_path / "back", "npy"), HOOK).dtype == np.float32


def test_what_cannot_be_exported_is_said(tmp_path):
    write_store(tmp_path / "run", 64, 16)
    with pytest.raises(UnknownHookError, match=f"did you mean '{PRE}'"):
        export(tmp_path / "run", tmp_path / "out", "npy", hooks=["blocks.0.hook_resid_pree"])
    with pytest.raises(InterchangeError, match="did you mean 'safetensors'"):
        export(tmp_path / "run", tmp_path / "out", "safetensor")
    with pytest.raises(InterchangeError, match="only npy holds bfloat16 as bits"):
        export(tmp_path / "run", tmp_path / "out", "datasets", bfloat16="bits")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(InterchangeError, match="is not empty"):
        export(tmp_path / "run", tmp_path / "full", "npy")
    (tmp_path / "run/commits/part-00000001.json").unlink()
    with pytest.raises(IncompleteStoreError, match="3 of 4 parts"):
        export(tmp_path / "run", tmp_path / "out", "npy")
    assert not (tmp_path / "out").exists()


def test_sequences_of_different_lengths_are_no_cache_of_saelens(corpus, tmp_path):
    recipe = make_recipe(corpus)
    recipe["stages"][0]["layout"] = "documents"
    run(recipe, tmp_path / "run")
    with pytest.raises(InterchangeError, match="sequences of exactly 32 tokens"):
        export(tmp_path / "run", tmp_path / "out", "sae_lens")


@pytest.mark.parametrize("kind", FORMATS)
def test_an_empty_source_is_refused(tmp_path, kind):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InterchangeError, match="empty"):
        actpipe.import_run(tmp_path / "empty", tmp_path / "out", format=kind, telemetry=QUIET)
    assert not (tmp_path / "out").exists()


def test_an_interrupted_export_leaves_nothing(tmp_path, monkeypatch):
    from actpipe.interchange import exporting

    write_store(tmp_path / "run", 64, 16)
    before = all_bytes(tmp_path)

    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(exporting, "write_sidecar", stop)
    with pytest.raises(KeyboardInterrupt):
        export(tmp_path / "run", tmp_path / "out", "npy")
    assert all_bytes(tmp_path) == before
    assert not any("out" in path.name for path in tmp_path.iterdir())


def test_element_types_that_stores_lack_are_refused(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((8, 2)))
    with pytest.raises(InterchangeError, match="is float64, which stores do not hold"):
        actpipe.import_run(tmp_path / "x.npy", tmp_path / "out", format="npy", telemetry=QUIET)


def test_a_damaged_export_is_refused(tmp_path):
    write_store(tmp_path / "run", 64, 16)
    out = export(tmp_path / "run", tmp_path / "out", "npy")
    with pytest.raises(InterchangeError, match="was exported as npy"):
        actpipe.import_run(out, tmp_path / "back", format="datasets", telemetry=QUIET)
    (out / f"{POST}.npy").unlink()
    with pytest.raises(InterchangeError, match=f"lacks activations/{POST}"):
        actpipe.import_run(out, tmp_path / "back", format="npy", telemetry=QUIET)


def test_the_commands_go_there_and_back(stored, tmp_path):
    out, back = str(tmp_path / "out"), str(tmp_path / "back")
    for command in (
        ["export", str(stored), out, "--format", "safetensors", "--hook", HOOK],
        ["import", out, "--format", "safetensors", "--out", back],
        ["info", back],
        ["verify", back],
    ):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
    record = json.loads(Path(out, "actpipe/record.json").read_text())
    assert f"activations/{HOOK}" in record["written"]

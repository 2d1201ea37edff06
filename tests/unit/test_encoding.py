"""Codecs and quantised arrays: what they keep, that others can read them, and that they are the same every time."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest
import zarr
from actpipe.schemas.commit import Commit
from actpipe.schemas.manifest import ArrayManifest, StoreManifest
from actpipe.schemas.recipe import ExtractActivationsConfig
from hypothesis import given
from hypothesis import strategies as st
from support import TEXTS, all_bytes, make_recipe, run

from actpipe import open_store
from actpipe.compute.quantising import channel_scales, dequantise, quantise
from actpipe.describing import describe_run
from actpipe.errors import DtypeOverflowError, RecipeError
from actpipe.repairing import recheck_run
from actpipe.stores import encoding
from actpipe.stores.layout import RunFolder
from actpipe.stores.verifying import find_problems

HOOKS = ["blocks.0.attn.hook_z", "blocks.1.hook_resid_post", "blocks.1.attn.hook_pattern"]
CODES = ["int8", "float8_e4m3"]
RELATIVE_ROUNDING = {"int8": 0.02, "float8_e4m3": 0.04}
"""Root mean square of rounding, of values that look like a bell curve."""


def restored(rows, code, block=64):
    channels = channel_scales(np.abs(rows).mean(0, dtype=np.float64))
    return dequantise(*quantise(rows, channels, block, code), channels, block)


def relative_error(values, read):
    return np.linalg.norm(values - read) / np.linalg.norm(values)


class TestQuantising:
    @pytest.mark.parametrize("code", CODES)
    @given(
        n_rows=st.integers(1, 9),
        n_channels=st.integers(1, 200),
        block=st.sampled_from([1, 16, 64]),
        exponent=st.integers(-30, 30),
        seed=st.integers(0, 99),
    )
    def test_no_value_moves_by_more_than_its_code_allows(self, code, n_rows, n_channels, block, exponent, seed):
        rows = np.random.default_rng(seed).standard_normal((n_rows, n_channels)).astype(np.float32) * 2.0**exponent
        rows = rows.astype(np.float32)
        channels = channel_scales(np.abs(rows).mean(0, dtype=np.float64))
        codes, scales = quantise(rows, channels, block, code)
        read = dequantise(codes, scales, channels, block)
        step = np.repeat(scales, block, axis=1)[:, :n_channels] * channels

        half = 0.5 * step if code == "int8" else np.abs(rows) / 16 + step * 2.0**-10
        assert (np.abs(rows - read) <= half * 1.001).all()
        assert codes.itemsize == 1

    @pytest.mark.parametrize("code", CODES)
    def test_channels_that_are_always_large_do_not_ruin_the_rest(self, code):
        rows = np.random.default_rng(0).standard_normal((500, 128)).astype(np.float32)
        alone = relative_error(rows, restored(rows, code))
        rows[:, [3, 70]] *= 3000.0
        others = np.setdiff1d(np.arange(128), [3, 70])

        assert relative_error(rows[:, others], restored(rows, code)[:, others]) < 1.3 * alone
        assert alone < RELATIVE_ROUNDING[code]

    @pytest.mark.parametrize("code", CODES)
    def test_a_row_that_is_large_once_ruins_no_other_row(self, code):
        rows = np.random.default_rng(0).standard_normal((500, 128)).astype(np.float32)
        rows[0, [3, 70]] = 3000.0
        assert relative_error(rows[1:], restored(rows, code)[1:]) < RELATIVE_ROUNDING[code] * 1.5

    @pytest.mark.parametrize("code", CODES)
    def test_zeros_stay_zeros(self, code):
        rows = np.zeros((3, 5), np.float32)
        rows[1, 2] = 7.0

        np.testing.assert_array_equal(restored(rows, code, block=2), rows)


@pytest.fixture(scope="module")
def corpus_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text("".join(json.dumps({"id": f"doc-{i}", "text": text}) + "\n" for i, text in enumerate(TEXTS)))
    return path


@pytest.fixture(scope="module")
def plain(corpus_file, tmp_path_factory):
    """A run in float32 without a codec, to compare with."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    run(make_recipe(corpus_file, hooks=HOOKS, metrics=["loss"]), folder)
    return folder


def encoded(corpus_file, folder, **extract):
    recipe = make_recipe(corpus_file, hooks=HOOKS, metrics=["loss"], **extract)
    run(recipe, folder)
    return recipe


ENCODINGS = [
    {"codec": "zstd"},
    {"codec": "blosc", "dtype": "bfloat16"},
    {"dtype": "int8"},
    {"dtype": "float8_e4m3"},
    {"dtype": "int8", "codec": "blosc"},
]


@pytest.mark.parametrize("extract", ENCODINGS, ids=lambda extract: "-".join(extract.values()))
class TestStores:
    def test_it_reads_as_floats_in_every_way_and_zarr_reads_the_same_arrays(
        self, corpus_file, plain, tmp_path, extract
    ):
        encoded(corpus_file, tmp_path / "run", **extract)
        store, group = open_store(tmp_path / "run"), zarr.open_group(tmp_path / "run/store.zarr", mode="r")

        assert store.n_parts > 1
        for name in store.array_names:
            values = open_store(plain)[name].compute()
            read = store[name].compute()
            picked = [70, 3, 3, store.n_rows - 1]
            np.testing.assert_array_equal(store.rows(name, picked), read[picked])
            np.testing.assert_array_equal(store.array(name)[5:77], read[5:77])
            if "activations" not in name:
                np.testing.assert_array_equal(read, values)
            elif extract.get("dtype") not in CODES:
                np.testing.assert_array_equal(read.astype(np.float32), values.astype(read.dtype).astype(np.float32))
            else:
                assert read.dtype == np.float32
                assert relative_error(values, read) < RELATIVE_ROUNDING[extract["dtype"]] * 2
            kept = store.array(name).manifest.quantisation
            np.testing.assert_array_equal(group[name][...] if kept is None else undone(group, name), read)
        document = store.document(2)
        rows = store.rows("blocks.1.hook_resid_post", document.rows)
        np.testing.assert_array_equal(document["blocks.1.hook_resid_post"], rows)

    def test_done_in_another_order_and_again_it_is_the_same_to_the_byte(self, corpus_file, tmp_path, extract):
        recipe = encoded(corpus_file, tmp_path / "run", **extract)
        before = all_bytes(tmp_path / "run")
        for part in (0, 2):
            (tmp_path / f"run/commits/part-{part:08d}.json").unlink()
        run(recipe, tmp_path / "run")

        assert all_bytes(tmp_path / "run") == before
        assert find_problems(RunFolder(tmp_path / "run")) == []

    def test_deep_verification_allows_for_the_codes_and_no_more(self, corpus_file, tmp_path, extract):
        encoded(corpus_file, tmp_path / "run", **extract)
        _, holds = recheck_run(tmp_path / "run")

        assert holds


def undone(group, name):
    """Undo the quantisation by what the attributes say, without this package."""
    array = group[name]
    how = array.attrs["actpipe_quantisation"]
    codes = array[...].reshape(array.shape[0], -1)
    if how["code"] == "float8_e4m3":
        codes = codes.view(ml_dtypes.float8_e4m3fn)
    row = np.repeat(group[how["row_scales"]][...], how["block"], axis=1)[:, : codes.shape[1]]
    channel = group[how["channel_scales"]][...].reshape(-1, codes.shape[1])
    part = np.arange(array.shape[0]) // array.chunks[0]
    return (codes.astype(np.float32) * row * channel[part]).reshape(array.shape)


class TestRecords:
    def test_what_quantising_did_is_recorded_and_shown(self, corpus_file, plain, tmp_path):
        encoded(corpus_file, tmp_path / "run", dtype="int8")
        store, name = open_store(tmp_path / "run"), "blocks.1.hook_resid_post"
        values, read = open_store(plain)[name].compute(), store[name].compute()

        found = store.fidelity[f"activations/{name}"]
        assert found.relative_error == pytest.approx(relative_error(values, read), rel=1e-4)
        cosine = np.vdot(values, read) / np.linalg.norm(values) / np.linalg.norm(read)
        assert found.cosine == pytest.approx(float(cosine), abs=1e-6)
        (finding,) = [finding for finding in describe_run(tmp_path / "run") if finding.title == "Quantised: main"]
        assert [row[0] for row in finding.rows] == HOOKS[:1] + HOOKS[2:] + HOOKS[1:2]
        assert open_store(plain).fidelity == {}

    def test_plain_stores_are_of_version_1_and_say_nothing_new(self, plain, corpus_file, tmp_path):
        encoded(corpus_file, tmp_path / "run", dtype="int8")
        versions = {}
        for folder in (plain, tmp_path / "run"):
            manifest = zarr.open_group(folder / "store.zarr", mode="r").attrs["actpipe"]
            commit = json.loads((folder / "commits/part-00000000.json").read_text())
            versions[folder] = manifest["schema_version"], commit["schema_version"]
            assert ("fidelity" in commit) == (folder != plain)
            assert any("quantisation" in array for array in manifest["arrays"]) == (folder != plain)
            StoreManifest.from_json(json.dumps(manifest))
            Commit.from_json(json.dumps(commit))
        assert list(versions.values()) == [(1, 1), (2, 2)]

    def test_a_flipped_bit_of_a_scale_is_found(self, corpus_file, tmp_path):
        encoded(corpus_file, tmp_path / "run", dtype="int8")
        path = tmp_path / "run/store.zarr/scales/blocks.1.hook_resid_post/row/c/0/0"
        data = bytearray(path.read_bytes())
        data[9] ^= 1
        path.write_bytes(data)

        (problem,) = find_problems(RunFolder(tmp_path / "run"))
        assert str(problem).startswith("scales/blocks.1.hook_resid_post/row/c/0/0: checksum")


class TestRefusals:
    @pytest.mark.parametrize("code", CODES)
    def test_scores_are_not_quantised(self, corpus_file, tmp_path, code):
        with pytest.raises(RecipeError, match=r"hook_attn_scores is -inf where a key is masked"):
            run(make_recipe(corpus_file, hooks=["blocks.0.attn.hook_attn_scores"], dtype=code), tmp_path / "run")

    def test_a_chunk_too_large_for_blosc_is_refused_before_anything_runs(self, corpus_file, tmp_path, monkeypatch):
        monkeypatch.setattr("actpipe.extraction.layout.MOST_BLOSC_BYTES", 20_000)
        with pytest.raises(RecipeError, match=r"blosc takes at most 20,000; set `rows_per_part` to at most 39"):
            run(make_recipe(corpus_file, hooks=["hook_embed"], codec="blosc"), tmp_path / "run")

    def test_what_is_not_finite_is_not_quantised(self, tmp_path):
        rows = np.ones((4, 3), np.float32)
        rows[1, 2] = np.inf
        rows.tofile(tmp_path / "rows")
        kept = encoding.quantisation_of("activations/x", "int8")
        array = ArrayManifest(
            path="activations/x", dtype="float32", row_shape=(3,), axes=("row", "a"), quantisation=kept
        )

        with pytest.raises(DtypeOverflowError, match="1 of 3 values per row of activations/x are not finite"):
            encoding.quantise_file(tmp_path / "rows", array, 4, 4)

    @pytest.mark.parametrize(("before", "now"), [(True, "commit"), (False, "none"), ("always", "always")])
    def test_policies_of_earlier_recipes_keep_their_meaning(self, before, now):
        assert ExtractActivationsConfig(hooks=("hook_embed",), fsync=before).fsync == now

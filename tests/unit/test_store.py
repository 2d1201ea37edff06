"""The store as other tools see it, as ours reads it, and what is found when its bytes are wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import dask.array as da
import numpy as np
import pytest
import tensorstore
import zarr
from actpipe.schemas.manifest import ArrayManifest, ModelIdentity, StoreManifest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import TEXTS, make_recipe, run

from actpipe import open_results, open_store
from actpipe.errors import IncompleteStoreError, StoreMismatchError, UnknownHookError
from actpipe.extraction.layout import record_shape
from actpipe.hooks import BlockShape, ModelShape
from actpipe.planning import plan_parts
from actpipe.stores.layout import RunFolder
from actpipe.stores.reading import ActivationStore
from actpipe.stores.verifying import find_problems
from actpipe.stores.writing import PartWriter, create_store

HOOKS = ["hook_embed", "blocks.0.attn.hook_z", "blocks.1.hook_resid_post"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run with two arrays in bfloat16 and several parts."""
    folder = tmp_path_factory.mktemp("store")
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps({"id": f"doc-{i}", "text": text}) + "\n" for i, text in enumerate(TEXTS)))
    run(make_recipe(path, hooks=HOOKS, dtype="bfloat16", metrics=["loss"]), folder / "run")
    return folder / "run"


@pytest.fixture
def copy(finished, tmp_path):
    """A copy to break."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


class TestOtherTools:
    def test_zarr_reads_what_dask_and_we_read(self, finished):
        store = open_store(finished)
        group = zarr.open_group(finished / "store.zarr", mode="r")

        assert store.n_parts > 1
        for path in store.array_names:
            theirs = group[path][...]
            np.testing.assert_array_equal(theirs, store[path].compute())
            np.testing.assert_array_equal(da.from_zarr(finished / "store.zarr" / path).compute(), theirs)

    def test_tensorstore_reads_bfloat16_as_it_is(self, finished):
        store = open_store(finished)
        for path in store.array_names:
            spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(finished / "store.zarr" / path)}}
            theirs = tensorstore.open(spec, read=True).result().read().result()
            np.testing.assert_array_equal(theirs, store[path].compute())

    def test_a_chunk_file_is_the_row_major_array_and_nothing_else(self, finished):
        store = open_store(finished)
        raw = (finished / "store.zarr/activations/blocks.1.hook_resid_post/c/0/0").read_bytes()

        assert len(raw) == 64 * 128 * 2
        assert raw == store.array("blocks.1.hook_resid_post").read(0, 64).tobytes()

    def test_axes_are_named(self, finished):
        group = zarr.open_group(finished / "store.zarr", mode="r")

        assert group["activations/blocks.0.attn.hook_z"].metadata.dimension_names == ("row", "head", "d_head")

    def test_the_manifest_stands_in_the_groups_attributes(self, finished):
        manifest = zarr.open_group(finished / "store.zarr", mode="r").attrs["actpipe"]

        assert manifest["format"] == "actpipe-store"
        assert manifest["convention"] == "native"
        assert [array["path"] for array in manifest["arrays"]] == list(open_store(finished).array_names)


class TestReading:
    def test_rows_come_in_the_order_asked_for(self, finished):
        store = open_store(finished)
        everything = store["blocks.1.hook_resid_post"].compute()
        indices = [100, 3, 3, store.n_rows - 1, 0, 64]

        np.testing.assert_array_equal(store.rows("blocks.1.hook_resid_post", indices), everything[indices])

    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
    @given(st.data())
    def test_slices_are_those_of_numpy(self, finished, data):
        array = open_store(finished).array("blocks.0.attn.hook_z")
        everything = array.read(0, array.n_rows)
        bound = st.none() | st.integers(-array.n_rows - 5, array.n_rows + 5)
        step = st.none() | st.sampled_from([1, 2, 7, -1, -3])
        rows = slice(data.draw(bound), data.draw(bound), data.draw(step))
        heads = data.draw(st.sampled_from([slice(None), slice(1, 3), 2]))

        np.testing.assert_array_equal(array[rows], everything[rows])
        np.testing.assert_array_equal(array[rows, heads], everything[rows, heads])
        np.testing.assert_array_equal(array[5, heads], everything[5, heads])

    @pytest.mark.parametrize("indices", [[-1], [10**6], [0.5], [[0, 1]], [True, False]])
    def test_what_is_no_list_of_rows_is_refused(self, finished, indices):
        with pytest.raises((IndexError, TypeError)):
            open_store(finished).rows("hook_embed", indices)

    def test_no_rows_are_no_rows(self, finished):
        assert open_store(finished).rows("hook_embed", []).shape == (0, 128)

    def test_a_document_has_its_tokens_text_and_activations(self, finished):
        store = open_store(finished)

        for index, text in enumerate(TEXTS):
            document = store.document(index)
            assert document.text == text
            assert document.id == f"doc-{index}"
            assert document["blocks.1.hook_resid_post"].shape == (len(document.input_ids), 128)
        with pytest.raises(IndexError, match="document 6 is not one of the 6"):
            store.document(6)

    def test_an_array_that_is_not_there_is_named_with_the_nearest(self, finished):
        with pytest.raises(UnknownHookError, match=r"did you mean 'blocks\.1\.hook_resid_post'"):
            open_store(finished)["blocks.1.hook_resid_pots"]

    def test_a_folder_that_is_no_run_is_refused(self, tmp_path):
        with pytest.raises(IncompleteStoreError, match="is no run folder"):
            open_store(tmp_path)
        with pytest.raises(IncompleteStoreError, match="there is no run folder"):
            open_store(tmp_path / "nothing")
        with pytest.raises(IncompleteStoreError, match="there is no run folder"):
            open_results(tmp_path / "nothing", "score_heads")

    def test_an_unfinished_store_opens_only_on_request(self, copy):
        (copy / "commits/part-00000001.json").unlink()
        (copy / "store.zarr/activations/hook_embed/c/1/0").unlink()

        with pytest.raises(IncompleteStoreError, match="run its recipe again"):
            open_store(copy)
        store = open_store(copy, partial=True)
        assert store.rows("hook_embed", [0]).shape == (1, 128)
        with pytest.raises(IncompleteStoreError, match="part 1 of activations/hook_embed is not there"):
            store.rows("hook_embed", [64])


BLOCK = BlockShape(n_heads=1, n_kv_heads=1, d_head=3, d_qk=3, d_mlp=3, mlp="plain")


def manifest(n_rows: int, rows_per_part: int, dtype: str) -> StoreManifest:
    return StoreManifest(
        corpus="main",
        n_rows=n_rows,
        rows_per_part=rows_per_part,
        context_length=8,
        model=ModelIdentity(name="m", revision=None, family="f", fingerprint="0" * 64, dtype="float32"),
        shape=record_shape(
            ModelShape(d_model=3, d_vocab=3, n_ctx=8, norm="LN", learned_positions=True, blocks=(BLOCK,))
        ),
        arrays=(
            ArrayManifest(path="activations/x", dtype=dtype, row_shape=(3, 2), axes=("row", "a", "b")),
            ArrayManifest(path="metrics/y", dtype="float32", row_shape=(), axes=("row",)),
        ),
    )


class TestWriting:
    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=30)
    @given(
        n_rows=st.integers(1, 60),
        rows_per_part=st.integers(1, 25),
        dtype=st.sampled_from(["float32", "float16", "int32", "int64"]),
        random=st.randoms(use_true_random=False),
    )
    def test_rows_written_in_any_order_are_read_back(self, tmp_path_factory, n_rows, rows_per_part, dtype, random):
        folder = RunFolder(tmp_path_factory.mktemp("run"))
        plan = manifest(n_rows, rows_per_part, dtype)
        create_store(folder, plan)
        x = np.arange(n_rows * 6).reshape(n_rows, 3, 2).astype(dtype)
        y = np.arange(n_rows).astype(np.float32)
        parts = list(plan_parts(n_rows, rows_per_part))
        random.shuffle(parts)
        for part in parts:
            writer = PartWriter(folder, plan, part, fsync="none")
            rows = list(range(part.row_start, part.row_stop))
            random.shuffle(rows)
            for row in rows:
                writer.write("activations/x", row, x[row : row + 1])
            writer.write("metrics/y", part.row_start, y[part.row_start : part.row_stop])
            writer.commit()

        store = ActivationStore(folder)
        store.require_complete()
        np.testing.assert_array_equal(store["x"].compute(), x)
        np.testing.assert_array_equal(store["metrics/y"].compute(), y)
        np.testing.assert_array_equal(zarr.open_group(folder.store, mode="r")["activations/x"][...], x)
        assert list(map(str, find_problems(folder))) == ["tokens.json: missing"]
        assert not any(folder.partial.glob("part-*"))

    def test_a_part_with_a_row_missing_is_never_committed(self, tmp_path):
        folder, plan = RunFolder(tmp_path), manifest(4, 4, "float32")
        create_store(folder, plan)
        writer = PartWriter(folder, plan, plan_parts(4, 4)[0], fsync="none")
        writer.write("metrics/y", 0, np.zeros(4, np.float32))
        writer.write("activations/x", 0, np.zeros((3, 3, 2), np.float32))

        with pytest.raises(AssertionError, match=r"activations/x: 3 of 4 rows"):
            writer.commit()
        writer.abandon()
        assert not folder.part_commit(0).exists()

    def test_rows_outside_the_part_are_refused(self, tmp_path):
        folder, plan = RunFolder(tmp_path), manifest(8, 4, "float32")
        create_store(folder, plan)
        writer = PartWriter(folder, plan, plan_parts(8, 4)[0], fsync="none")

        with pytest.raises(AssertionError, match="within the part"):
            writer.write("metrics/y", 3, np.zeros(2, np.float32))
        writer.abandon()

    def test_readers_see_nan_where_nothing_is_committed_yet(self, tmp_path):
        folder = RunFolder(tmp_path)
        create_store(folder, manifest(8, 4, "float16"))

        assert np.isnan(zarr.open_group(folder.store, mode="r")["activations/x"][...]).all()

    def test_another_manifest_is_refused(self, tmp_path):
        folder = RunFolder(tmp_path)
        create_store(folder, manifest(8, 4, "float16"))
        create_store(folder, manifest(8, 4, "float16"))

        with pytest.raises(StoreMismatchError, match="its rows_per_part is 4, this run's 8"):
            create_store(folder, manifest(8, 8, "float16"))

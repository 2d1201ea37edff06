"""What is found when bytes are wrong, who may work in a folder, and what is cleared away."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from support import TEXTS, all_bytes, make_recipe, run

from actpipe import open_results
from actpipe.describing import clean_run, verify_run
from actpipe.errors import StoreMismatchError
from actpipe.stores import locking
from actpipe.stores.layout import RunFolder
from actpipe.stores.locking import Owner, only_run_in
from actpipe.stores.verifying import Remedy, find_problems

ARRAY = "activations/blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of several parts, with a result."""
    folder = tmp_path_factory.mktemp("trust")
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps({"id": f"doc-{i}", "text": text}) + "\n" for i, text in enumerate(TEXTS)))
    recipe = make_recipe(path, hooks=["hook_embed", "blocks.1.hook_resid_post"], metrics=["loss"])
    recipe["stages"].append({"stage": "summarize_metrics"})
    run(recipe, folder / "run")
    return folder / "run"


@pytest.fixture
def copy(finished, tmp_path):
    """A copy to break."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def problems(folder: Path) -> list[str]:
    return [str(problem) for problem in find_problems(RunFolder(folder))]


def flip_bit(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 4
    path.write_bytes(data)


class TestVerifying:
    def test_a_finished_store_has_no_problems(self, finished):
        assert problems(finished) == []

    @pytest.mark.parametrize("offset", [0, 1000, -1])
    def test_one_flipped_bit_is_found(self, copy, offset):
        flip_bit(copy / f"store.zarr/{ARRAY}/c/1/0", offset)

        (problem,) = problems(copy)
        assert problem.startswith(f"{ARRAY}/c/1/0: checksum")

    def test_a_truncated_file_is_found(self, copy):
        os.truncate(copy / "store.zarr/metrics/loss/c/0", 10)

        assert problems(copy) == ["metrics/loss/c/0: 10 bytes, committed were 256"]

    def test_a_missing_file_is_found(self, copy):
        (copy / "store.zarr/tokens/input_ids/c/2").unlink()

        assert problems(copy) == ["tokens/input_ids/c/2: missing"]

    @pytest.mark.parametrize(
        "path", ["activations/hook_embed/c/notes.txt", "activations/hook_embed/c/99/0", "activations/mine/zarr.json"]
    )
    def test_a_foreign_file_is_found(self, copy, path):
        (copy / "store.zarr" / path).parent.mkdir(parents=True, exist_ok=True)
        (copy / "store.zarr" / path).write_text("mine")

        assert problems(copy) == [f"{path}: belongs to no part of this store"]

    def test_a_foreign_record_is_found_and_counts_for_no_part(self, copy):
        shutil.copy(copy / "commits/part-00000000.json", copy / "commits/part-00000099.json")
        (copy / "commits/part-00000001.json").unlink()

        assert problems(copy) == ["part 1: not committed", "commits/part-00000099.json: is no record of this store"]

    def test_a_missing_commit_is_found(self, copy):
        (copy / "commits/part-00000001.json").unlink()

        assert problems(copy) == ["part 1: not committed"]

    def test_a_commit_record_in_the_place_of_another_is_found(self, copy):
        shutil.copy(copy / "commits/part-00000000.json", copy / "commits/part-00000001.json")

        assert problems(copy) == ["part-00000001.json: does not belong to this store's manifest"]

    def test_a_broken_commit_record_is_found(self, copy):
        os.truncate(copy / "commits/part-00000001.json", 50)

        (problem,) = problems(copy)
        assert problem.startswith("part-00000001.json: is no commit record")

    def test_a_changed_shape_is_found(self, copy):
        path = copy / "store.zarr/activations/hook_embed/zarr.json"
        path.write_text(path.read_text().replace("128", "64"))

        assert [p.split(" is ")[0] for p in problems(copy)] == [
            "activations/hook_embed/zarr.json: chunk_grid",
            "activations/hook_embed/zarr.json: shape",
        ]

    def test_a_changed_manifest_is_found(self, copy):
        path = copy / "store.zarr/zarr.json"
        path.write_text(path.read_text().replace('"n_heads": 4', '"n_heads": 5'))

        assert problems(copy) == ["zarr.json: the manifest in it is not the one that was written"]

    def test_a_broken_manifest_is_found(self, copy):
        path = copy / "store.zarr/zarr.json"
        path.write_text(path.read_text()[:-100])

        (problem,) = problems(copy)
        assert problem.startswith("zarr.json: holds no manifest")

    @pytest.mark.parametrize("name", ["sequences.parquet", "documents.parquet"])
    def test_a_changed_token_table_is_found(self, copy, name):
        with (copy / name).open("ab") as file:
            file.write(b"x")

        (problem,) = problems(copy)
        assert problem.startswith(f"{name}: checksum")

    def test_a_changed_tokenizer_is_found(self, copy):
        flip_bit(copy / "tokenizer/tokenizer.json", 100)

        assert problems(copy) == ["tokenizer/tokenizer.json: checksum differs from the one committed"]

    def test_a_result_without_its_files_is_found(self, copy):
        shutil.rmtree(copy / "results/summarize_metrics.zarr")

        assert problems(copy) == ["results/summarize_metrics.zarr: missing"]

    def test_a_changed_shortened_or_lost_file_of_a_result_is_found(self, copy):
        chunks = sorted(path for path in (copy / "results/summarize_metrics.zarr").rglob("0") if path.is_file())
        first, second, third = chunks[:3]
        size = second.stat().st_size
        flip_bit(first, 3)
        os.truncate(second, size - 1)
        third.unlink()

        changed, shortened, lost = problems(copy)
        assert re.fullmatch(r"results/summarize_metrics\.zarr/\S+: checksum \w{8}, committed was \w{8}", changed)
        assert shortened == f"{second.relative_to(copy)}: {size - 1} bytes, committed were {size}"
        assert lost == f"{third.relative_to(copy)}: missing"

    def test_a_file_that_is_none_of_a_results_is_named_and_left_to_people(self, copy):
        place = copy / "results/summarize_metrics.files"
        place.mkdir()
        (place / "mine.txt").write_text("mine")

        (problem,) = find_problems(RunFolder(copy))
        assert str(problem) == "results/summarize_metrics.files/mine.txt: is no file of this result"
        assert problem.remedy is Remedy.NONE

    def test_records_of_results_without_checksums_are_read_as_before(self, copy):
        path = copy / "results/summarize_metrics.json"
        record = json.loads(path.read_text())
        assert {file["path"].split("/")[0] for file in record.pop("files")} == {"summarize_metrics.zarr"}
        path.write_text(json.dumps(record))

        assert problems(copy) == []
        assert open_results(copy, "summarize_metrics").record.files == ()
        shutil.rmtree(copy / "results/summarize_metrics.zarr")
        assert problems(copy) == ["results/summarize_metrics.zarr: missing"]

    def test_a_broken_run_record_is_found(self, copy):
        (copy / "run.yaml").write_text("schema_version: 1\n")

        (problem,) = verify_run(copy)[0]
        assert problem.startswith("run.yaml: cannot be read")

    def test_only_files_of_others_have_no_remedy(self, copy):
        (copy / "store.zarr/mine").write_text("mine")
        flip_bit(copy / f"store.zarr/{ARRAY}/c/0/0", 0)

        assert [p.remedy for p in find_problems(RunFolder(copy))] == [Remedy.PART, Remedy.NONE]


def write_lock(folder: Path, owner: Owner, age_seconds: float = 0.0) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / ".lock"
    path.write_text(json.dumps(asdict(owner)))
    touched = path.stat().st_mtime - age_seconds
    os.utime(path, (touched, touched))
    return path


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


HERE, ELSEWHERE = socket.gethostname(), "another-host"


class TestLocking:
    def test_the_lock_says_whose_it_is_and_is_free_afterwards(self, tmp_path):
        with only_run_in(RunFolder(tmp_path)):
            owner = Owner.of(tmp_path / ".lock")
            assert owner is not None
            assert (owner.host, owner.pid) == (HERE, os.getpid())
            with pytest.raises(StoreMismatchError, match=f"in use by process {os.getpid()} on {HERE}, at work since"):
                with only_run_in(RunFolder(tmp_path)):
                    pytest.fail("two at once")
        assert Owner.of(tmp_path / ".lock") is None
        with only_run_in(RunFolder(tmp_path)):
            pass

    def test_the_lock_of_a_dead_process_is_taken_over_at_once(self, tmp_path):
        write_lock(tmp_path, Owner(HERE, dead_process(), "2026-01-01T00:00:00"))

        with only_run_in(RunFolder(tmp_path)):
            assert Owner.of(tmp_path / ".lock").pid == os.getpid()

    def test_the_lock_of_another_host_holds_while_it_is_touched(self, tmp_path):
        write_lock(tmp_path, Owner(ELSEWHERE, 1, "2026-01-01T00:00:00"), age_seconds=locking.STALE_SECONDS / 2)

        with pytest.raises(StoreMismatchError, match="in use by process 1 on another-host"):
            with only_run_in(RunFolder(tmp_path)):
                pytest.fail("two at once")
        assert sorted(path.name for path in tmp_path.iterdir()) == [".lock"]

    def test_the_lock_of_another_host_is_taken_over_once_it_is_stale(self, tmp_path, monkeypatch):
        monkeypatch.setattr(locking, "WATCH_SECONDS", 0)
        write_lock(tmp_path, Owner(ELSEWHERE, 1, "2026-01-01T00:00:00"), age_seconds=locking.STALE_SECONDS + 1)

        with only_run_in(RunFolder(tmp_path)):
            assert Owner.of(tmp_path / ".lock").host == HERE

    @pytest.mark.parametrize(("pid", "free"), [(os.getppid(), False), (None, True)])
    def test_without_locks_in_the_file_system_a_living_process_keeps_its_own(self, tmp_path, monkeypatch, pid, free):
        write_lock(tmp_path, Owner(HERE, pid or dead_process(), "2026-01-01T00:00:00"))
        monkeypatch.setattr(locking, "_lock", lambda _: None)

        entered = False
        try:
            with only_run_in(RunFolder(tmp_path)):
                entered = True
        except StoreMismatchError:
            pass
        assert entered == free

    def test_the_owner_touches_its_lock_and_leaves_one_that_was_taken_over(self, tmp_path, monkeypatch):
        monkeypatch.setattr(locking, "BEAT_SECONDS", 0.001)
        with only_run_in(RunFolder(tmp_path)):
            path = tmp_path / ".lock"
            os.utime(path, (1000, 1000))
            while path.stat().st_mtime == 1000:
                pass
            theirs = Owner(ELSEWHERE, 1, "2026-01-01T00:00:00")
            write_lock(tmp_path, theirs)
        assert Owner.of(path) == theirs

    def test_a_lock_of_an_earlier_release_keeps_no_one_out(self, tmp_path):
        (tmp_path / ".lock").write_text("process 1")

        with only_run_in(RunFolder(tmp_path)):
            pass


class TestCleaning:
    LEFT = (
        ".partial/part-00000001-0123456789ab/metrics%loss",
        ".partial/tokens-0123456789ab/documents.parquet",
        ".run.yaml.0123456789ab",
        "commits/.part-00000001.json.0123456789ab",
        "results/.summarize_metrics.json.0123456789ab",
    )
    FOREIGN = (".partial/mine", ".notes.0123456789ab.txt", "commits/.part-1.json.tmp", "store.zarr/mine-0123456789ab")

    def leave(self, folder: Path) -> None:
        for name in self.LEFT + self.FOREIGN:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("left")

    def test_what_was_left_half_done_goes_and_all_else_stays(self, copy):
        before = all_bytes(copy)
        self.leave(copy)
        everything = all_bytes(copy)
        listed = clean_run(copy, dry_run=True)

        assert all_bytes(copy) == everything
        assert clean_run(copy) == listed
        assert len(listed) == len(self.LEFT)
        assert all_bytes(copy) == before | dict.fromkeys(self.FOREIGN, b"left")

    def test_a_folder_with_a_run_at_work_is_left_alone(self, copy):
        self.leave(copy)
        with only_run_in(RunFolder(copy)), pytest.raises(StoreMismatchError, match="in use by"):
            clean_run(copy)

    def test_a_finished_run_has_nothing_to_clean(self, copy):
        assert clean_run(copy) == []

"""Workers that share no disk: the run is in an object store, which answers when it pleases; each has its own folder."""

from __future__ import annotations

import json

import numpy as np
import pytest
from object_store import flaky, objects
from processes import (
    Faults,
    ended_at_last,
    finish,
    make_long_recipe,
    start_scheduler,
    start_worker,
    wait_for,
    write_recipe,
)
from support import all_bytes

import actpipe
from actpipe.describing import verify_run
from actpipe.stores.remote import Remote, _is_metadata
from actpipe.stores.worker_fronts import front_of_worker

HOOK = "blocks.0.hook_resid_post"
MORE_STAGES = [
    {
        "stage": "reduce_activations",
        "name": "sums",
        "hooks": ["blocks.*.hook_resid_post"],
        "statistics": ["mean", "variance"],
        "keep": {"every": 2},
        "rows_per_part": 1024,
    },
    {"stage": "generate_text", "corpus": "told", "max_new_tokens": 2, "prompt_tokens_per_part": 2048},
    {"stage": "extract_activations", "corpus": "told", "hooks": [HOOK], "rows_per_part": 2048},
]


@pytest.mark.slow
def test_a_run_by_workers_without_a_common_disk_has_the_bytes_of_one_process(server, bucket, tmp_path):
    with flaky(server) as (endpoint, requests):
        recipes = {}
        scheduler, address = start_scheduler()
        caches = [tmp_path / name for name in ("here", "there")]
        faults = Faults(tmp_path / "faults")
        workers = [
            start_worker(
                address, tmp_path / "scratch", **faults.environment, AWS_ENDPOINT=endpoint, ACTPIPE_CACHE=str(cache)
            )
            for cache in caches
        ]
        faults.fail(2)
        with ended_at_last(scheduler, *workers):
            for name, engine in {"one": {}, "many": {"scheduler": address}}.items():
                recipe = make_long_recipe(16, **engine)
                recipe["stages"] += MORE_STAGES
                recipes[name] = write_recipe(recipe, tmp_path / f"{name}.yaml")
            finish(recipes["one"], tmp_path / "one")
            finish(recipes["many"], f"s3://{bucket}/run", AWS_ENDPOINT=endpoint)
            for cache in caches:
                wait_for(lambda cache=cache: not [path for path in cache.rglob("*") if path.is_file()])
            assert requests() > 100

    there = {name.removeprefix("run/"): data for name, data in objects(bucket).items()}
    log = there.pop("log.jsonl").decode().splitlines()
    assert sum(json.loads(line)["event"] == "retry" for line in log) >= 2
    local = all_bytes(tmp_path / "one")
    assert there.keys() == local.keys()
    assert [name for name in local if there[name] != local[name]] == []
    assert verify_run(f"s3://{bucket}/run")[0] == []
    np.testing.assert_array_equal(
        actpipe.open_store(f"s3://{bucket}/run")[HOOK].compute(), actpipe.open_store(tmp_path / "one")[HOOK].compute()
    )


def test_folders_of_dead_workers_go(tmp_path, monkeypatch):
    monkeypatch.setenv("ACTPIPE_CACHE", str(tmp_path))
    mine = front_of_worker("s3://bucket/run")
    dead = mine.parent.with_name(str(2**22 + 1)) / "run"
    dead.mkdir(parents=True)
    assert front_of_worker("s3://bucket/run") == mine
    assert front_of_worker(str(tmp_path)) == tmp_path
    assert mine.is_dir()
    assert not dead.parent.exists()
    assert Remote.in_front_of("s3://bucket/run").folder != mine


@pytest.mark.parametrize(
    ("name", "copied"),
    [
        ("commits/part-00000000.json", True),
        ("corpora/told/continuations/part-00000000.parquet", True),
        ("reductions/sums-0123/commits/part-00000000.json", True),
        ("reductions/.sums.0123", False),
        ("results/../../elsewhere", False),
        ("results/../../../etc/passwd", False),
        ("../commits/part-00000000.json", False),
        (".partial/claims", False),
    ],
)
def test_what_is_copied_from_a_bucket_stays_in_the_folder(name, copied):
    assert _is_metadata(name) is copied

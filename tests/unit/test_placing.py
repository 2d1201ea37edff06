"""How many copies of a model fit on how many devices."""

from __future__ import annotations

import pytest
import yaml
from support import INDUCTION, make_recipe

from actpipe.errors import RecipeError
from actpipe.planning import (
    USABLE_SHARE,
    Devices,
    ModelMemory,
    Placement,
    choose_placement,
    devices_by_hand,
    parse_bytes,
)

GB = 10**9
ONE_B = ModelMemory(weights=2.5 * GB, block=0.12 * GB, working=1.3 * GB)
EIGHT_B = ModelMemory(weights=16.1 * GB, block=0.44 * GB, working=4.6 * GB)
SEVENTY_B = ModelMemory(weights=141 * GB, block=1.7 * GB, working=9.1 * GB)
FOUR_HUNDRED_B = ModelMemory(weights=811 * GB, block=6.4 * GB, working=17.7 * GB)


@pytest.mark.parametrize(
    ("model", "n_devices", "device_gb", "devices_per_replica", "replicas", "offload"),
    [
        (ONE_B, 1, 24, 1, 1, "none"),
        (ONE_B, 2, 24, 1, 2, "none"),
        (ONE_B, 8, 80, 1, 8, "none"),
        (EIGHT_B, 1, 24, 1, 1, "none"),
        (EIGHT_B, 8, 24, 1, 8, "none"),
        (EIGHT_B, 1, 16, 1, 1, "cpu"),
        (EIGHT_B, 8, 16, 2, 4, "none"),
        (EIGHT_B, 2, 40, 1, 2, "none"),
        (SEVENTY_B, 1, 80, 1, 1, "cpu"),
        (SEVENTY_B, 2, 80, 2, 1, "cpu"),
        (SEVENTY_B, 8, 80, 3, 2, "none"),
        (SEVENTY_B, 8, 40, 6, 1, "none"),
        (SEVENTY_B, 8, 24, 8, 1, "cpu"),
        (SEVENTY_B, 8, 141, 2, 4, "none"),
        (FOUR_HUNDRED_B, 8, 80, 8, 1, "cpu"),
        (FOUR_HUNDRED_B, 16, 80, 16, 1, "cpu"),
        (FOUR_HUNDRED_B, 24, 80, 17, 1, "none"),
        (FOUR_HUNDRED_B, 8, 141, 8, 1, "none"),
    ],
)
def test_the_most_copies_that_fit_are_chosen(model, n_devices, device_gb, devices_per_replica, replicas, offload):
    found = choose_placement(model, Devices(n_devices, device_gb * GB))

    assert (found.devices_per_replica, found.replicas, found.offload) == (devices_per_replica, replicas, offload)


@pytest.mark.parametrize("model", [ONE_B, EIGHT_B, SEVENTY_B, FOUR_HUNDRED_B])
@pytest.mark.parametrize("n_devices", [1, 2, 3, 8, 16])
@pytest.mark.parametrize("device_gb", [16, 24, 40, 80, 141])
def test_no_device_is_promised_more_than_it_has(model, n_devices, device_gb):
    found = choose_placement(model, Devices(n_devices, device_gb * GB))

    assert found.n_devices <= n_devices
    assert 0 < found.share <= USABLE_SHARE
    held = model.weights - found.offloaded_bytes
    room = USABLE_SHARE * device_gb * GB - model.working
    assert held <= found.devices_per_replica * max(0, room)
    assert (found.offload == "none") == (found.offloaded_bytes == 0)
    if found.offload == "none" and found.devices_per_replica > 1:  # one device fewer does not hold it
        fewer = found.devices_per_replica - 1
        split = model.weights / fewer + (model.block if fewer > 1 else 0)
        assert min(split, model.weights) + model.working > USABLE_SHARE * device_gb * GB


@pytest.mark.parametrize(("host_bytes", "offload"), [(None, "cpu"), (512 * GB, "cpu"), (64 * GB, "disk"), (0, "disk")])
def test_weights_wait_on_the_disk_where_the_host_does_not_hold_them(host_bytes, offload):
    found = choose_placement(SEVENTY_B, Devices(1, 80 * GB, host_bytes=host_bytes))

    assert found == Placement(1, 1, USABLE_SHARE, offload, found.offloaded_bytes)
    assert found.offloaded_bytes == pytest.approx((141 - 72 + 1.7 + 9.1) * GB)


def test_a_model_that_working_memory_alone_keeps_out_is_offloaded_whole():
    found = choose_placement(ModelMemory(10 * GB, GB, 100 * GB), Devices(2, 24 * GB))

    assert (found.offload, found.offloaded_bytes) == ("cpu", 10 * GB)


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [("80GB", 80 * GB), ("80 GiB", 80 * 2**30), ("79.5gib", int(79.5 * 2**30)), ("512MB", 512 * 10**6), ("7B", 7)],
)
def test_memory_is_read_as_people_write_it(text, n_bytes):
    assert parse_bytes(text) == n_bytes


@pytest.mark.parametrize("text", ["80", "GB", "-1GB", "80 gigs", "0GB", ""])
def test_what_is_no_memory_is_refused(text):
    with pytest.raises(RecipeError, match="memory"):
        parse_bytes(text)


def test_a_number_of_devices_needs_their_memory():
    assert devices_by_hand(None, None) is None
    assert devices_by_hand(None, "24GB") == Devices(1, 24 * GB)
    with pytest.raises(RecipeError, match="--device-memory 80GB"):
        devices_by_hand(8, None)


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "lines.txt").write_text("To be, or not to be\n" * 40)
    return tmp_path / "lines.txt"


def placement_rows(findings):
    (found,) = [finding for finding in findings if finding.title == "Placement"]
    return {row[0]: row[1] for row in found.rows}, found.note


def test_a_plan_for_other_devices_loads_no_weights(corpus, tmp_path, monkeypatch):
    from actpipe.running import plan_recipe

    monkeypatch.setattr(
        "actpipe.contexts.HookedModel.from_source", lambda *_, **__: pytest.fail("the model was loaded")
    )
    recipe = make_recipe(corpus, hooks=["blocks.*.hook_resid_post"], batch_tokens=128)
    recipe["stages"].append({"stage": "reduce_activations", "hooks": ["blocks.0.hook_resid_post"], "batch_tokens": 64})
    recipe["model"]["device"] = "cuda:5"
    findings = plan_recipe(recipe, devices=Devices(8, 80 * GB))
    rows, note = placement_rows(findings)

    assert (rows["devices per replica"], rows["replicas"], rows["fits on one"], note) == ("1", "8", "yes", "")
    assert "time" not in [row[0] for finding in findings for row in finding.rows]
    rows, note = placement_rows(plan_recipe(recipe, devices=Devices(2, 10**6)))
    assert (rows["fits on one"], rows["replicas"]) == ("no", "1")
    assert "device_map: auto" in note


def test_the_plan_counts_what_the_model_has(corpus):
    from actpipe import HookedModel
    from actpipe.running import plan_recipe

    rows, _ = placement_rows(plan_recipe(make_recipe(corpus), devices=Devices(1, GB)))
    model = HookedModel.from_pretrained(str(INDUCTION), dtype="float32", device="cpu")
    n_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.native.parameters())

    assert rows["model"] == f"{n_bytes / 1e6:.3g} MB"


def test_the_command_line_plans_for_devices_given_by_hand(corpus, tmp_path):
    from typer.testing import CliRunner

    from actpipe.cli import app

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(make_recipe(corpus)))
    shown = CliRunner().invoke(app, ["plan", str(recipe), "--devices", "4", "--device-memory", "24GB"])

    assert shown.exit_code == 0, shown.output
    assert "of 24 GB each, given by hand" in shown.output

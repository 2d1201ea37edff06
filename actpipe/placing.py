"""How many copies of a recipe's model fit on some devices, and on how many each: what `actpipe plan` says of it."""

from __future__ import annotations

from collections.abc import Iterator

from actpipe.devices import devices_here, host_memory
from actpipe.extraction.deriving import captured_hooks, plan_derivations
from actpipe.extraction.estimate import PassLoad, working_bytes
from actpipe.extraction.reducing import reduced_of, statistics_bytes
from actpipe.model_inputs import inputs_of
from actpipe.planning import USABLE_SHARE, Devices, ModelMemory, Placement, choose_placement, format_bytes
from actpipe.records import Finding
from actpipe.schemas.recipe import ExtractActivationsConfig
from actpipe.schemas.reducing import ReduceActivationsConfig
from actpipe.stage import RunContext

_WAY_OUT = {
    "cpu": "set `model.device_map: auto`; weights that wait in the host's memory are copied for every batch",
    "disk": "set `model.device_map: auto` and `model.offload_folder`; weights are read from the disk for every batch",
}


def this_machine() -> Devices:
    """Return the devices here: accelerators, or else the CPU, for which the disk is all that is left."""
    found = devices_here()
    host = host_memory()
    on_cpu = found[0].name == host.name
    least = min(device.total_bytes for device in found)
    return Devices(len(found), least, found[0].name, 0 if on_cpu else host.total_bytes)


def placement_of(context: RunContext, devices: Devices) -> tuple[Placement, ModelMemory]:
    """Choose a placement for a recipe's model under the stages that run it most; loads no weights."""
    spec = context.spec
    working = max(_working_bytes(context), default=0)
    memory = ModelMemory(spec.n_bytes, spec.largest_block_bytes, working)
    return choose_placement(memory, devices), memory


def _working_bytes(context: RunContext) -> Iterator[int]:
    spec, shape = context.spec, context.spec.shape
    for config in context.recipe.stages:
        if not isinstance(config, ExtractActivationsConfig | ReduceActivationsConfig):
            continue
        length = inputs_of(context, config.corpus).context_length
        points = [spec.hook_points[name] for name in spec.select(captured_hooks(config))]
        looks_at_keys = any(point.looks_at_keys for point in points)
        n_bytes = working_bytes(shape, PassLoad.of(config, length, looks_at_keys=looks_at_keys))
        if isinstance(config, ReduceActivationsConfig):
            plain = [spec.hook_points[name] for name in spec.select(config.hooks)]
            made = plan_derivations(config, spec, context.base, length)
            n_bytes += statistics_bytes(config, reduced_of(plain, made, shape, length), shape, length)
        yield n_bytes


def fits_as_written(context: RunContext, placement: Placement) -> bool:
    """Whether a recipe's model can be loaded the way it says."""
    alone = placement.devices_per_replica == 1 and placement.offload == "none"
    return alone or context.recipe.model.device_map is not None


def describe_placement(context: RunContext, devices: Devices, placement: Placement, memory: ModelMemory) -> Finding:
    """Say what was chosen, and what to set in the recipe for it."""
    spec = context.spec
    alone = memory.weights + memory.working <= USABLE_SHARE * devices.bytes_each
    split = f"at most one block of {format_bytes(memory.block)} from even" if placement.devices_per_replica > 1 else ""
    idle = devices.n - placement.n_devices
    workers = "each a worker of `engine: dask`" if placement.replicas > 1 else ""
    left_over = f"{idle} of the devices left over" if idle else ""
    rows = [
        ("model", format_bytes(memory.weights), f"{spec.n_parameters:,} parameters in {spec.identity.dtype}"),
        ("working memory", format_bytes(memory.working), "at most: activations, logits, keys and values of one pass"),
        ("devices", f"{devices.n}", f"of {format_bytes(devices.bytes_each)} each, {devices.name}"),
        ("fits on one", "yes" if alone else "no", f"of whose memory {USABLE_SHARE:.0%} may be used"),
        ("devices per replica", f"{placement.devices_per_replica}", split),
        ("replicas", f"{placement.replicas}", "; ".join(filter(None, (workers, left_over)))),
        ("share of memory", f"{placement.share:.0%}", "expected, of each device that is used"),
    ]
    if placement.offload != "none":
        where = "the host's memory" if placement.offload == "cpu" else "the disk"
        rows.append(("offloaded", format_bytes(placement.offloaded_bytes), f"of the weights wait in {where}"))
    if getattr(spec.config, "quantization_config", None) is not None:
        rows.append(("quantised", "yes", "the model's bytes are counted as if it were not"))
    return Finding("Placement", ("", "expected", ""), tuple(rows), _note(context, placement))


def _note(context: RunContext, placement: Placement) -> str:
    if placement.offload != "none":
        slow = "which takes far longer than computing with them"
        return f"does not fit on all of these devices together; {_WAY_OUT[placement.offload]}, {slow}"
    if fits_as_written(context, placement):
        return ""
    n_each = placement.devices_per_replica
    engine = f" and `engine.devices_per_worker: {n_each}`" if placement.replicas > 1 else ""
    return f"does not fit on one device: set `model.device_map: auto`{engine} to spread each copy over {n_each}"

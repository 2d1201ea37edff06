"""The memory of this machine's devices: how much there is, how much is free, and when it has run out."""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

_SIGNS = (
    "defaultcpuallocator: can't allocate memory",
    "defaultcpuallocator: not enough memory",
    "out of memory",
    "cublas_status_alloc_failed",
)
"""What messages of allocators other than CUDA's own say, in lower case; their errors have no type of their own."""
_CGROUP_FILES = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, the device's or the host's, did not suffice."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _SIGNS)


def shortage_in_words(error: BaseException) -> str:
    """Return what an allocator said, without where in its code and what else is on the device."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return re.sub(r"^\[[^\]]*\] *(err == \d+\. *)?", "", lines[0]).split(". GPU ")[0].rstrip(".")


def release_caches() -> None:
    """Give memory that nothing uses any more back to the devices."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class DeviceMemory:
    """One device, or the host where there is none."""

    name: str
    """Of the kind of device, such as `NVIDIA H100 80GB HBM3`, or `CPU`."""
    total_bytes: int
    free_bytes: int
    """What this process can have, what it has and does not use included."""


def memory_of(device: torch.device) -> DeviceMemory:
    """Look a device's memory up."""
    if device.type != "cuda":
        return host_memory()
    free, total = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return DeviceMemory(torch.cuda.get_device_name(device), total, free + unused)


def host_memory() -> DeviceMemory:
    """Return the host's memory, or what the container that this process is in may use of it, in bytes."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = _available_bytes(total)
    for limit_file, used_file in _CGROUP_FILES:
        limit, used = _number_in(limit_file), _number_in(used_file)
        if limit is not None and used is not None and limit < total:
            total, free = limit, min(free, max(0, limit - used))
    return DeviceMemory("CPU", total, free)


def _available_bytes(otherwise: int) -> int:
    """Return `MemAvailable` of Linux; `otherwise` on systems that do not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return otherwise
    found = (int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    return next(found, otherwise)


def _number_in(path: str) -> int | None:
    try:
        return int(Path(path).read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def devices_here() -> list[DeviceMemory]:
    """Return this machine's accelerators, or the host where there is none."""
    cuda = [memory_of(torch.device("cuda", number)) for number in range(torch.cuda.device_count())]
    return cuda or [host_memory()]


def devices_in_use(parameters: Iterable[torch.Tensor], inputs: torch.device) -> list[torch.device]:
    """Return the devices that a model computes on: where its weights are, and where its inputs go."""
    found = {inputs, *(parameter.device for parameter in parameters)}
    cuda = sorted((device for device in found if device.type == "cuda"), key=lambda device: device.index or 0)
    return cuda or [inputs]

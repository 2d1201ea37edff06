"""Arithmetic only: rows, parts, chunks, bytes."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from actpipe.errors import RecipeError
from actpipe.records import Part

DEFAULT_ROWS_PER_PART = 65_536
"""Rows of a part when the recipe does not say: 96 MiB of float16 at d_model 768."""

DEFAULT_BATCH_TOKENS = 8192
"""Tokens of a batch where neither a recipe nor a trial says another number."""


def rows_per_part_for(n_rows: int, *, multiple_of: int = 1, most: int = DEFAULT_ROWS_PER_PART) -> int:
    """Choose the rows of a part: as even as possible, at most `most`, a whole number of sequences.

    Args:
        n_rows: Rows of the whole store, in tokens.
        multiple_of: Length of a packed sequence, in tokens; 1 where sequences differ in length.
        most: Upper bound, in tokens. A single sequence longer than that is one part.

    Returns:
        Rows per part, a multiple of `multiple_of`.
    """
    if n_rows < 0 or multiple_of < 1 or most < 1:
        raise ValueError(f"n_rows ({n_rows}), multiple_of ({multiple_of}) and most ({most}) must be positive")
    largest = max(1, most // multiple_of) * multiple_of
    n_parts = max(1, math.ceil(n_rows / largest))
    even = math.ceil(max(1, n_rows) / n_parts)
    return math.ceil(even / multiple_of) * multiple_of


def count_parts(n_rows: int, rows_per_part: int) -> int:
    """Return the number of parts that hold `n_rows` rows."""
    return math.ceil(n_rows / rows_per_part)


def plan_parts(n_rows: int, rows_per_part: int) -> tuple[Part, ...]:
    """Cut `n_rows` rows into parts; together they hold every row exactly once."""
    return tuple(
        Part(index, index * rows_per_part, min(n_rows, (index + 1) * rows_per_part))
        for index in range(count_parts(n_rows, rows_per_part))
    )


def format_bytes(n_bytes: float) -> str:
    """Write a number of bytes for people, in powers of 1000 as disks are sold."""
    if n_bytes < 1000:
        return f"{n_bytes:.0f} B"
    exponent = min(5, int(math.log10(n_bytes) // 3))
    return f"{n_bytes / 1000**exponent:.3g} {' kMGTP'[exponent]}B"


_UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def parse_bytes(text: str) -> int:
    """Read a number of bytes as people write it: `80GB` counts in powers of 1000, `80GiB` in powers of 1024.

    Raises:
        RecipeError: It is no such number.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B\s*", text.upper())
    if found is None:
        raise RecipeError(f"{text!r} is no amount of memory; write it as 80GB, 79.6GiB or 512MB")
    number, unit, binary = found.groups()
    n_bytes = int(float(number) * (1024 if binary else 1000) ** _UNITS[unit])
    if not n_bytes:
        raise RecipeError(f"{text!r} is no memory at all")
    return n_bytes


USABLE_SHARE = 0.9
"""Share of a device's memory that weights and activations may take; the rest is for its context and fragments."""


@dataclass(frozen=True)
class Devices:
    """Devices of one kind."""

    n: int
    bytes_each: int
    name: str = "given by hand"
    host_bytes: int | None = None
    """Memory of the host, where it is known."""


def devices_by_hand(n: int | None, memory: str | None) -> Devices | None:
    """Return the devices that someone wrote down; None where nothing was written.

    Raises:
        RecipeError: One of the two is missing, or the memory is no number of bytes.
    """
    if memory is None:
        if n is not None:
            raise RecipeError(f"--devices {n} needs --device-memory, such as --device-memory 80GB")
        return None
    return Devices(1 if n is None else n, parse_bytes(memory))


@dataclass(frozen=True)
class ModelMemory:
    """What one copy of a model takes, in bytes."""

    weights: int
    block: int
    """The largest block: what is never split."""
    working: int
    """Activations, keys and values, logits and sums of one pass; each device of a copy may hold all of it in turn."""


@dataclass(frozen=True)
class Placement:
    """How many copies of a model, and how many devices for each."""

    devices_per_replica: int
    replicas: int
    share: float
    """Of a device's memory that is expected to be used."""
    offload: Literal["none", "cpu", "disk"] = "none"
    """Where weights wait that fit on no device."""
    offloaded_bytes: int = 0

    @property
    def n_devices(self) -> int:
        """Devices that are used."""
        return self.devices_per_replica * self.replicas


def choose_placement(model: ModelMemory, devices: Devices) -> Placement:
    """Choose the most copies of a model that fit on some devices, each on as few of them as hold it.

    A copy on several devices is cut between blocks, so that a device has at most its even share and one block more.
    Only one of them computes at a time, which is why more copies come before more devices for each.

    Args:
        model: What one copy takes.
        devices: Where the copies may be.

    Returns:
        The placement. Where all devices together do not hold the model, one copy on all of them, and where the
        rest of its weights can wait: `cpu`, or `disk` where the host is known not to hold them either.
    """
    if devices.n < 1 or devices.bytes_each < 1:
        raise ValueError(f"there must be devices with memory, got {devices.n} of {devices.bytes_each} bytes")
    usable = USABLE_SHARE * devices.bytes_each
    for n_each in range(1, devices.n + 1):
        needed = _bytes_on_each(model, n_each)
        if needed <= usable:
            return Placement(n_each, devices.n // n_each, needed / devices.bytes_each)
    held = devices.n * max(0, int(usable) - model.block - model.working)
    rest = max(0, model.weights - held)
    fits_host = devices.host_bytes is None or rest <= USABLE_SHARE * devices.host_bytes
    return Placement(devices.n, 1, USABLE_SHARE, "cpu" if fits_host else "disk", rest)


def _bytes_on_each(model: ModelMemory, n_devices: int) -> int:
    """Return the most that one of the devices of a copy holds."""
    split = model.weights if n_devices == 1 else min(model.weights, math.ceil(model.weights / n_devices) + model.block)
    return split + model.working

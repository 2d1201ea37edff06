"""Writes docs/scale.md: what runs on large models and corpora cost, worked out from the figures named below.

python docs/scale_page.py
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

CONTEXT = 1024
ROWS_PER_PART = 65_536
VALUE_BYTES = 2
UTILISATION = 0.4
"""Share of a device's peak that the forward pass of transformers' own code reaches; an assumption."""
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12}
"""Dense bfloat16, by the vendor's data sheets."""
DEVICE_BYTES = 80e9
DISK = 3e9
"""Bytes per second that one NVMe disk takes; an assumption."""
NETWORK = 12.5e9
"""Bytes per second of a 100 Gbit/s link."""
PUTS = 3500
"""Requests per second that S3 takes for one prefix, by its documentation."""
PART_SECONDS = 0.0028
"""What client and scheduler compute for one part; measured by `benchmarks/cluster.py scheduler`."""
ID_BYTES = 4
"""Most that sequences.parquet takes for a token: its id, before compression."""
RECORD_BYTES = 122
"""Of a commit record, for each array; measured by `benchmarks/cluster.py records`."""
LIST_SECONDS = 1.6e-6
"""To list one commit record in a local folder of 100,000; measured by `benchmarks/cluster.py records`."""
TOKEN_BYTES = 4 + 4 + 8
"""Token arrays of a store: id, position, number of the sequence."""


@dataclass(frozen=True)
class Model:
    """What a model's costs depend on."""

    name: str
    n_parameters: float
    n_layers: int
    d_model: int

    @property
    def flops(self) -> float:
        """Of the forward pass, for a token: two for each parameter, and causal attention over the context."""
        return 2 * self.n_parameters + 2 * CONTEXT * self.d_model * self.n_layers

    @property
    def n_devices(self) -> int:
        """Devices of 80 GB that one copy takes, with a fifth of them left for activations."""
        n_devices = 1
        while VALUE_BYTES * self.n_parameters > 0.8 * DEVICE_BYTES * n_devices:
            n_devices *= 2
        return n_devices

    def tokens_per_second(self, device: str) -> float:
        """Of one copy; where it lies on several devices, layer after layer, one of them computes at a time."""
        return UTILISATION * PEAK_FLOPS[device] / self.flops


MODELS = (
    Model("1B (Llama 3.2)", 1.24e9, 16, 2048),
    Model("8B (Llama 3.1)", 8.03e9, 32, 4096),
    Model("70B (Llama 3.1)", 70.6e9, 80, 8192),
)
SELECTIONS = {
    "one `resid_post`": lambda _: 1,
    "every `resid_post`": lambda model: model.n_layers,
    "every `resid_post` and `z`": lambda model: 2 * model.n_layers,
}
CORPORA = (10**9, 10**10, 10**11, 10**12)


def token_bytes(model: Model, selection: str) -> float:
    """Return the bytes that a token takes in the store."""
    return SELECTIONS[selection](model) * model.d_model * VALUE_BYTES + TOKEN_BYTES


def size(n_bytes: float) -> str:
    """Write a number of bytes for people."""
    for unit in ("B", "kB", "MB", "GB", "TB", "PB"):
        if n_bytes < 1000:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.3g} EB"


def duration(seconds: float) -> str:
    """Write a time for people."""
    for limit, unit, name in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds / 86_400:,.0f} days"


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def speeds() -> str:
    """Return what one copy of each model does."""
    rows = []
    for model in MODELS:
        per_device = [f"{model.tokens_per_second(device):,.0f}" for device in PEAK_FLOPS]
        rows.append([model.name, f"{model.flops / 1e9:,.1f}", f"{model.n_devices}", *per_device])
    return table(
        ["model", "GFLOP per token", "devices per copy", *(f"tokens/s, {device}" for device in PEAK_FLOPS)], rows
    )


def bytes_written() -> str:
    """Return what each selection writes, and how many copies saturate a disk and a link."""
    rows = []
    for model in MODELS:
        for selection in SELECTIONS:
            per_token = token_bytes(model, selection)
            rate = per_token * model.tokens_per_second("H100")
            rows.append(
                [
                    model.name,
                    selection,
                    size(per_token),
                    f"{size(rate)}/s",
                    f"{DISK / rate:.2g}",
                    f"{NETWORK / rate:.2g}",
                    size(per_token * 1e9),
                ]
            )
    head = ["model", "stored", "per token", "one copy on H100 writes", "copies that fill a disk", "and a link"]
    return table([*head, "10^9 tokens"], rows)


def corpora() -> str:
    """Return what does not depend on the model: parts, requests, tables, bookkeeping."""
    rows = []
    for n_tokens in CORPORA:
        n_parts = n_tokens / ROWS_PER_PART
        rows.append(
            [
                f"10^{len(str(n_tokens)) - 1}",
                f"{n_parts:,.0f}",
                f"{4 * n_parts:,.0f} to {35 * n_parts:,.0f}",
                duration(35 * n_parts / PUTS),
                duration(n_parts * PART_SECONDS),
                size(4 * RECORD_BYTES * n_parts),
                duration(n_parts * LIST_SECONDS),
                size(ID_BYTES * n_tokens),
            ]
        )
    head = ["tokens", "parts", "files", "to put 35 a part", "client and scheduler", "commit records", "to list them"]
    return table([*head, "sequences.parquet, at most"], rows)


def times() -> str:
    """Return how long a corpus takes on some devices."""
    rows = []
    for model in MODELS:
        for n_devices in (8, 64, 512):
            rate = model.tokens_per_second("H100") * n_devices / model.n_devices
            rows.append(
                [model.name, f"{n_devices}", f"{rate:,.0f}", *(duration(n_tokens / rate) for n_tokens in CORPORA)]
            )
    return table(["model", "H100", "tokens/s", *(f"10^{len(str(n)) - 1}" for n in CORPORA)], rows)


PAGE = """\
# Scale

What a run costs on models and corpora that this page's tables name, worked out by `python docs/scale_page.py`. Nothing
here was run on such machines: it is arithmetic from figures that are stated, and `actpipe plan RECIPE --devices 8
--device-memory 80GB` does the same for a recipe of yours.

**Assumed**: a forward pass reaches {utilisation:.0%} of a device's peak (dense bfloat16: A100 312, H100 989 TFLOP/s,
by the vendor); context {context:,}; a disk takes {disk}/s, a link {network}/s; S3 takes {puts:,} puts per second and
prefix (its documentation). A model that needs several devices is spread over them layer after layer (`device_map`), so
that one of them computes at a time.

**Measured** (on two shared cores; take them again with the command): client and scheduler compute {part_ms:.1f} ms for
a part (`python benchmarks/cluster.py scheduler`); a commit record takes {record} bytes for each array, and listing
100,000 of them {listing:.1f} s (`python benchmarks/cluster.py records`); writing beside the forward pass costs it
2 to 8 % where both share two cores (`python benchmarks/store.py forward`).

## Forward passes
A token costs two FLOP for each parameter, and attention over half the context.

{speeds}

## What is written
Rows of {value_bytes}-byte values, and {token_bytes} bytes of token arrays. `dtype: int8` halves it, `keep` and `derive`
store less, `reduce_activations` stores sums alone.

{bytes_written}

The disk saturates first, long before the devices do, as soon as more than a layer or two are stored. What to set, in
this order: fewer `hooks`; `keep: {{fraction: ...}}`; `dtype: int8` or `float8_e4m3`; `derive` (a SAE's latents, a
projection); then more disks (a parallel file system, an object store, one run for each node).

## How long
{times}

## What does not depend on the model
Parts of {rows_per_part:,} tokens; 4 files a part with one hook, 35 with all layers of the 8B model.

{corpora}

- **Client and scheduler** hand out a part in {part_ms:.1f} ms, so that they keep up with {fed:,.0f} workers whose
  parts take ten seconds. Above that, raise `rows_per_part`: 262,144 rows of 4,096 bfloat16 values are chunks of 2.1 GB.
- **Commit records** are one small file per part in one folder. At 10^12 tokens there are 15 million: listing takes
  {all_listed} on a local disk and {lists:,.0f} requests in an object store, at every start. Raise `rows_per_part`, or
  cut the corpus.
- **The token table** is written by one process, whole, before the first forward pass, and each worker reads its part
  of it. At 10^11 tokens it is hundreds of gigabytes, and its writing takes days.
- **So cut a corpus above about 10^10 tokens into runs**: one for each shard of the dataset
  (`dataset: {{path: ..., split: "train[:1%]"}}`), each in a folder of its own, on a scheduler of their own or on
  one for all. `ActivationLoader` mixes several runs, and results of runs add up.
"""


def page() -> str:
    """Return the page."""
    return PAGE.format(
        utilisation=UTILISATION,
        context=CONTEXT,
        disk=size(DISK),
        network=size(NETWORK),
        puts=PUTS,
        part_ms=1000 * PART_SECONDS,
        record=RECORD_BYTES,
        listing=100_000 * LIST_SECONDS,
        speeds=speeds(),
        value_bytes=VALUE_BYTES,
        token_bytes=TOKEN_BYTES,
        bytes_written=bytes_written(),
        times=times(),
        rows_per_part=ROWS_PER_PART,
        corpora=corpora(),
        fed=10 / PART_SECONDS,
        all_listed=duration(10**12 / ROWS_PER_PART * LIST_SECONDS),
        lists=10**12 / ROWS_PER_PART / 1000,
    )


if __name__ == "__main__":
    (Path(__file__).parent / "scale.md").write_text(page())

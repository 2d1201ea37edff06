"""The size of batches where it is to be found by trial: once per run, and remembered for others like it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from typing import Any

import torch

from actpipe.errors import RecipeError
from actpipe.extraction.batch_size import read_number
from actpipe.extraction.deriving import Derivation, captured_hooks
from actpipe.extraction.trial import Config, Measured, Trial, device_names
from actpipe.models.hooked_model import HookedModel
from actpipe.models.loading import dtype_name, identify
from actpipe.stores.claims import BATCH_SIZE, alone_at
from actpipe.stores.layout import RunFolder, user_cache, write_whole
from actpipe.stores.remote import publish, remote_of

_OF_THE_PASSES = ("stage", "hooks", "derive", "metrics", "statistics", "k", "chunk_tokens", "dtype")
"""Settings on which speed and memory of a pass depend, where a stage has them."""


def check_batch_tokens(config: Config, folder: RunFolder, *, here: bool) -> None:
    """Refuse a trial whose outcome workers could not agree on, since each has its own copy of the run's folder.

    Raises:
        RecipeError: Says the way out.
    """
    if config.batch_tokens == "auto" and not here and remote_of(folder.root) is not None:
        raise RecipeError(
            f"{config.stage}: `batch_tokens: auto` needs a folder that all workers share, and this run is in an object "
            "store; give a number (a run of one part with `engine: process` finds and says one)"
        )


def settle_batch_tokens(
    config: Config,
    folder: RunFolder,
    load_model: Callable[[], HookedModel],
    *,
    context_length: int,
    derivations: Iterable[Derivation] = (),
    note: Callable[..., None] = lambda *_, **__: None,
) -> int:
    """Return the size of batches, and leave it in a folder, so that all who work there make the same batches.

    Where the recipe says `auto`: the number that is in the folder, else the one that was found before on such
    devices for such passes, else the one that a trial finds. Call it before parts are handed out.

    Args:
        config: Of `extract_activations` or `reduce_activations`.
        folder: Where its parts are committed.
        load_model: Gives the model; called only where there must be a trial, or a look at what was remembered.
        context_length: Of the longest sequence.
        derivations: What is made of activations.
        note: Told of a number that is new: a sentence, a kind of event and its fields.
    """
    if config.batch_tokens != "auto":
        return config.batch_tokens
    with alone_at(folder, BATCH_SIZE):
        if (found := read_number(folder.batch_tokens)) is not None:
            return found
        found, how = find_batch_tokens(config, load_model(), context_length, derivations)
        if (others := read_number(folder.batch_tokens)) is not None:  # a trial that took longer than the lock waits
            return others
        write_whole(folder.batch_tokens, _json({"batch_tokens": found}))
        publish([folder.batch_tokens])
    note(f"batches of {found:,} tokens: {how}", "batch size", stage=config.stage, batch_tokens=found, how=how)
    return found


def find_batch_tokens(
    config: Config, model: HookedModel, context_length: int, derivations: Iterable[Derivation] = ()
) -> tuple[int, str]:
    """Return the size of batches that is best for some passes, and how it was found.

    What a trial finds is remembered in the user's cache, by the devices, the model and the settings.
    """
    if config.batch_tokens != "auto":
        return config.batch_tokens, "as the recipe says"
    key = _key(config, model, context_length)
    path = user_cache() / "batch_tokens" / f"{hashlib.sha256(_json(key)).hexdigest()[:24]}.json"
    if (found := read_number(path)) is not None:
        return found, f"found by an earlier trial on {key['devices'][0]['name']}"
    measured = Trial(config, model, derivations, context_length).best()
    if measured is None:
        return context_length, "one sequence at a time, since memory is short"
    write_whole(path, _json({"batch_tokens": measured.batch_tokens, "found": vars(measured), "for": key}))
    return measured.batch_tokens, _how(measured, key)


def _how(measured: Measured, key: dict[str, Any]) -> str:
    return (
        f"found by trial on {key['devices'][0]['name']}, {measured.tokens_per_second:,.0f} tokens/s in "
        f"{measured.share:.0%} of the memory that a batch may take"
    )


def _key(config: Config, model: HookedModel, context_length: int) -> dict[str, Any]:
    settings = config.model_dump(mode="json")
    identity = identify(
        model.source, model.native.config, family=model.anatomy.family.name, dtype=dtype_name(model.dtype)
    )
    return {
        "devices": device_names(model),
        "threads": torch.get_num_threads() if model.device.type == "cpu" else None,
        "torch": torch.__version__,
        "model": identity.fingerprint,
        "computes_in": identity.dtype,
        "convention": model.convention,
        "context_length": context_length,
        "names": model.select(captured_hooks(config)),
        "settings": {name: settings[name] for name in _OF_THE_PASSES if name in settings},
    }


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()

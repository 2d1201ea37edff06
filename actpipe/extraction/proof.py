"""Prove the wanted hooks on the corpus' own first tokens, before anything is stored."""

from __future__ import annotations

import numpy as np
import torch

from actpipe.errors import IdentityError
from actpipe.models.hooked_model import HookedModel
from actpipe.models.identities import check_identities, probe_ids, unproven
from actpipe.stores.token_table import TokenTable

_PROBE_TOKENS = 16


def prove_hooks(model: HookedModel, tokens: TokenTable, names: tuple[str, ...]) -> None:
    """Refuse to store a name that contradicts the model's own arithmetic on this corpus' first tokens.

    Raises:
        IdentityError: Names the hook, the identity and the size of the error.
    """
    first = [sequence.ids[:_PROBE_TOKENS] for sequence, _ in zip(tokens.read_sequences(), range(2), strict=False)]
    length = min(map(len, first))
    real = torch.from_numpy(np.stack([ids[:length] for ids in first])) if len(first) == 2 else None
    ids = probe_ids(model, _PROBE_TOKENS) if real is None or length < 4 else real
    for name in names:
        if name not in model.hook_points:
            raise IdentityError(
                f"{name} is not offered for this {model.anatomy.family.name} model; see the warning above"
            )
    if model.convention != "native":  # the identities are of the model's own activations
        model = HookedModel(model.native, model.source, family=model.anatomy.family)
    wrong = unproven(model, check_identities(model, ids), names)
    for name, outcome in wrong.items():
        raise IdentityError(
            f"{name} of this {model.anatomy.family.name} model is not stored: '{outcome.statement}' is off by "
            f"{outcome.error:.1e} of its size in {outcome.where} (at most {outcome.tolerance:.0e} is rounding); "
            "`actpipe check MODEL` lists every identity"
        )

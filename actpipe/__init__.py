"""A model and a corpus in, a store of activations to compute on out.

The public names are loaded when they are first used: importing the package loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from actpipe.compute.factored import FactoredMatrix as FactoredMatrix
    from actpipe.errors import ActpipeError as ActpipeError
    from actpipe.feed.loader import ActivationLoader as ActivationLoader
    from actpipe.interchange.exporting import export_run as export_run
    from actpipe.interchange.importing import import_run as import_run
    from actpipe.jobs.stacks import accumulated_bias as accumulated_bias
    from actpipe.jobs.stacks import accumulated_resid as accumulated_resid
    from actpipe.jobs.stacks import apply_ln_to_stack as apply_ln_to_stack
    from actpipe.jobs.stacks import decompose_resid as decompose_resid
    from actpipe.jobs.stacks import get_full_resid_decomposition as get_full_resid_decomposition
    from actpipe.jobs.stacks import stack_head_results as stack_head_results
    from actpipe.jobs.stacks import stack_neuron_results as stack_neuron_results
    from actpipe.live import LiveActivationLoader as LiveActivationLoader
    from actpipe.models.checkpoint import open_weights as open_weights
    from actpipe.models.hooked_model import HookedModel as HookedModel
    from actpipe.opening import open_results as open_results
    from actpipe.opening import open_store as open_store
    from actpipe.running import run_recipe as run_recipe

__version__ = "0.1.0"

_PUBLIC = {
    "ActivationLoader": "actpipe.feed.loader",
    "ActpipeError": "actpipe.errors",
    "FactoredMatrix": "actpipe.compute.factored",
    "HookedModel": "actpipe.models.hooked_model",
    "LiveActivationLoader": "actpipe.live",
    "accumulated_bias": "actpipe.jobs.stacks",
    "accumulated_resid": "actpipe.jobs.stacks",
    "apply_ln_to_stack": "actpipe.jobs.stacks",
    "decompose_resid": "actpipe.jobs.stacks",
    "get_full_resid_decomposition": "actpipe.jobs.stacks",
    "stack_head_results": "actpipe.jobs.stacks",
    "stack_neuron_results": "actpipe.jobs.stacks",
    "export_run": "actpipe.interchange.exporting",
    "import_run": "actpipe.interchange.importing",
    "open_results": "actpipe.opening",
    "open_store": "actpipe.opening",
    "open_weights": "actpipe.models.checkpoint",
    "run_recipe": "actpipe.running",
}

__all__ = [
    "ActivationLoader",
    "ActpipeError",
    "FactoredMatrix",
    "HookedModel",
    "LiveActivationLoader",
    "__version__",
    "accumulated_bias",
    "accumulated_resid",
    "apply_ln_to_stack",
    "decompose_resid",
    "export_run",
    "get_full_resid_decomposition",
    "import_run",
    "open_results",
    "open_store",
    "open_weights",
    "run_recipe",
    "stack_head_results",
    "stack_neuron_results",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'actpipe' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)

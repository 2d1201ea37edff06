"""The names: which hook points a model has, what each holds, and how people may write them."""

from actpipe.hooks.building import build_catalogue
from actpipe.hooks.catalogue import BlockShape, HookPoint, ModelShape
from actpipe.hooks.naming import get_act_name
from actpipe.hooks.selecting import HookName, select_hooks

__all__ = ["BlockShape", "HookName", "HookPoint", "ModelShape", "build_catalogue", "get_act_name", "select_hooks"]

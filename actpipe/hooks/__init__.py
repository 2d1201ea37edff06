"""The names: which hook points a model has, what each holds, and how people may write them."""

from actpipe.hooks.catalogue import HookPoint, ModelShape, build_catalogue
from actpipe.hooks.selecting import select_hooks

__all__ = ["HookPoint", "ModelShape", "build_catalogue", "select_hooks"]

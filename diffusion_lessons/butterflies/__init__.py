"""The tutorial: train an unconditional diffusion model on butterflies; the door to `training` and `command`.

Names are looked up when they are first used, so that whoever needs a config alone does not wait for torch.
"""

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    rooms = () if name.startswith("__") else (".training", ".command")
    for room in (import_module(each, __name__) for each in rooms):
        if hasattr(room, name):
            return getattr(room, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""The tutorial: train an unconditional diffusion model on butterflies; the door to `training` and `command`.

Names are looked up when they are first used, so that whoever needs a config alone does not wait for torch.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import Any


def __getattr__(name: str) -> Any:
    # Python asks for a submodule here first: `from ... import config` must not load the rooms.
    if not name.startswith("__") and find_spec(f"{__name__}.{name}") is None:
        for room in (".training", ".command"):
            module = import_module(room, __name__)
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""A Stable Diffusion in miniature, trained here from nothing and shipped; the door to `miniature.model` and `miniature.stages`.

Names are looked up when they are first used: who needs one of the parts does not wait for the others.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import Any


def __getattr__(name: str) -> Any:
    # Python asks for a submodule here first: `from ... import config` must not load the rooms.
    if not name.startswith("__") and find_spec(f"{__name__}.{name}") is None:
        for room in (".model", ".stages"):  # what draws, then what makes it
            module = import_module(room, __name__)
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""A Stable Diffusion in miniature, trained here from nothing and shipped; the door to `miniature.model` and `miniature.stages`.

Names are looked up when they are first used: who needs one of the parts does not wait for the others.
"""

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    if not name.startswith("__"):
        for room in (".model", ".stages"):  # what draws, then what makes it
            module = import_module(room, __name__)
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""A Stable Diffusion in miniature, trained here from nothing and shipped; the door to `miniature.model`.

Names are looked up when they are first used: who needs one of the parts does not wait for the others.
"""

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(".model", __name__), name)

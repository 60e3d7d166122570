"""The tutorial: train an unconditional diffusion model on butterflies; the door to `butterflies.training`.

Names are looked up when they are first used, so that whoever needs a config alone does not wait for torch.
"""

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(".training", __name__), name)

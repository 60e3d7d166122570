"""One recipe, or LoRA, at Stable Diffusion's shape under a hard cap of GPU memory: what piece f of `gpu.py` starts.

    python benchmarks/capped.py '{"name": "16gb", "gigabytes": 16, "repeats": 5, "fields": {…}}'

Prints `measured` and a JSON object. On a CPU the cap is ignored.
"""
import importlib
import json
import sys
from typing import Any

import torch

from diffusion_lessons.dreambooth.config import OFFLOADING, DreamBoothConfig
from diffusion_lessons.dreambooth.memory import estimate
from diffusion_lessons.dreambooth.preparation import measure_run
from diffusion_lessons.engine.config import InputError
from diffusion_lessons.engine.devices import xformers_fault
from diffusion_lessons.engine.optimizers import check_optimizer

GIB = 2**30


def cap(gigabytes: float) -> None:
    """Let this process take no more of the GPU than so many GB."""
    if torch.cuda.is_available():
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gigabytes * 1e9 / whole))


def settled(fields: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The fields without what does not load here and may be left out, and what to say of it."""
    attention = "enable_xformers_memory_efficient_attention"
    fault = xformers_fault() if fields.get(attention) else None
    return (fields, "ok") if fault is None else (fields | {attention: False}, f"ok, without xFormers: {fault}")


def measured(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds of a micro-step, the peak while it trains, and what was estimated of that, both in GiB."""
    fields, said = settled(job["fields"])
    config, offloaded = DreamBoothConfig(**fields), job["name"] == OFFLOADING
    check_optimizer(config)
    found = measure_run(config, job["repeats"])
    there = torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else None
    phases = estimate(config, config.pretrained_model_name_or_path, deepspeed=offloaded)
    return {"seconds a step": found.seconds, "steps a second": 1 / found.seconds, "peak GiB": there,
            "estimate GiB": next(phase.total for phase in phases if phase.phase == "train"), "result": said}


def main() -> None:
    """Measure, or say why not: whatever keeps a recipe from running is its result."""
    job = json.loads(sys.argv[1])
    cap(job["gigabytes"])
    try:
        row = measured(job)
    except InputError as error:
        row = {"result": str(error)}
    except torch.OutOfMemoryError:
        row = {"result": f"out of memory under {job['gigabytes']} GB"}
    print("measured", json.dumps(row), flush=True)
    if torch.distributed.is_available() and torch.distributed.is_initialized():  # DeepSpeed's
        importlib.import_module("torch.distributed").destroy_process_group()


if __name__ == "__main__":
    main()

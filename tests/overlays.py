"""Optional packages for slow tests, each in a folder of its own that goes on PYTHONPATH: never in `.venv`.

Where bitsandbytes is installed, `notebook_launcher` refuses to start several processes, and DeepSpeed changes what
Accelerate does on import; so neither may be seen by the other tests.
"""
import os
import subprocess
import sys
from pathlib import Path

# By name: what is installed, and how. `--no-deps`, because each would bring a torch of its own.
PACKAGES = {
    "bnb": ["bitsandbytes"],
    "ao": ["torchao"],
    "ds": ["--no-build-isolation", "deepspeed", "hjson", "ninja", "py-cpuinfo", "msgpack", "psutil", "einops",
           "pydantic", "pydantic-core", "annotated-types", "typing-inspection", "nvidia-ml-py"],
}  # fmt: skip
FOLDER = Path(os.environ.get("DIFFUSION_LESSONS_OVERLAYS") or Path(sys.prefix) / "overlays")


def overlay(name: str) -> Path:
    """The folder of a package, installed into it when it is first asked for."""
    folder = FOLDER / name
    if not folder.is_dir():
        partial = folder.with_name(f"{name}.partial")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps",
                   "--upgrade", "--target", partial]  # fmt: skip
        subprocess.run([*command, *PACKAGES[name]], check=True)
        partial.rename(folder)
    return folder


def environment(*names: str, **changed: str) -> dict[str, str]:
    """The environment of a process that sees this checkout and these overlays."""
    checkout = Path(__file__).resolve().parent.parent
    paths = [str(checkout), *(str(overlay(name)) for name in names)]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"} | changed

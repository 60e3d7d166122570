"""The lower bounds in settings.ini are true: a fresh environment with exactly those versions runs every command.

The environment is filled from PyPI by plain pip, with each requirement's lower bound as a pin. A resolver that is asked
for the lowest versions would step over a bound that cannot be had, and hide that it is wrong; a pin fails. Wheels only:
a bound whose source has to be compiled is none that users can live with.

The lowest torch is among them although it brings 3 GB of CUDA libraries, 7 GB once unpacked. It has the longest range
and most depends on it, so that a test beside a newer torch would leave the claim untried that is likeliest to break.
Who asks for the slow tests has the minutes; the environment is removed afterwards.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from configparser import ConfigParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from PIL import Image
from runs import words

ROOM = 14_000_000_000  # bytes: the environment, and the downloads while they are unpacked
SUBJECT = "a photo of a sks butterfly"
SMALL = {
    "pretrained_model_name_or_path": "miniature",
    "instance_data_dir": "meadow",
    "instance_prompt": SUBJECT,
    "resolution": 32,
    "train_batch_size": 1,
    "max_train_steps": 10,  # two rounds through the five pictures, with a checkpoint within the second
    "checkpointing_steps": 8,
}
DRAWN = {"prompt": SUBJECT, "num_images": 2, "num_inference_steps": 2}
IMPORT_EVERYTHING = """
import importlib, pkgutil, sys
import diffusion_lessons
assert diffusion_lessons.__file__.startswith(sys.prefix), diffusion_lessons.__file__
for module in pkgutil.walk_packages(diffusion_lessons.__path__, "diffusion_lessons."):
    if not module.name.endswith("__main__") and ".jax." not in module.name:  # JAX is an extra of its own
        importlib.import_module(module.name)
"""
OPEN_PLAINLY = """
from diffusers import DDPMPipeline, StableDiffusionPipeline
assert DDPMPipeline.from_pretrained("butterflies")(num_inference_steps=2).images[0].size == (16, 16)
pipeline = StableDiffusionPipeline.from_pretrained("full")
pipeline.load_lora_weights("lora", weight_name="pytorch_lora_weights.safetensors")  # offline, diffusers 0.38 wants it
assert pipeline("a photo of a sks butterfly", height=32, width=32, num_inference_steps=2).images[0].size == (32, 32)
"""


def lowest(requirement: str) -> str:
    """The requirement as a pin to its lower bound."""
    wanted = Requirement(requirement)
    (bound,) = (specifier.version for specifier in wanted.specifier if specifier.operator == ">=")
    return f"{wanted.name}=={bound}"


def run(*command: str | Path, cwd: Path) -> str:
    """Run to the end with no sight of the checkout, and offline but for pip; return what was printed."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(cwd / "hub"), "TMPDIR": str(cwd)}
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, f"{' '.join(map(str, command[:6]))} …\n{done.stdout[-6000:]}"
    return done.stdout


def flags(**fields) -> list[str]:
    """The words of a command; True stands for a bare flag."""
    return [word for name, value in fields.items() for word in (f"--{name}", str(value))[: 1 if value is True else 2]]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder outside the checkout with room for an environment, gone when the test is over."""
    free = shutil.disk_usage(tmp_path).free
    if free < ROOM:
        pytest.skip(f"{tmp_path} has {free / 1e9:.0f} GB free, and the lowest torch wants {ROOM / 1e9:.0f}")
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.fixture
def programs(folder: Path, checkout: Path) -> Path:
    """The commands of a fresh environment with the wheel and the lowest versions of all that it requires."""
    settings = ConfigParser(delimiters=["="], interpolation=None)
    settings.read(checkout / "settings.ini", encoding="utf-8")
    pins = [lowest(requirement) for requirement in settings["DEFAULT"]["requirements"].split()]
    run(sys.executable, "-m", "build", "--wheel", "--outdir", folder / "dist", checkout, cwd=folder)
    (wheel,) = (folder / "dist").glob("*.whl")
    run(sys.executable, "-m", "venv", folder / "venv", cwd=folder)
    installed = folder / "venv" / "bin"
    # No cache: gigabytes that nothing else would read again stayed in the user's.
    install = [installed / "python", "-m", "pip", "install", "--no-cache-dir", "--only-binary", ":all:"]
    run(*install, wheel, *pins, cwd=folder)
    return installed


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info >= (3, 13), reason="the lowest numpy has wheels for Python 3.11 and 3.12")
def test_the_lowest_versions_train_and_draw(programs, folder):
    python, generate = programs / "python", programs / "generate-images"
    run(python, "-c", IMPORT_EVERYTHING, cwd=folder)
    toy = words("butterflies", max_train_steps=4, report_to="tensorboard")
    run(programs / "train-butterflies", *toy, cwd=folder)
    full = flags(**SMALL, output_dir="full", train_text_encoder=True, with_prior_preservation=False)
    run(programs / "train-dreambooth", *full, cwd=folder)
    lora = flags(**SMALL, lora=True, with_prior_preservation=False)
    run(programs / "train-dreambooth", *lora, "--output_dir", "lora", cwd=folder)
    shutil.copytree(folder / "lora", folder / "resumed")
    shutil.rmtree(folder / "resumed" / "checkpoint-10")
    (folder / "resumed" / "pytorch_lora_weights.safetensors").unlink()
    again = flags(output_dir="resumed", resume_from_checkpoint="latest")
    run(programs / "train-dreambooth", *lora, *again, cwd=folder)
    adapters = [(folder / name / "pytorch_lora_weights.safetensors").read_bytes() for name in ("lora", "resumed")]
    assert adapters[0] == adapters[1], "a resumed run ends where the uninterrupted one ended"
    run(generate, *flags(model_path="full", **DRAWN, output_dir="drawn-full"), cwd=folder)
    run(generate, *flags(lora_weights="lora", **DRAWN, output_dir="drawn-lora"), cwd=folder)
    for name in ("drawn-full", "drawn-lora"):
        drawn = [Image.open(path).convert("RGB") for path in sorted((folder / name).glob("0*.png"))]
        assert len(drawn) == 2 and all(len(picture.getcolors(64 * 64)) > 100 for picture in drawn), name
    run(python, "-c", OPEN_PLAINLY, cwd=folder)

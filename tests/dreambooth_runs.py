"""Small real DreamBooth runs for the tests: on the miniature, at 32 px, a few steps."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import torch
from transformers import ResNetConfig, ResNetModel, ViTImageProcessor

from diffusion_lessons.pictures import meadow

SUBJECT, CLASS = "a photo of a sks butterfly", "a photo of a butterfly"
SMALL = {
    "pretrained_model_name_or_path": "miniature",
    "instance_prompt": SUBJECT,
    "resolution": 32,
    "train_batch_size": 1,
    "max_train_steps": 4,
    "checkpointing_steps": 2,
    "learning_rate": 1e-4,
    "report_to": "none",
    "seed": 0,
}


def subject_folder(folder: Path, number: int = 3) -> Path:
    """A folder with pictures of the meadow's subject."""
    folder.mkdir(parents=True)
    for index, row in enumerate(meadow.subject(number, 64)):
        row["image"].save(folder / f"{index:02d}.png")
    return folder


def class_folder(folder: Path, number: int = 4) -> Path:
    """A folder with pictures of other butterflies, as a user brings them: nothing has to be generated."""
    folder.mkdir(parents=True)
    drawn = meadow.scenes(number, 64, seed=5, kinds=("butterfly",))
    for index, row in enumerate(drawn):
        row["image"].save(folder / f"{index:02d}.png")
    return folder


def eye_folder(folder: Path, seed: int = 0) -> Path:
    """A ResNet with random weights in the format of the shipped eye, for pictures of 32 px."""
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 24], depths=[1, 1, 1], layer_type="basic")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        ResNetModel(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def dreambooth_words(instance_dir: Path | str, output_dir: Path | str, *flags: str, **fields) -> list[str]:
    """The words of a small run; a field given here goes over `SMALL`. True: a bare flag; None: left out."""
    chosen = SMALL | {"instance_data_dir": str(instance_dir), "output_dir": str(output_dir)} | fields
    named = [
        [f"--{name}"] if value is True else [f"--{name}", str(value)]
        for name, value in chosen.items()
        if value is not None
    ]
    return [*(word for flag in named for word in flag), *flags]


def prior_words(class_dir: Path | str, number: int = 4) -> dict:
    """The fields that preserve the prior."""
    return {
        "with_prior_preservation": True,
        "class_data_dir": str(class_dir),
        "class_prompt": CLASS,
        "num_class_images": number,
    }


def without_our_package(code: str, folder: Path) -> str:
    """Run code in a Python that has the libraries and not `diffusion_lessons`; return what it prints."""
    start = (
        f"import sys; sys.path += {[sysconfig.get_path('purelib'), sysconfig.get_path('platlib')]!r}\n"
        "import importlib.util\nassert importlib.util.find_spec('diffusion_lessons') is None\n"
    )
    # -S: no .pth file is read, so an editable installation is not seen.
    done = subprocess.run([sys.executable, "-S", "-c", start + code], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout

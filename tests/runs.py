"""Small real runs for the tests: the words of a command, the command as a process, and what a run leaves behind."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from safetensors.torch import load_file

TINY = {
    "image_size": 16,
    "model_config_name_or_path": "tiny-16",
    "num_train_images": 32,
    "train_batch_size": 4,
    "eval_batch_size": 2,
    "num_inference_steps": 2,
    "report_to": "none",
    "lr_warmup_steps": 2,
    "learning_rate": 1e-3,
}


def words(output_dir: Path | str, **fields) -> list[str]:
    """The words of a tiny run; a field given here goes over `TINY`, and True stands for a bare flag."""
    chosen = TINY | {"output_dir": str(output_dir)} | fields
    flags = [[f"--{name}"] if value is True else [f"--{name}", str(value)] for name, value in chosen.items()]
    return [word for flag in flags for word in flag]


def command(*arguments: str) -> list[str]:
    """`train-butterflies` with these arguments, in the Python that runs the tests."""
    return [sys.executable, "-m", "diffusion_lessons.butterflies", *arguments]


def run(*arguments: str, timeout: float = 240, **environment: str) -> subprocess.CompletedProcess:
    """Run the command to its end."""
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=timeout, env=os.environ | environment
    )


def state(folder: Path) -> dict[str, torch.Tensor]:
    """All numbers in a checkpoint by name: weights, averages, the optimizer's moments and the generators."""
    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        found |= {f"{path.relative_to(folder)}:{name}": value for name, value in load_file(path).items()}
    optimizer = torch.load(folder / "optimizer.bin", weights_only=True)
    for number, moments in optimizer["state"].items():
        found |= {f"optimizer:{number}:{name}": value for name, value in moments.items()}
    return found


def assert_same_state(first: Path, second: Path) -> None:
    """Fail unless two checkpoints hold the same numbers, bit for bit."""
    one, two = state(first), state(second)
    assert one.keys() == two.keys() and len(one) > 50
    different = [name for name in one if not torch.equal(one[name], two[name])]
    assert not different, f"{len(different)} of {len(one)} tensors differ, the first is {different[0]}"


class Tiny(ModelMixin, ConfigMixin):
    """A straight line, three weights and a bias, which lies on the disk as every model of diffusers does."""

    @register_to_config
    def __init__(self, start: float = 0.0) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([start, start + 1, start + 2]))
        self.bias = torch.nn.Parameter(torch.tensor([start - 1]))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs @ self.weight + self.bias

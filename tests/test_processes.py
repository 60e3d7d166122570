"""Two real CPU processes, through notebook_launcher and torchrun: one run, two sources of noise."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from runs import words

from diffusion_lessons.engine.commands import free_port

PROBE = """
import json, sys
from pathlib import Path
import torch
from diffusion_lessons.butterflies import command, training as butterflies
from diffusion_lessons.engine import run as training
from diffusion_lessons.butterflies.config import PRESETS, TrainingConfig
from diffusion_lessons.engine.command_line import parse_command_line

def note(run, name, value):
    path = Path(run.output_dir).parent / f"{Path(run.output_dir).name}-rank-{run.rank}.json"
    content = json.loads(path.read_text()) if path.exists() else {"num_processes": run.num_processes}
    content.setdefault(name, []).append(value)
    path.write_text(json.dumps(content))

after_step = training.Run._after_step
def noted_step(run):
    note(run, "rates", run.schedule.get_last_lr()[0])
    note(run, "weights", sum(p.double().sum().item() for p in run.models["unet"].parameters()))
    after_step(run)
training.Run._after_step = noted_step

noise_batch = butterflies.noise_batch
def noted_noise(clean, scheduler, generator, **kwargs):
    noised = noise_batch(clean, scheduler, generator, **kwargs)
    current = butterflies.current_run
    note(current, "timesteps", noised.timesteps.tolist())
    note(current, "noise", noised.noisy_images.double().sum().item())
    return noised
butterflies.noise_batch = noted_noise

start_run = butterflies.start_run
import contextlib
@contextlib.contextmanager
def noted_run(*args, **kwargs):
    with start_run(*args, **kwargs) as run:
        butterflies.current_run = run
        yield run
butterflies.start_run = noted_run
raise SystemExit(command.main())
"""


@pytest.fixture(scope="module")
def probe(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("probe") / "probe.py"
    path.write_text(PROBE)
    return path


def start(launcher: list[str], probe: Path, folder: Path, **fields) -> tuple[list[dict], subprocess.CompletedProcess]:
    settings = dict(max_train_steps=12, checkpointing_steps=6, gradient_accumulation_steps=2, num_train_images=33)
    arguments = [*launcher, str(probe), *words(folder, **(settings | fields))]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=240, env=os.environ)
    notes = sorted(folder.parent.glob(f"{folder.name}-rank-*.json"))
    return [json.loads(path.read_text()) for path in notes], done


def launcher(name: str) -> list[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port()]
    return {"one process": [sys.executable], "notebook_launcher": [sys.executable], "torchrun": torchrun}[name]


@pytest.fixture(scope="module")
def alone(probe, tmp_path_factory) -> dict:
    (notes,), done = start(launcher("one process"), probe, tmp_path_factory.mktemp("alone") / "run")
    assert done.returncode == 0, done.stderr
    return notes


@pytest.mark.parametrize("name", ["notebook_launcher", "torchrun"])
def test_two_processes_follow_the_schedule_of_one_with_noise_of_their_own(name, alone, probe, tmp_path):
    extra = {"num_processes": 2} if name == "notebook_launcher" else {}
    notes, done = start(launcher(name), probe, tmp_path / "run", **extra)
    assert done.returncode == 0, done.stderr
    assert [each["num_processes"] for each in notes] == [2, 2] and alone["num_processes"] == 1
    first, second = notes
    assert first["rates"] == second["rates"] == alone["rates"] and len(alone["rates"]) == 12
    assert first["rates"][-1] < 1e-9, "the cosine ends at zero"
    assert first["weights"] == second["weights"], "after every step both hold the same weights"
    pairs = list(zip(first["timesteps"], second["timesteps"], strict=True))
    assert sum(a == b for a, b in pairs) == 0, "no batch got the same timesteps on both"
    assert not set(first["noise"]) & set(second["noise"])
    left = sorted(path.name for path in (tmp_path / "run").iterdir() if not path.name.startswith("."))
    assert left == [
        "README.md",
        "checkpoint-12",
        "checkpoint-6",
        "model_index.json",
        "samples",
        "scheduler",
        "training_config.json",
        "unet",
    ]
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoint-12").glob("generator_*")) == [
        "generator_0.safetensors",
        "generator_1.safetensors",
    ]


def test_two_processes_resume_exactly(probe, tmp_path):
    fields = dict(num_processes=2, use_ema=True)
    whole, done = start(launcher("notebook_launcher"), probe, tmp_path / "whole", **fields)
    assert done.returncode == 0, done.stderr
    resumed, done = start(
        launcher("notebook_launcher"),
        probe,
        tmp_path / "resumed",
        **fields,
        resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"),
    )
    assert done.returncode == 0, done.stderr
    assert [each["num_processes"] for each in resumed] == [2, 2]
    assert [each["weights"] for each in resumed] == [each["weights"][6:] for each in whole]


def test_bad_input_in_two_processes_is_one_line_and_exit_code_2(probe, tmp_path):
    _, done = start(
        launcher("notebook_launcher"), probe, tmp_path / "run", num_processes=2, resume_from_checkpoint="checkpoint-3"
    )
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("train-butterflies: --resume_from_checkpoint checkpoint-3")
    assert "Traceback" not in done.stderr


TRANSFORMS = """
import json, sys
from pathlib import Path
import torch
from torchvision import transforms
from diffusion_lessons.pictures import meadow
from diffusion_lessons.butterflies.training import TrainingConfig, train_loop
from diffusion_lessons.engine.commands import launch
from diffusion_lessons.diffusion.targets import make_noise_scheduler
from diffusion_lessons.diffusion.unet import make_unet

turn = transforms.Compose([transforms.ColorJitter(brightness=0.5), transforms.ToTensor()])

def train(folder, resume):
    seen = []
    def jitter(examples):
        pictures = [turn(image.convert("RGB")) for image in examples["image"]]
        seen.extend(round(picture.sum().item(), 3) for picture in pictures)
        return {"images": pictures}
    dataset = meadow.specimens(16, size=16)
    dataset.set_transform(jitter)
    model = make_unet("tiny-16", 16, seed=0)
    config = TrainingConfig(output_dir=folder, image_size=16, train_batch_size=2, eval_batch_size=1, max_train_steps=8,
                            num_inference_steps=2, report_to="none", checkpointing_steps=6, lr_warmup_steps=0,
                            learning_rate=1e-3, resume_from_checkpoint=resume)
    loader = torch.utils.data.DataLoader(dataset, batch_size=2, shuffle=True)
    train_loop(config, model, make_noise_scheduler(), torch.optim.AdamW(model.parameters(), lr=1e-3), loader)
    import os
    weights = sum(parameter.double().sum().item() for parameter in model.parameters())
    note = {"world": int(os.environ["WORLD_SIZE"]), "weights": weights, "seen": seen}
    Path(f"{folder}-rank-{os.environ['RANK']}.json").write_text(json.dumps(note))

launch(train, (sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None), num_processes=2)
"""


def test_random_transforms_of_a_users_loader_differ_by_epoch_and_resume_exactly_in_two_processes(tmp_path):
    script = tmp_path / "transforms.py"
    script.write_text(TRANSFORMS)
    notes = {}
    for name, extra in (("whole", []), ("resumed", [str(tmp_path / "whole" / "checkpoint-6")])):
        arguments = [sys.executable, str(script), str(tmp_path / name), *extra]
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        notes[name] = [json.loads((tmp_path / f"{name}-rank-{rank}.json").read_text()) for rank in range(2)]
    assert [note["world"] for note in notes["whole"]] == [2, 2]
    both = [value for note in notes["whole"] for value in note["seen"]]
    assert len(set(both)) == len(both) == 32, "two epochs of 16 pictures, each jittered in its own way"
    assert [note["weights"] for note in notes["resumed"]] == [note["weights"] for note in notes["whole"]]

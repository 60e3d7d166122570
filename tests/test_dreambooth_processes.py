"""DreamBooth on two real CPU processes: other class images and other noise on each, one schedule, one folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from dreambooth_runs import CLASS, dreambooth_words, subject_folder
from PIL import Image
from safetensors.torch import load_file

from diffusion_lessons.engine.commands import free_port

MODULE = ["-m", "diffusion_lessons.dreambooth.training"]
FIELDS = dict(
    max_train_steps=6,
    checkpointing_steps=3,
    gradient_accumulation_steps=2,
    lr_scheduler="linear",
    lr_warmup_steps=0,
    with_prior_preservation=True,
    class_prompt=CLASS,
    num_class_images=7,
    sample_batch_size=2,
    report_to="tensorboard",
)
LAUNCHERS = {
    "notebook_launcher": ([sys.executable, *MODULE], ["--num_processes", "2"]),
    "torchrun": ([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"], []),
}


@pytest.fixture(scope="module", params=LAUNCHERS)
def finished(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    subject_folder(folder / "subject", 3)
    command, more = LAUNCHERS[request.param]
    if request.param == "torchrun":
        command = [*command, free_port(), *MODULE]
    words = dreambooth_words(folder / "subject", folder / "run", *more, **FIELDS, class_data_dir=folder / "class")
    done = subprocess.run([*command, *words], capture_output=True, text=True, timeout=400, env=os.environ)
    assert done.returncode == 0, done.stderr
    return folder


def test_there_were_two_processes(finished):
    progress = json.loads((finished / "run" / "checkpoint-6" / "progress.json").read_text())
    assert progress["num_processes"] == 2
    assert progress["steps_per_epoch"] == 2, "7 pairs, 4 batches on each process, 2 micro-steps a step"


def test_every_class_image_is_there_once_and_different(finished):
    pictures = sorted((finished / "class").glob("*.png"))
    assert len(pictures) == 7
    assert len({Image.open(path).tobytes() for path in pictures}) == 7
    assert [int(path.stem.split("-")[-1]) for path in pictures] == list(range(7))


def test_the_processes_draw_different_noise(finished):
    states = [
        load_file(finished / "run" / "checkpoint-3" / f"generator_{rank}.safetensors")["state"] for rank in (0, 1)
    ]
    assert not torch.equal(*states)


def test_the_schedule_ends_where_it_should(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = (path for path in (finished / "run" / "logs").iterdir() if path.is_dir())
    events = EventAccumulator(str(folder)).Reload()
    rates = events.Scalars("train/learning_rate")
    assert rates[-1].step == 6 and rates[-1].value == pytest.approx(0, abs=1e-12)
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]


def test_the_final_folder_is_a_model(finished):
    pipeline = StableDiffusionPipeline.from_pretrained(finished / "run")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(CLASS, num_inference_steps=1, height=32, width=32).images[0].size == (32, 32)
    assert sorted(path.name for path in (finished / "run").glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-6"]


def test_bad_input_is_said_once_and_ends_with_2(tmp_path):
    words = dreambooth_words(tmp_path / "nowhere", tmp_path / "run", "--num_processes", "2")
    done = subprocess.run([sys.executable, *MODULE, *words], capture_output=True, text=True, timeout=240)
    assert done.returncode == 2
    assert done.stderr.startswith("train-dreambooth: --instance_data_dir") and done.stderr.count("\n") == 1

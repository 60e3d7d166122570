"""A DreamBooth run that is killed and resumed ends as one that never stopped, with every option: equal, not close."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from dreambooth_runs import class_folder, dreambooth_words, prior_words, subject_folder
from runs import assert_same_state
from safetensors.torch import load_file

from diffusion_lessons.dreambooth.training import main
from diffusion_lessons.engine.checkpoints import latest_checkpoint, remove_folder

ALL = ["--train_text_encoder", "--use_ema", "--snr_gamma", "5", "--offset_noise"]
MODES = {
    "plain": [],
    "text encoder": ["--train_text_encoder"],
    "ema": ["--use_ema"],
    "prior": ["PRIOR"],
    "lora": ["--lora", "--lora_dropout", "0.1"],
    "random crops": ["--no_cache_latents"],
    "everything": ["PRIOR", *ALL],
    "everything with lora": ["PRIOR", "--lora", "--lora_dropout", "0.1", "--no_cache_latents", *ALL],
}
# Checkpoints in the middle of an epoch of two steps, after two micro-steps each.
LONG = dict(max_train_steps=5, checkpointing_steps=3, gradient_accumulation_steps=2)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    subject_folder(folder / "subject", 4)
    class_folder(folder / "class", 4)
    return folder


def run_words(pictures: Path, output_dir: Path, mode: str, **fields) -> list[str]:
    flags = [flag for flag in MODES[mode] if flag != "PRIOR"]
    prior = prior_words(pictures / "class") if "PRIOR" in MODES[mode] else {}
    return dreambooth_words(pictures / "subject", output_dir, *flags, **(LONG | prior | fields))


def published(folder: Path) -> dict[str, torch.Tensor]:
    """What a finished run offers to others: the weights of the model, or the adapter."""
    files = [
        path for path in folder.rglob("*.safetensors") if not path.relative_to(folder).parts[0].startswith("checkpoint")
    ]
    return {f"{path.relative_to(folder)}:{name}": value for path in files for name, value in load_file(path).items()}


@pytest.mark.parametrize("mode", MODES)
def test_resumed_from_the_middle_equals_uninterrupted(mode, pictures, tmp_path, capsys):
    whole = tmp_path / "whole"
    assert main(run_words(pictures, whole, mode)) == 0, capsys.readouterr().err
    # What a kill after step 3 leaves: the checkpoint, and nothing of what came later.
    killed = Path(shutil.copytree(whole, tmp_path / "killed"))
    remove_folder(killed / "checkpoint-5")
    for path in killed.glob("*.safetensors"):
        path.unlink()
    assert main(run_words(pictures, killed, mode, resume_from_checkpoint="latest")) == 0, capsys.readouterr().err
    assert "resuming checkpoint-3: 3 of 5 steps are done" in capsys.readouterr().out
    assert_same_state(killed / "checkpoint-5", whole / "checkpoint-5")
    one, two = published(whole), published(killed)
    assert one.keys() == two.keys() and one
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_looking_at_a_run_does_not_change_it(pictures, tmp_path):
    """Drawing and measuring in between draws from generators of its own, dropout or not."""
    look = {"validation_prompt": "a photo of a sks butterfly", "num_validation_images": 1, "validation_steps": 1}
    for name, more in (("quiet", {}), ("watched", look)):
        words = run_words(pictures, tmp_path / name, "everything with lora", max_train_steps=2, **more)
        assert main([*words, "--checkpointing_steps", "1"]) == 0
    assert len(list((tmp_path / "watched" / "samples").iterdir())) == 2
    assert_same_state(tmp_path / "watched" / "checkpoint-2", tmp_path / "quiet" / "checkpoint-2")


@pytest.mark.slow
def test_killed_for_real_four_times(pictures, tmp_path):
    """SIGKILL at any moment, everything switched on; the last resume ends where the uninterrupted run ended."""
    long = dict(max_train_steps=60, checkpointing_steps=6, checkpoints_total_limit=2)
    words = run_words(pictures, tmp_path / "whole", "everything with lora", **long)
    assert main(words) == 0
    folder, kills = tmp_path / "killed", 0
    command = [
        sys.executable,
        "-m",
        "diffusion_lessons.dreambooth.training",
        *run_words(pictures, folder, "everything with lora", **long),
        "--resume_from_checkpoint",
        "latest",
    ]
    for _ in range(4):
        before = latest_checkpoint(folder)[0]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        end = time.monotonic() + 240
        while process.poll() is None and time.monotonic() < end:
            newest = latest_checkpoint(folder)[0]
            if newest is not None and (before is None or newest.step > before.step):
                break
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += process.returncode == -signal.SIGKILL
    assert kills == 4, "the run was over before it had been killed four times"
    assert main(run_words(pictures, folder, "everything with lora", **long, resume_from_checkpoint="latest")) == 0
    assert_same_state(folder / "checkpoint-60", tmp_path / "whole" / "checkpoint-60")


@pytest.fixture(scope="module")
def short(pictures, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("short") / "run"
    assert main(run_words(pictures, folder, "lora", max_train_steps=2, checkpointing_steps=1)) == 0
    return folder


def copied(short: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(short, tmp_path / "run"))


def test_a_finished_run_is_resumed_and_ends_at_once(short, pictures, tmp_path, capsys):
    folder = copied(short, tmp_path)
    before = (folder / "pytorch_lora_weights.safetensors").read_bytes()
    words = run_words(
        pictures, folder, "lora", max_train_steps=2, checkpointing_steps=1, resume_from_checkpoint="latest"
    )
    assert main(words) == 0
    assert "2 of 2 steps are done" in capsys.readouterr().out
    assert (folder / "pytorch_lora_weights.safetensors").read_bytes() == before


def test_rate_steps_and_validation_may_change_on_resume(short, pictures, tmp_path, capsys):
    words = run_words(
        pictures,
        copied(short, tmp_path),
        "lora",
        max_train_steps=3,
        learning_rate=5e-5,
        resume_from_checkpoint="checkpoint-1",
    )
    assert main([*words, "--validation_steps", "50"]) == 0
    said = capsys.readouterr().out
    assert "learning_rate changed on resume: 0.0001 -> 5e-05" in said
    assert "max_train_steps changed on resume: 2 -> 3" in said and "validation_steps changed" in said


@pytest.mark.parametrize(
    "fields, part",
    [
        ({"rank": 8}, "--rank 8: was 4 in the checkpoint"),
        ({"instance_prompt": "a photo of a sks beetle"}, "--instance_prompt"),
        ({"seed": 7}, "--seed 7: was 0"),
    ],
)
def test_another_shape_prompt_or_seed_is_refused(fields, part, short, pictures, tmp_path, capsys):
    folder = copied(short, tmp_path)
    words = run_words(pictures, folder, "lora", max_train_steps=2, resume_from_checkpoint="latest", **fields)
    assert main(words) == 2
    error = capsys.readouterr().err
    assert part in error and "--force_resume" in error and error.count("\n") == 1
    assert (folder / "checkpoint-2").is_dir() and (folder / "pytorch_lora_weights.safetensors").is_file()


def test_other_pictures_are_refused(short, tmp_path, capsys):
    other = class_folder(tmp_path / "other", 4)
    folder = copied(short, tmp_path)
    fields = LONG | {"max_train_steps": 2, "resume_from_checkpoint": "latest"}
    words = dreambooth_words(other, folder, *MODES["lora"], **fields)
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "the training pictures" in error and "--force_resume" in error and error.count("\n") == 1


def test_another_model_is_refused_also_under_the_same_name(pictures, tmp_path, capsys):
    from diffusion_lessons import miniature

    base = Path(shutil.copytree(miniature.path(), tmp_path / "base", ignore=shutil.ignore_patterns("clip")))
    words = run_words(pictures, tmp_path / "run", "lora", max_train_steps=1, pretrained_model_name_or_path=str(base))
    assert main(words) == 0
    pipeline = miniature.load(base)
    with torch.no_grad():
        pipeline.unet.conv_in.weight.mul_(1.5)
    pipeline.unet.save_pretrained(base / "unet")
    capsys.readouterr()
    assert main([*words, "--resume_from_checkpoint", "latest"]) == 2
    error = capsys.readouterr().err
    assert "frozen weights" in error and error.count("\n") == 1


def test_the_seed_that_was_drawn_is_kept_on_resume(pictures, tmp_path, capsys):
    words = run_words(pictures, tmp_path / "run", "lora", max_train_steps=1, seed=None)
    assert main(words) == 0
    seed = json.loads((tmp_path / "run" / "training_config.json").read_text())["seed"]
    assert f"seed: {seed}" in capsys.readouterr().out
    assert main([*words, "--max_train_steps", "2", "--resume_from_checkpoint", "latest"]) == 0
    assert json.loads((tmp_path / "run" / "training_config.json").read_text())["seed"] == seed


def test_the_old_layout_of_accelerate_is_recognised_and_the_way_out_is_said(pictures, tmp_path, capsys):
    old = tmp_path / "checkpoint-500"
    old.mkdir()
    for name in ("pytorch_model.bin", "optimizer.bin", "scheduler.bin", "random_states_0.pkl"):
        (old / name).write_bytes(b"0")
    words = run_words(pictures, tmp_path / "run", "plain", resume_from_checkpoint=str(old))
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "generate-images --checkpoint" in error and "--save_pipeline" in error and error.count("\n") == 1

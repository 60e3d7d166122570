"""A run that is killed and resumed ends as one that never stopped: equal, not close."""

import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from runs import assert_same_state, command, run, words

from diffusion_lessons.butterflies.command import main
from diffusion_lessons.butterflies.config import TrainingConfig
from diffusion_lessons.butterflies.training import train_loop
from diffusion_lessons.diffusion.targets import make_noise_scheduler
from diffusion_lessons.diffusion.unet import make_unet
from diffusion_lessons.engine.checkpoints import latest_checkpoint, list_checkpoints
from diffusion_lessons.engine.commands import RunFailed

STEPS = 400
KILLED = dict(
    max_train_steps=STEPS,
    checkpointing_steps=7,
    checkpoints_total_limit=2,
    use_ema=True,
    gradient_accumulation_steps=2,
    save_image_epochs=50,
)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("resume") / "uninterrupted"
    done = run(*words(folder, **KILLED))
    assert done.returncode == 0, done.stderr
    return folder


def wait_until(condition, process: subprocess.Popen, seconds: float = 120) -> bool:
    """Poll quickly; False when the process ended first."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        if process.poll() is not None:
            return False
        time.sleep(0.0005)
    raise AssertionError("waited too long")


def kill_once(folder: Path, inside_a_save: bool, pause: float) -> tuple[bool, bool]:
    """Start or resume the run and SIGKILL it after its next checkpoint; whether it was killed, and within a save."""
    before = max((each.step for each in list_checkpoints(folder)), default=0)
    process = subprocess.Popen(
        command(*words(folder, **KILLED), "--resume_from_checkpoint", "latest"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def partial() -> bool:
        return any(folder.glob(".checkpoint-*.partial/*"))

    alive = wait_until(lambda: any(each.step > before for each in list_checkpoints(folder)), process)
    if alive and inside_a_save:
        alive = wait_until(partial, process)
    elif alive:
        time.sleep(pause)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return process.returncode == -signal.SIGKILL, partial()


def test_six_kills_and_resumes_end_with_the_weights_of_the_uninterrupted_run(uninterrupted, tmp_path):
    chance, folder, kills, torn = random.Random(0), tmp_path / "killed", 0, 0
    for number in range(6):
        killed, within = kill_once(folder, inside_a_save=number % 2 == 0, pause=chance.uniform(0, 0.4))
        kills, torn = kills + killed, torn + (killed and within)
        assert latest_checkpoint(folder)[0] is not None, "a complete checkpoint is there after every kill"
    assert kills == 6, "the run was over before it had been killed six times"
    assert torn >= 1, "at least one kill fell into a save"
    last = run(*words(folder, **KILLED), "--resume_from_checkpoint", "latest")
    assert last.returncode == 0, last.stderr
    assert_same_state(folder / f"checkpoint-{STEPS}", uninterrupted / f"checkpoint-{STEPS}")
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (folder / weights).read_bytes() == (uninterrupted / weights).read_bytes(), "so are the published weights"
    assert not list(folder.glob(".*.partial")), "what the kills left half done was cleaned up"


def test_resuming_a_finished_run_does_nothing_and_succeeds(uninterrupted, capsys):
    before = (uninterrupted / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    assert main(words(uninterrupted, **KILLED, resume_from_checkpoint="latest")) == 0
    assert (uninterrupted / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == before
    assert f"{STEPS} of {STEPS} steps are done" in capsys.readouterr().out


def test_latest_without_a_checkpoint_starts_anew_and_says_so(tmp_path, capsys):
    assert main(words(tmp_path / "new", max_train_steps=2, resume_from_checkpoint="latest")) == 0
    assert "starting anew" in capsys.readouterr().out


@pytest.fixture(scope="module")
def short_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("short") / "run"
    assert main(words(folder, max_train_steps=20, checkpointing_steps=5)) == 0
    return folder


def copied(short_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(short_run, tmp_path / "run"))


def test_learning_rate_and_steps_may_change_and_it_says_so(short_run, tmp_path, capsys):
    folder = copied(short_run, tmp_path)
    changed = words(folder, max_train_steps=30, learning_rate=5e-4, resume_from_checkpoint="checkpoint-10")
    assert main(changed) == 0
    said = capsys.readouterr().out
    assert "learning_rate changed on resume: 0.001 -> 0.0005" in said
    assert "max_train_steps changed on resume: 20 -> 30" in said
    assert "10 of 30 steps are done" in said
    assert list_checkpoints(folder)[-1].step == 30


def test_the_schedule_after_a_changed_resume_is_that_of_the_new_config(short_run, tmp_path):
    config = TrainingConfig(
        output_dir=str(copied(short_run, tmp_path)),
        image_size=16,
        max_train_steps=30,
        model_config_name_or_path="tiny-16",
        num_train_images=32,
        train_batch_size=4,
        eval_batch_size=2,
        num_inference_steps=2,
        report_to="none",
        lr_warmup_steps=2,
        learning_rate=5e-4,
        resume_from_checkpoint="checkpoint-10",
    )
    rates = []
    model = make_unet("tiny-16", 16, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate)
    optimizer.register_step_post_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    from diffusion_lessons.butterflies.command import load_data
    from diffusion_lessons.pictures.sets import make_dataloader

    train_loop(config, model, make_noise_scheduler(), optimizer, make_dataloader(load_data(config), 4))
    expected = [5e-4 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * (step - 2) / 28))).item() for step in range(10, 30)]
    assert rates == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    "change", [{"seed": 5}, {"prediction_type": "sample"}, {"train_batch_size": 8}, {"num_train_images": 40}]
)
def test_what_makes_it_another_run_is_refused_unless_forced(short_run, tmp_path, capsys, change):
    folder = copied(short_run, tmp_path)
    fields = {"max_train_steps": 22, "resume_from_checkpoint": "latest"} | change
    assert main(words(folder, **fields)) == 2
    refusal = capsys.readouterr().err
    assert f"--{next(iter(change))}" in refusal and "--force_resume" in refusal and refusal.count("\n") == 1
    assert main(words(folder, **fields, force_resume=True)) == 0
    assert list_checkpoints(folder)[-1].step == 22


def test_another_model_shape_cannot_be_forced_into_the_weights(short_run, tmp_path, capsys):
    folder = copied(short_run, tmp_path)
    assert (
        main(
            words(
                folder,
                max_train_steps=22,
                resume_from_checkpoint="latest",
                force_resume=True,
                model_config_name_or_path="quick-64",
                image_size=16,
            )
        )
        == 2
    )
    assert "another shape" in capsys.readouterr().err


def test_a_checkpoint_outside_the_output_folder_is_found_by_its_path(short_run, tmp_path):
    out = tmp_path / "elsewhere"
    path = f"{short_run / 'checkpoint-10'}/"
    assert main(words(out, max_train_steps=20, checkpointing_steps=5, resume_from_checkpoint=path)) == 0
    assert_same_state(out / "checkpoint-20", short_run / "checkpoint-20")


def test_going_back_sets_the_later_checkpoints_aside(short_run, tmp_path):
    folder = copied(short_run, tmp_path)
    back = dict(max_train_steps=20, checkpointing_steps=4, learning_rate=5e-4)
    assert main(words(folder, **back, resume_from_checkpoint="checkpoint-5")) == 0
    assert [each.step for each in list_checkpoints(folder)] == [5, 8, 12, 16, 20]
    aside = sorted(path.name for path in folder.glob("abandoned-*"))
    assert aside == ["abandoned-checkpoint-10", "abandoned-checkpoint-15", "abandoned-checkpoint-20"]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "foreign", "old layout"])
def test_a_damaged_or_foreign_checkpoint_is_named_and_nothing_is_lost(short_run, tmp_path, capsys, damage):
    folder = copied(short_run, tmp_path)
    checkpoint = folder / "checkpoint-20"
    weights = checkpoint / "unet" / "diffusion_pytorch_model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "flipped":
        content = bytearray(weights.read_bytes())
        content[-5] ^= 1
        weights.write_bytes(content)
    elif damage == "missing":
        (checkpoint / "optimizer.bin").unlink()
    else:
        shutil.rmtree(checkpoint)
        checkpoint.mkdir()
        (checkpoint / ("model.safetensors" if damage == "old layout" else "notes.txt")).write_text("x")
    assert main(words(folder, max_train_steps=20, resume_from_checkpoint="checkpoint-20")) == 2
    assert "checkpoint-20" in capsys.readouterr().err
    assert len(list_checkpoints(folder)) == 4
    assert main(words(folder, max_train_steps=20, checkpointing_steps=5, resume_from_checkpoint="latest")) == 0
    assert "skipped checkpoint-20" in capsys.readouterr().out
    assert_same_state(folder / "checkpoint-20", short_run / "checkpoint-20")


def test_random_transforms_of_a_users_own_loader_are_resumed_exactly(tmp_path):
    """The tutorial's loader: a Hugging Face data set with flips in set_transform, drawing from the global generator."""
    from torchvision import transforms

    from diffusion_lessons.pictures import meadow

    turn = transforms.Compose(
        [
            transforms.RandomHorizontalFlip(),
            transforms.ColorJitter(brightness=0.5),
            transforms.ToTensor(),
            transforms.Normalize([0.5], [0.5]),
        ]
    )

    def train(folder: str, stop_at: int | None = None, **fields) -> torch.nn.Module:
        dataset = meadow.specimens(20, size=16)
        dataset.set_transform(lambda examples: {"images": [turn(image.convert("RGB")) for image in examples["image"]]})
        model = make_unet("tiny-16", 16, seed=0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        if stop_at:

            def stop(optimizer, *_):
                stop.calls += 1
                if stop.calls == stop_at:
                    raise RunFailed("pulled the plug")

            stop.calls = 0
            optimizer.register_step_pre_hook(stop)
        config = TrainingConfig(
            output_dir=str(tmp_path / folder),
            image_size=16,
            train_batch_size=4,
            eval_batch_size=1,
            num_inference_steps=2,
            report_to="none",
            max_train_steps=12,
            checkpointing_steps=4,
            lr_warmup_steps=0,
            **fields,
        )
        loader = torch.utils.data.DataLoader(dataset, batch_size=4, shuffle=True)
        train_loop(config, model, make_noise_scheduler(), optimizer, loader)
        return model

    whole = train("whole")
    with pytest.raises(RunFailed):
        train("parts", stop_at=8)  # in the second epoch, after checkpoint-4
    parts = train("parts", resume_from_checkpoint="latest")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))

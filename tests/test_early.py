"""What can be known before the work is found before it: trackers without a login, the Hub, a resume, models, space."""

import json
import shutil
from collections import namedtuple

import pytest
from dreambooth_runs import class_folder, dreambooth_words, prior_words, subject_folder
from runs import words

from diffusion_lessons.butterflies.command import main
from diffusion_lessons.butterflies.config import TrainingConfig
from diffusion_lessons.dreambooth import training as dreambooth
from diffusion_lessons.dreambooth.preparation import disk_needed
from diffusion_lessons.engine.checkpointer import check_resume, space_note
from diffusion_lessons.engine.config import InputError, RunConfig
from diffusion_lessons.engine.precision import choose_precision
from diffusion_lessons.engine.tracking import check_tracker

# What wandb 0.31 and comet_ml 3.58 do without an account and without a terminal, in a few lines each.
WANDB = """
import os
class UsageError(Exception): pass
def login():
    if not os.environ.get("WANDB_API_KEY"):
        raise UsageError("No API key configured. Use `wandb login` to log in.")
    return True
"""
COMET = """
import os
def get_config(name): return os.environ.get("COMET_API_KEY")
"""


@pytest.fixture
def trackers(tmp_path, monkeypatch):
    """Stand-ins for two trackers with accounts, installed and not logged in."""
    for name, text in (("wandb", WANDB), ("comet_ml", COMET)):
        (tmp_path / "packages" / name).mkdir(parents=True)
        (tmp_path / "packages" / name / "__init__.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    for name in ("WANDB_API_KEY", "WANDB_MODE", "COMET_API_KEY", "RANK"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.mark.parametrize("chosen, tracker, remedy", [
    ("wandb", r"wandb cannot start \(.*UsageError: No API key configured", "`wandb login`, set WANDB_MODE=offline"),
    ("comet_ml", r"comet_ml cannot start \(no API key\)", "set COMET_API_KEY"),
    ("all", "wandb cannot start", "or take another tracker"),
])  # fmt: skip
def test_a_tracker_without_a_login_is_refused_with_the_remedy(trackers, chosen, tracker, remedy):
    with pytest.raises(InputError, match=f"^--report_to {chosen}: {tracker}.*{remedy}"):
        check_tracker(chosen)


def test_a_tracker_with_a_login_or_without_need_of_one_is_not(trackers, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "k")
    check_tracker("wandb")
    monkeypatch.setenv("COMET_API_KEY", "k")
    check_tracker("all")
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_tracker("wandb")
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("RANK", "1")
    check_tracker("wandb")  # the first process asks for all
    check_tracker("tensorboard")
    check_tracker("none")


def test_a_server_that_does_not_answer_keeps_no_run_from_training(trackers, monkeypatch):
    import subprocess

    def late(*_, **__):
        raise subprocess.TimeoutExpired("wandb", 60)

    monkeypatch.setattr(subprocess, "run", late)
    check_tracker("wandb")


def test_no_class_image_is_drawn_for_a_tracker_that_cannot_start(trackers, capsys):
    given = dreambooth_words(subject_folder(trackers / "pictures"), trackers / "run", report_to="wandb",
                             **prior_words(trackers / "class", 2))  # fmt: skip
    assert dreambooth.main(given) == 2
    assert "wandb login" in capsys.readouterr().err
    assert not (trackers / "class").exists() and not (trackers / "run").exists()


@pytest.mark.parametrize(
    "name, value", [("HF_HUB_OFFLINE", "1"), ("HF_HUB_OFFLINE", "true"), ("TRANSFORMERS_OFFLINE", "1")]
)
def test_an_upload_while_offline_is_refused_with_a_token_too(monkeypatch, name, value):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=f"^--push_to_hub True: {name}={value} is set"):
        RunConfig(push_to_hub=True, hub_token="hf_secret")
    monkeypatch.setenv(name, "0")
    assert RunConfig(push_to_hub=True, hub_token="hf_secret").push_to_hub


def test_a_resume_that_is_another_run_is_refused_before_data_are_loaded(tmp_path, monkeypatch, capsys):
    from diffusion_lessons.butterflies import command

    folder = tmp_path / "run"
    assert main(words(folder, max_train_steps=1, num_train_images=4)) == 0
    capsys.readouterr()
    monkeypatch.setattr(command, "load_data", lambda config: pytest.fail("data were loaded"))
    changed = words(folder, max_train_steps=2, num_train_images=4, seed=1)
    for choice in ("latest", "checkpoint-1", str(folder / "checkpoint-1")):
        assert main([*changed, "--resume_from_checkpoint", choice]) == 2
        assert "--seed 1: was 0 in the checkpoint" in capsys.readouterr().err
    check_resume(TrainingConfig(output_dir=str(tmp_path / "new"), resume_from_checkpoint="latest"))


def test_a_seed_that_nobody_declared_is_the_checkpoints(tmp_path, capsys):
    folder, pictures = tmp_path / "run", subject_folder(tmp_path / "pictures")
    given = dreambooth_words(pictures, folder, max_train_steps=1, lora=True, seed=None)
    assert dreambooth.main(given) == 0
    assert dreambooth.main([*given, "--resume_from_checkpoint", "latest", "--max_train_steps", "2"]) == 0
    again = [*given, "--resume_from_checkpoint", "latest", "--rank", "8"]
    capsys.readouterr()
    assert dreambooth.main(again) == 2 and "--rank 8: was 4" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["fidelity_model", "subject_model", "tokenizer_name"])
def test_other_models_are_looked_at_before_the_model_is_loaded(tmp_path, monkeypatch, capsys, flag):
    monkeypatch.setattr(dreambooth, "launch", lambda *_: pytest.fail("the work began"))
    given = dreambooth_words(subject_folder(tmp_path / "pictures"), tmp_path / "run", **{flag: tmp_path / "nothing"})
    assert dreambooth.main(given) == 2
    assert f"--{flag} {tmp_path / 'nothing'}: cannot be loaded" in capsys.readouterr().err


def test_a_disk_without_room_for_the_result_is_said(tmp_path, monkeypatch, capsys):
    usage = namedtuple("usage", "total used free")
    assert space_note(tmp_path / "new" / "run", 1, 1) is None
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 0, 10**3))
    assert main(words(tmp_path / "run", max_train_steps=1, num_train_images=4)) == 0
    assert "GB are free there; a checkpoint needs about" in capsys.readouterr().out
    pictures = subject_folder(tmp_path / "pictures")
    assert dreambooth.main(dreambooth_words(pictures, tmp_path / "full", max_train_steps=1)) == 0
    assert "GB are free there" in capsys.readouterr().out
    assert dreambooth.main(dreambooth_words(pictures, tmp_path / "lora", max_train_steps=1, lora=True)) == 0
    assert "GB are free there" not in capsys.readouterr().out, "an adapter is small"


def test_the_room_that_is_asked_for_is_about_what_is_written(tmp_path):
    folder = tmp_path / "run"
    given = dreambooth_words(subject_folder(tmp_path / "pictures"), folder, max_train_steps=1, use_ema=True,
                             train_text_encoder=True)  # fmt: skip
    assert dreambooth.main(given) == 0
    config = json.loads((folder / "training_config.json").read_text())
    config = dreambooth.DreamBoothConfig(**config).resolve()
    checkpoint, model = disk_needed(config, dreambooth.find_model("miniature"))

    def size(path):
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())

    assert 0.8 < size(folder / "checkpoint-1") / checkpoint < 1.25
    written = sum(size(folder / name) for name in ("unet", "vae", "text_encoder"))
    assert 0.7 < written / model < 1.3


def test_a_precision_of_accelerates_that_is_not_served_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(InputError, match="^--mixed_precision fp8: comes from ACCELERATE_MIXED_PRECISION"):
        choose_precision(None, "cuda")
    assert choose_precision("bf16", "cuda") == "bf16"


def test_class_images_of_ones_own_need_no_drawing(tmp_path):
    """The early checks let pass what a run may do."""
    given = dreambooth_words(subject_folder(tmp_path / "pictures"), tmp_path / "run", max_train_steps=1, lora=True,
                             fidelity_model="none", **prior_words(class_folder(tmp_path / "class", 2), 2))  # fmt: skip
    assert dreambooth.main(given) == 0

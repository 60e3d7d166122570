"""train-butterflies, from its words to what it leaves behind."""

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline
from diffusers.optimization import get_cosine_schedule_with_warmup
from PIL import Image
from runs import run, words

from diffusion_lessons.butterflies import training as butterflies
from diffusion_lessons.butterflies.command import main
from diffusion_lessons.butterflies.training import TrainingConfig, evaluate, grid_shape, make_grid, train_loop
from diffusion_lessons.diffusion.targets import make_noise_scheduler
from diffusion_lessons.diffusion.unet import make_unet
from diffusion_lessons.engine.checkpoints import list_checkpoints
from diffusion_lessons.engine.output_folder import lock_output_dir
from diffusion_lessons.engine.run import Run
from diffusion_lessons.pictures.sets import load_images, make_dataloader


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "butterflies"
    assert (
        main(
            words(
                folder,
                num_epochs=3,
                save_image_epochs=2,
                checkpointing_steps=10,
                use_ema=True,
                eval_batch_size=4,
                report_to="tensorboard",
                hub_token="hf_secret_token",
            )
        )
        == 0
    )
    return folder


def test_what_a_run_leaves_behind(finished):
    names = {path.name for path in finished.iterdir() if not path.name.startswith(".")}
    assert names == {
        "samples",
        "logs",
        "checkpoint-10",
        "checkpoint-20",
        "checkpoint-24",
        "model_index.json",
        "unet",
        "scheduler",
        "training_config.json",
        "README.md",
    }
    assert sorted(path.name for path in (finished / "samples").iterdir()) == ["0001.png", "0002.png"]
    assert Image.open(finished / "samples" / "0002.png").size == (32, 32), "a grid of 2 x 2 pictures of 16 px"
    assert "samples/0002.png" in (finished / "README.md").read_text()
    config = json.loads((finished / "training_config.json").read_text())
    assert config["num_epochs"] == 3 and config["use_ema"] is True


def test_no_token_in_anything_that_was_written(finished):
    for path in finished.rglob("*"):
        assert not path.is_file() or b"hf_secret_token" not in path.read_bytes(), path


def test_plain_diffusers_samples_from_the_folder_without_our_package(finished):
    code = (
        f"from diffusers import DDPMPipeline; pipeline = DDPMPipeline.from_pretrained({str(finished)!r});"
        "import sys; image = pipeline(num_inference_steps=3).images[0]; print(image.size,"
        "any(name.split('.')[0] == 'diffusion_lessons' for name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=finished)
    assert done.stdout.strip() == "(16, 16) False", done.stderr


def test_the_pipeline_holds_the_averaged_weights_and_the_checkpoint_both(finished):
    from safetensors.torch import load_file

    name = "diffusion_pytorch_model.safetensors"
    published = load_file(finished / "unet" / name)
    average = load_file(finished / "checkpoint-24" / "unet_ema" / name)
    trained = load_file(finished / "checkpoint-24" / "unet" / name)
    assert all(torch.equal(published[key], average[key]) for key in published)
    assert any(not torch.equal(published[key], trained[key]) for key in published)


def test_tensorboard_has_loss_rate_and_pictures(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = (path for path in (finished / "logs").iterdir() if path.is_dir())
    events = EventAccumulator(str(folder))
    events.Reload()
    losses = events.Scalars("train/loss")
    assert [event.step for event in losses] == list(range(1, 25)) and all(np.isfinite(event.value) for event in losses)
    assert events.Scalars("train/learning_rate")[-1].value < 1e-9
    assert [event.step for event in events.Images("samples")] == [16, 24]


def test_the_same_words_give_the_same_weights(finished, tmp_path):
    assert main(words(tmp_path / "again", num_epochs=3, save_image_epochs=1, use_ema=True, eval_batch_size=8)) == 0
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (finished / weights).read_bytes(), (
        "sampling, checkpoints and trackers must not touch the run's randomness"
    )


def test_accumulation_ends_the_cosine_at_zero(tmp_path, monkeypatch):
    rates = []
    after = Run._after_step
    monkeypatch.setattr(Run, "_after_step", lambda run: (rates.append(run.schedule.get_last_lr()[0]), after(run)))
    assert main(words(tmp_path / "run", num_epochs=4, gradient_accumulation_steps=4, num_train_images=30)) == 0
    assert len(rates) == 8, "30 pictures in batches of 4 are 8 batches, 2 steps an epoch"
    assert rates[-1] < 1e-12 and max(rates) == pytest.approx(1e-3)


# --- the tutorial's own calls ---


def tutorial_parts(folder: Path, **fields):
    config = TrainingConfig(
        output_dir=str(folder),
        image_size=16,
        num_epochs=2,
        train_batch_size=8,
        eval_batch_size=2,
        num_inference_steps=2,
        report_to="none",
        lr_warmup_steps=2,
        save_image_epochs=1,
        **fields,
    )
    model, scheduler = make_unet("tiny-16", 16, seed=0), make_noise_scheduler()
    loader = make_dataloader(load_images(image_size=16, num_images=32), 8)
    return config, model, scheduler, torch.optim.AdamW(model.parameters(), lr=1e-3), loader


def test_a_schedule_of_the_right_length_is_used_without_a_warning(tmp_path, capsys):
    config, model, scheduler, optimizer, loader = tutorial_parts(tmp_path / "run")
    schedule = get_cosine_schedule_with_warmup(optimizer, 2, len(loader) * config.num_epochs)
    losses = train_loop(config, model, scheduler, optimizer, loader, schedule)
    assert len(losses) == 8 and schedule.get_last_lr()[0] < 1e-12
    assert "warning" not in capsys.readouterr().out


def test_a_schedule_that_forgot_the_accumulation_gets_a_warning(tmp_path, capsys):
    config, model, scheduler, optimizer, loader = tutorial_parts(tmp_path / "run", gradient_accumulation_steps=4)
    schedule = get_cosine_schedule_with_warmup(optimizer, 0, len(loader) * config.num_epochs)
    train_loop(config, model, scheduler, optimizer, loader, schedule)
    assert "still at 85% of the peak" in capsys.readouterr().out


def test_evaluate_and_make_grid_have_the_tutorials_signatures(tmp_path):
    config, model, scheduler, *_ = tutorial_parts(tmp_path / "run")
    evaluate(config, 7, DDPMPipeline(model, scheduler))
    assert Image.open(tmp_path / "run" / "samples" / "0007.png").size == (32, 16)
    assert make_grid([Image.new("RGB", (5, 4))] * 6, rows=2, cols=3).size == (15, 8)
    assert grid_shape(16) == (4, 4)


def test_float_batches_of_the_tutorials_transforms_are_not_flipped_again(tmp_path):
    config, *_ = tutorial_parts(tmp_path / "run")

    generator = torch.Generator().manual_seed(0)
    pictures = torch.rand(64, 3, 4, 4) * 2 - 1
    assert torch.equal(butterflies.prepare_batch(pictures, config, generator), pictures)
    pixels = torch.randint(0, 256, (64, 3, 4, 4), dtype=torch.uint8)
    flipped = butterflies.prepare_batch(pixels, config, generator)
    same = sum(
        torch.equal(a, b.float() / 127.5 - 1) or torch.allclose(a, b.float() / 127.5 - 1, atol=1e-6)
        for a, b in zip(flipped, pixels, strict=True)
    )
    assert 16 < same < 48


@pytest.mark.parametrize(
    "fields",
    [
        {"sampler": "ddpm", "num_inference_steps": 5, "ddpm_num_steps": 50},
        {"prediction_type": "v_prediction", "snr_gamma": 5.0},
        {"prediction_type": "sample"},
        {"mixed_precision": "bf16"},
        {"scale_lr": True},
        {"lr_scheduler": "linear"},
        {"dataloader_num_workers": 1},
        {"resize": "pad"},
    ],
)
def test_choices_train(tmp_path, fields):
    assert main(words(tmp_path / "run", **({"max_train_steps": 3} | fields))) == 0
    assert (tmp_path / "run" / "model_index.json").is_file()


def test_fine_tuning_starts_from_the_weights_and_the_schedule_of_a_pipeline(finished, tmp_path):
    assert (
        main(
            words(
                tmp_path / "run",
                max_train_steps=1,
                learning_rate=1e-9,
                lr_warmup_steps=0,
                pretrained_model_name_or_path=finished,
            )
        )
        == 0
    )
    before = DDPMPipeline.from_pretrained(finished).unet.state_dict()
    after = DDPMPipeline.from_pretrained(tmp_path / "run").unet.state_dict()
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)
    card = (tmp_path / "run" / "README.md").read_text()
    assert "base_model:" not in card, "a local path means nothing to others"


def test_dry_run_says_steps_memory_and_time_and_writes_nothing(tmp_path, capsys):
    assert main(words(tmp_path / "run", num_epochs=5, dry_run=True)) == 0
    said = capsys.readouterr().out
    assert "40 steps" in said and "minutes" in said and "GiB" in said
    assert not (tmp_path / "run").exists()


def test_photographs_train(shared_data, tmp_path):
    assert (
        main(
            words(
                tmp_path / "run",
                dataset_name="imagefolder",
                train_data_dir=shared_data / "butterflies",
                resize="pad",
                max_train_steps=3,
            )
        )
        == 0
    )
    assert (tmp_path / "run" / "samples").is_dir()


# --- bad input: one line, exit code 2, nothing written or lost ---


def refused(capsys, tmp_path: Path, *named: str, **fields) -> str:
    before = sorted(path for path in tmp_path.rglob("*"))
    assert main(words(fields.pop("output_dir", tmp_path / "out"), **({"max_train_steps": 1} | fields))) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and line.startswith("train-butterflies: ") and "Traceback" not in line, line
    for word in named:
        assert word in line, line
    assert sorted(path for path in tmp_path.rglob("*")) == before, "something was written"
    return line


def test_folders_that_hold_no_pictures(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "notes.txt").write_text("no picture")
    for name in ("missing", "empty", "texts"):
        refused(capsys, tmp_path, "--train_data_dir", name, train_data_dir=tmp_path / name)


def test_an_unreadable_picture_is_named_and_skipped_on_request(tmp_path, capsys):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(4):
        Image.new("RGB", (20, 20), (60 * number, 0, 0)).save(folder / f"{number}.png")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 nothing more")
    refused(capsys, tmp_path, "broken.jpg", "--on_bad_image", train_data_dir=folder)
    assert main(words(tmp_path / "out", max_train_steps=1, train_data_dir=folder, on_bad_image="skip")) == 0


def test_sizes_and_batches_that_do_not_fit(tmp_path, capsys):
    refused(capsys, tmp_path, "--image_size 100", image_size=100, model_config_name_or_path="quick-64")
    refused(capsys, tmp_path, "--train_batch_size 33", "32", train_batch_size=33)


def test_a_hub_id_while_offline(tmp_path, capsys):
    refused(
        capsys,
        tmp_path,
        "--dataset_name huggan/smithsonian_butterflies_subset",
        dataset_name="huggan/smithsonian_butterflies_subset",
    )
    refused(
        capsys,
        tmp_path,
        "--pretrained_model_name_or_path google/ddpm-cat-256",
        pretrained_model_name_or_path="google/ddpm-cat-256",
    )
    refused(
        capsys,
        tmp_path,
        "--model_config_name_or_path google/ddpm-cat-256",
        model_config_name_or_path="google/ddpm-cat-256",
    )


def test_trackers_and_optimizers_that_are_not_installed(tmp_path, capsys, monkeypatch):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "wandb" else found(name, *rest)
    )
    refused(capsys, tmp_path, "--report_to wandb", "pip install", report_to="wandb")
    if found("bitsandbytes") is None:
        refused(capsys, tmp_path, "--use_8bit_adam", "pip install", use_8bit_adam=True)


def test_fp16_without_a_gpu(tmp_path, capsys):
    refused(capsys, tmp_path, "--mixed_precision fp16", "bf16", mixed_precision="fp16")


def test_an_output_folder_that_holds_something_else_is_left_alone(tmp_path, capsys):
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "chapter.tex").write_text("years of work")
    refused(capsys, tmp_path, "--output_dir", "something else", output_dir=folder)
    refused(capsys, tmp_path, "--output_dir", output_dir=folder, resume_from_checkpoint="latest")
    (tmp_path / "file").write_text("x")
    refused(capsys, tmp_path, "--output_dir", "is a file", output_dir=tmp_path / "file")
    assert (folder / "chapter.tex").read_text() == "years of work"


def test_an_earlier_run_is_replaced_only_when_allowed_and_an_unfinished_one_is_kept(finished, tmp_path, capsys):
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    refused(capsys, tmp_path, "--overwrite_output_dir", output_dir=folder, overwrite_output_dir=False)
    (folder / "my notes.txt").write_text("keep me")
    assert main(words(folder, max_train_steps=2)) == 0
    assert [each.step for each in list_checkpoints(folder)] == [2] and (folder / "my notes.txt").exists()
    assert not (tmp_path / "run.previous").exists(), "a finished run needs no copy"

    shutil.rmtree(folder)
    shutil.copytree(finished, folder)
    shutil.rmtree(folder / "checkpoint-24")
    assert main(words(folder, max_train_steps=2)) == 0
    assert (tmp_path / "run.previous" / "checkpoint-20").is_dir()


def test_a_second_unfinished_run_does_not_replace_the_rescue_of_the_first(finished, tmp_path):
    folder = tmp_path / "run"
    (tmp_path / "run.previous").mkdir()
    (tmp_path / "run.previous" / "mine.txt").write_text("not yours to delete")
    shutil.copytree(finished, folder)
    shutil.rmtree(folder / "checkpoint-24")
    assert main(words(folder, max_train_steps=2)) == 0
    assert (tmp_path / "run.previous" / "mine.txt").exists()
    assert (tmp_path / "run.previous-2" / "checkpoint-20").is_dir()


def test_a_run_that_fails_while_it_starts_does_not_cost_the_finished_one(finished, tmp_path, monkeypatch):
    from diffusion_lessons.engine import run as training

    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    before = (folder / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()

    def refuse(*_):
        raise RuntimeError("the tracker wants a login")

    monkeypatch.setattr(training, "start_tracker", refuse)
    assert main(words(folder, max_train_steps=2)) == 1
    kept = tmp_path / "run.previous" / "unet" / "diffusion_pytorch_model.safetensors"
    assert kept.read_bytes() == before


def test_the_model_forgets_the_precision_of_the_run(tmp_path):
    config, model, scheduler, optimizer, loader = tutorial_parts(tmp_path / "run", mixed_precision="bf16")
    picture = torch.zeros(1, 3, 16, 16)
    before = model.forward.__func__
    train_loop(config, model, scheduler, optimizer, loader)
    assert model.forward.__func__ is before
    assert model(picture, 1).sample.dtype == torch.float32


def test_two_runs_do_not_share_a_folder(tmp_path, capsys):
    lock = lock_output_dir(tmp_path / "out")
    refused(capsys, tmp_path, "--output_dir", "another run")
    lock.release()
    assert main(words(tmp_path / "out", max_train_steps=1)) == 0


# --- runs that go wrong ---


def test_a_loss_that_is_not_finite_stops_with_the_last_good_checkpoint_named(tmp_path, capsys, monkeypatch):
    after = Run._after_step

    def poisoned(run):
        after(run)
        if run.global_step == 13:
            next(iter(run.models["unet"].parameters())).data.fill_(float("nan"))

    monkeypatch.setattr(Run, "_after_step", poisoned)
    assert main(words(tmp_path / "run", max_train_steps=40, checkpointing_steps=6)) == 1
    line = capsys.readouterr().err
    assert "not finite at step 14" in line and "checkpoint-12" in line and "--resume_from_checkpoint latest" in line
    assert [each.step for each in list_checkpoints(tmp_path / "run")] == [6, 12]


def test_weights_spoiled_by_the_last_step_before_a_save_are_not_saved(tmp_path, capsys, monkeypatch):
    after = Run._after_step

    def poisoned(run):
        if run.global_step == 12:
            next(iter(run.models["unet"].parameters())).data.fill_(float("inf"))
        after(run)

    monkeypatch.setattr(Run, "_after_step", poisoned)
    assert main(words(tmp_path / "run", max_train_steps=40, checkpointing_steps=6)) == 1
    assert "checkpoint-6" in capsys.readouterr().err
    assert [each.step for each in list_checkpoints(tmp_path / "run")] == [6]


def test_a_full_disk_leaves_the_previous_checkpoint_whole(tmp_path):
    """On a real file system of 3 MB, where the second checkpoint does not fit."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("making a small file system needs root")
    try:
        done = run(
            *words(disk / "run", max_train_steps=60, checkpointing_steps=10, checkpoints_total_limit=5, use_ema=True)
        )
        assert done.returncode == 1, done.stdout
        assert (
            "could not be written" in done.stderr
            and "free some space" in done.stderr
            and "Traceback" not in done.stderr
        )
        left = list_checkpoints(disk / "run")
        assert left and all(each.fault(thorough=True) is None for each in left)
        assert f"Last good checkpoint: {left[-1].path.name}" in done.stderr
        assert not list((disk / "run").glob(".checkpoint-*")), "the half written one was removed, to free its space"
    finally:
        subprocess.run(["umount", disk], check=True)


def test_out_of_memory_names_a_smaller_batch(tmp_path, capsys, monkeypatch):
    def exhausted(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(butterflies, "noise_batch", exhausted)
    assert main(words(tmp_path / "run", max_train_steps=2)) == 1
    assert "--train_batch_size 2 --gradient_accumulation_steps 2" in capsys.readouterr().err


def test_nothing_is_unpickled_from_a_checkpoint(tmp_path, capsys):
    """An optimizer file that would run code when unpickled is refused, and the code does not run."""
    import hashlib
    import pickle

    folder, marker = tmp_path / "run", tmp_path / "owned"
    assert main(words(folder, max_train_steps=2)) == 0

    class Evil:
        def __reduce__(self):
            return (Path.touch, (marker,))

    for name in ("optimizer.bin", "random_states_0.pkl"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            evil = pickle.dumps({"state": Evil(), "param_groups": []})
        (folder / "checkpoint-2" / name).write_bytes(evil)
        manifest = json.loads((folder / "checkpoint-2" / "manifest.json").read_text())
        manifest[name] = {"bytes": len(evil), "sha256": hashlib.sha256(evil).hexdigest()}
        (folder / "checkpoint-2" / "manifest.json").write_text(json.dumps(manifest))
        assert main(words(folder, max_train_steps=3, resume_from_checkpoint="latest")) != 0
        assert not marker.exists()

"""The commands of Hugging Face's DreamBooth guide, with only model, folders, resolution and step counts changed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from dreambooth_runs import CLASS, SUBJECT, class_folder, subject_folder, without_our_package
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPTextModel

from diffusion_lessons import miniature
from diffusion_lessons.dreambooth import inference, training

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def dog(tmp_path_factory) -> Path:
    """The guide's folder `./dog`."""
    return subject_folder(tmp_path_factory.mktemp("guide") / "dog", 5)


def guide(folder: Path, dog: Path, *more: str) -> int:
    """What the guide's commands share."""
    return training.main(
        [
            "--pretrained_model_name_or_path=miniature",
            f"--instance_data_dir={dog}",
            f"--output_dir={folder}",
            f"--instance_prompt={SUBJECT}",
            "--resolution=32",
            "--train_batch_size=1",
            "--gradient_accumulation_steps=1",
            "--lr_scheduler=constant",
            "--lr_warmup_steps=0",
            "--report_to=none",
            *more,
        ]
    )


@pytest.fixture(scope="module")
def plain(dog, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "model"
    assert guide(folder, dog, "--learning_rate=5e-6", "--max_train_steps=6", "--checkpointing_steps=2", "--seed=0") == 0
    return folder


@pytest.fixture(scope="module")
def with_text_encoder(dog, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text") / "model"
    prior = [
        "--with_prior_preservation",
        "--prior_loss_weight=1.0",
        f"--class_prompt={CLASS}",
        "--num_class_images=3",
        f"--class_data_dir={folder.parent / 'class'}",
    ]
    assert (
        guide(
            folder,
            dog,
            "--train_text_encoder",
            "--gradient_checkpointing",
            "--learning_rate=2e-6",
            "--max_train_steps=3",
            "--checkpointing_steps=2",
            *prior,
        )
        == 0
    )
    return folder


@pytest.fixture(scope="module")
def lora(dog, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lora") / "adapter"
    assert (
        guide(
            folder,
            dog,
            "--lora",
            "--checkpointing_steps=2",
            "--learning_rate=1e-4",
            "--max_train_steps=5",
            "--validation_prompt=a photo of a sks butterfly on snow",
            "--validation_epochs=50",
            "--num_validation_images=2",
            "--seed=0",
            "--train_text_encoder",
            "--lora_format=kohya",
        )
        == 0
    )
    return folder


def test_plain_fine_tuning_changes_the_unet_and_nothing_else(plain):
    before, after = load_file(miniature.path() / "unet" / WEIGHTS), load_file(plain / "unet" / WEIGHTS)
    assert before.keys() == after.keys()
    moved = torch.stack([(after[name].float() - before[name].float()).abs().max() for name in before])
    assert 0 < moved.max() < 1e-3, "six steps of 5e-6"
    for part in ("vae", "text_encoder", "tokenizer", "scheduler"):
        for file in (miniature.path() / part).iterdir():
            assert (plain / part / file.name).read_bytes() == file.read_bytes(), file
    assert [path.name for path in sorted(plain.glob("checkpoint-*"))] == [
        "checkpoint-2",
        "checkpoint-4",
        "checkpoint-6",
    ]


def test_prior_preservation_generates_the_missing_class_images(with_text_encoder):
    pictures = sorted((with_text_encoder.parent / "class").glob("*.png"))
    assert len(pictures) == 3 and len({path.read_bytes() for path in pictures}) == 3
    assert all(Image.open(path).size == (64, 64) for path in pictures), "at the model's own size"
    (about,) = json.loads((with_text_encoder.parent / "class" / "class_images.json").read_text()).values()
    assert about["prompt"] == CLASS


def test_the_text_encoder_is_trained_and_saved(with_text_encoder):
    before = load_file(miniature.path() / "text_encoder" / "model.safetensors")
    after = CLIPTextModel.from_pretrained(with_text_encoder / "text_encoder").state_dict()
    known = {name.removeprefix("text_model."): weight.float() for name, weight in before.items()}
    moved = [(after[name].float() - known[name.removeprefix("text_model.")]).abs().max() for name in after]
    assert 0 < torch.stack(moved).max() < 1e-3


def test_resume_by_name_and_by_latest(plain, dog, tmp_path, capsys):
    import shutil

    for choice, start in (("checkpoint-4", 4), ("latest", 6)):
        folder = Path(shutil.copytree(plain, tmp_path / choice))
        again = ["--learning_rate=5e-6", "--max_train_steps=8", "--checkpointing_steps=2", "--seed=0"]
        assert guide(folder, dog, *again, f"--resume_from_checkpoint={choice}") == 0
        assert f"resuming checkpoint-{start}: {start} of 8 steps are done" in capsys.readouterr().out
        assert (folder / "checkpoint-8").is_dir()


def test_resume_from_a_path_outside_the_output_folder_and_with_a_slash_at_its_end(plain, dog, tmp_path, capsys):
    again = ["--learning_rate=5e-6", "--max_train_steps=6", "--checkpointing_steps=2", "--seed=0"]
    assert guide(tmp_path / "new", dog, *again, f"--resume_from_checkpoint={plain / 'checkpoint-4'}/") == 0
    assert "4 of 6 steps are done" in capsys.readouterr().out
    for part in ("unet",):
        assert (tmp_path / "new" / part / WEIGHTS).read_bytes() == (plain / part / WEIGHTS).read_bytes()


def test_at_most_so_many_checkpoints_are_kept(dog, tmp_path):
    assert (
        guide(
            tmp_path / "run",
            dog,
            "--lora",
            "--max_train_steps=4",
            "--checkpointing_steps=1",
            "--checkpoints_total_limit=2",
        )
        == 0
    )
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-4"}


def test_inference_from_a_checkpoint_in_the_guides_own_way(with_text_encoder):
    checkpoint = with_text_encoder / "checkpoint-2"
    pipeline = DiffusionPipeline.from_pretrained(
        miniature.path(),
        unet=UNet2DConditionModel.from_pretrained(checkpoint / "unet"),
        text_encoder=CLIPTextModel.from_pretrained(checkpoint / "text_encoder"),
    )
    image = pipeline(SUBJECT, num_inference_steps=2, height=32, width=32).images[0]
    assert image.size == (32, 32)


def test_generate_images_from_model_checkpoint_and_adapter(plain, with_text_encoder, lora, tmp_path, capsys):
    sources = (
        ["--model_path", plain],
        ["--model_path", "miniature", "--checkpoint", with_text_encoder / "checkpoint-2"],
        ["--model_path", "miniature", "--lora_weights", lora],
        ["--checkpoint", lora / "checkpoint-4"],
    )
    for number, source in enumerate(sources):
        words = [
            *map(str, source),
            "--prompt",
            SUBJECT,
            "--num_images",
            "2",
            "--num_inference_steps",
            "2",
            "--output_dir",
            str(tmp_path / str(number)),
            "--resolution",
            "32",
        ]
        assert inference.main(words) == 0, capsys.readouterr().err
        drawn = sorted((tmp_path / str(number)).glob("*.png"))
        assert [path.name for path in drawn] == ["0000.png", "0001.png"]
        assert all(Image.open(path).size == (32, 32) for path in drawn)


def test_lora_leaves_its_file_and_the_validation_pictures(lora):
    assert {"pytorch_lora_weights.safetensors", "pytorch_lora_weights_kohya.safetensors"} <= set(os.listdir(lora))
    assert not (lora / "unet").exists() and not (lora / "model_index.json").exists()
    assert [path.name for path in (lora / "samples").iterdir()] == ["step-000005.png"]
    assert (lora / "pytorch_lora_weights.safetensors").stat().st_size < 1_000_000


def test_everything_opens_in_plain_diffusers_without_our_package(plain, with_text_encoder, lora, tmp_path):
    code = f"""
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel

def draw(pipeline, **options):
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(0)
    return pipeline({SUBJECT!r}, num_inference_steps=2, height=32, width=32, generator=noise, output_type="np",
                    **options).images

base = {str(miniature.path())!r}
for folder in {[str(plain), str(with_text_encoder)]!r}:
    draw(StableDiffusionPipeline.from_pretrained(folder))
UNet2DConditionModel.from_pretrained({str(with_text_encoder / "checkpoint-2" / "unet")!r})
CLIPTextModel.from_pretrained({str(with_text_encoder / "checkpoint-2" / "text_encoder")!r})

pipeline = StableDiffusionPipeline.from_pretrained(base)
untouched = draw(pipeline)
pipeline.load_lora_weights({str(lora)!r})
adapted = draw(pipeline)
def near(first, second, what):
    assert abs(first - second).max() < 5e-3, (what, abs(first - second).max())

assert abs(adapted - untouched).max() > 0
near(draw(pipeline, cross_attention_kwargs={{"scale": 0.0}}), untouched, "scaled to nothing")
pipeline.fuse_lora()
near(draw(pipeline), adapted, "fused")
pipeline.unfuse_lora()
pipeline.unload_lora_weights()
near(draw(pipeline), untouched, "unloaded")
pipeline = StableDiffusionPipeline.from_pretrained(base)
pipeline.load_lora_weights({str(lora / "pytorch_lora_weights_kohya.safetensors")!r})
assert abs(draw(pipeline) - adapted).max() < 1e-5, "kohya's names"
pipeline.unload_lora_weights()
pipeline.load_lora_weights({str(lora / "checkpoint-4")!r})
print("all opened")
"""
    assert "all opened" in without_our_package(code, tmp_path)


def test_accelerate_launch_with_its_default_config(dog, tmp_path):
    """`accelerate config default`, then `accelerate launch -m`, as the guide begins."""
    accelerate = [sys.executable, "-m", "accelerate.commands.accelerate_cli"]
    file = tmp_path / "default_config.yaml"
    subprocess.run([*accelerate, "config", "default", "--config_file", file], check=True, capture_output=True)
    words = [
        "--pretrained_model_name_or_path=miniature",
        f"--instance_data_dir={dog}",
        f"--output_dir={tmp_path / 'run'}",
        f"--instance_prompt={SUBJECT}",
        "--resolution=32",
        "--train_batch_size=1",
        "--lora",
        "--max_train_steps=2",
        "--report_to=none",
    ]
    done = subprocess.run(
        [*accelerate, "launch", "--config_file", file, "-m", "diffusion_lessons.dreambooth.training", *words],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "pytorch_lora_weights.safetensors").is_file()


MODES = {
    "plain": {},
    "random crops": {"flags": ["--no_cache_latents"]},
    "prior": {"prior": True},
    "text encoder": {"flags": ["--train_text_encoder"]},
    "lora": {"flags": ["--lora", "--train_text_encoder", "--image_interpolation_mode", "bicubic"]},
    "everything": {"prior": True, "flags": ["--train_text_encoder", "--use_ema", "--snr_gamma=5", "--offset_noise"]},
}


@pytest.mark.parametrize("mode", MODES)
def test_five_photographs_of_a_dog_go_through_every_mode(mode, shared_data, tmp_path, capsys):
    flags = MODES[mode].get("flags", [])
    if "prior" in MODES[mode]:
        class_folder(tmp_path / "class", 6)
        flags = [
            *flags,
            "--with_prior_preservation",
            f"--class_prompt={CLASS}",
            f"--class_data_dir={tmp_path / 'class'}",
            "--num_class_images=6",
        ]
    assert guide(tmp_path / "run", shared_data / "dreambooth" / "dog", "--max_train_steps=2", *flags) == 0
    assert "2 steps in" in capsys.readouterr().out

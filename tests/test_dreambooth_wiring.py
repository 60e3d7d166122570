"""From a field of a config to what it does: every field of a DreamBooth run and of drawing changes what it should."""

import json
import math
import multiprocessing
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, DDPMPipeline, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from dreambooth_runs import CLASS, SUBJECT, class_folder, dreambooth_words, eye_folder, subject_folder
from huggingface_hub import HfApi
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPModel, CLIPTextConfig, CLIPTextModel

import diffusion_lessons.dreambooth.class_images as class_images
import diffusion_lessons.dreambooth.fidelity as fidelity
import diffusion_lessons.dreambooth.inference as inference
import diffusion_lessons.dreambooth.loop as loop
import diffusion_lessons.miniature.autoencoder as autoencoder
import diffusion_lessons.miniature.latent_diffusion as latent_diffusion
import diffusion_lessons.stable_diffusion.prompts as prompts_room
from diffusion_lessons.diffusion.targets import make_noise_scheduler
from diffusion_lessons.diffusion.unet import make_unet
from diffusion_lessons.dreambooth.adapters import KOHYA_FILE, LORA_FILE, adapter_state, read_adapter, save_adapters
from diffusion_lessons.dreambooth.config import DreamBoothConfig
from diffusion_lessons.dreambooth.drawing_config import GenerationConfig
from diffusion_lessons.dreambooth.lora import add_adapters
from diffusion_lessons.dreambooth.subject import instance_source, load_subject
from diffusion_lessons.dreambooth.training import choose_models, main, precision_plan, train
from diffusion_lessons.engine import devices
from diffusion_lessons.engine.checkpoints import list_checkpoints, without_warnings
from diffusion_lessons.engine.optimization import make_optimizer
from diffusion_lessons.miniature.autoencoder import AutoencoderConfig, train_autoencoder
from diffusion_lessons.miniature.latent_diffusion import (
    DiffusionConfig,
    make_latent_scheduler,
    make_pipeline,
    train_diffusion,
)
from diffusion_lessons.miniature.stages import read_log
from diffusion_lessons.stable_diffusion.drawing import draw
from diffusion_lessons.stable_diffusion.folder import load_pipeline, shipped
from diffusion_lessons.stable_diffusion.prompts import load_tokenizer

WEIGHTS = "diffusion_pytorch_model.safetensors"
ON_SNOW = "a photo of a sks butterfly on snow"
COVERED: dict[type, set[str]] = {DreamBoothConfig: set(), GenerationConfig: set()}


def covers(config_class: type, *names: str) -> Callable:
    """Mark a test as the one that notices when these fields do nothing; the last test of this file counts them."""

    def note(test: Callable) -> Callable:
        COVERED[config_class].update(names)
        return test

    return note


# --- small models and small runs ---


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A Stable Diffusion of a few thousand numbers that has learned nothing."""
    folder = tmp_path_factory.mktemp("base") / "tiny"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=16, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=16,
            attention_head_dim=2, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))  # fmt: skip
        vae = AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1, sample_size=32,
                            down_block_types=("DownEncoderBlock2D",) * 2,
                            up_block_types=("UpDecoderBlock2D",) * 2)  # fmt: skip
        text_encoder = CLIPTextModel(CLIPTextConfig(
            vocab_size=600, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=32, bos_token_id=0, eos_token_id=1))  # fmt: skip
    tokenizer = load_tokenizer(shipped("miniature/tokenizer"), "-")
    with without_warnings():
        make_pipeline(vae, text_encoder, tokenizer, unet, make_latent_scheduler()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return subject_folder(tmp_path_factory.mktemp("subject") / "pictures")


@pytest.fixture
def a_config(base, pictures, tmp_path) -> Callable[..., DreamBoothConfig]:
    """Makes the config of a small run; fields go over that."""
    return lambda **fields: small(base, pictures, **{"output_dir": tmp_path / "run"} | fields)


def small(base: Path, pictures: Path, output_dir: Path, **fields) -> DreamBoothConfig:
    chosen = dict(pretrained_model_name_or_path=str(base), instance_data_dir=str(pictures), instance_prompt=SUBJECT,
                  resolution=32, train_batch_size=1, max_train_steps=1, learning_rate=1e-2, report_to="none", seed=0,
                  lr_warmup_steps=0, output_dir=str(output_dir))  # fmt: skip
    return DreamBoothConfig(**chosen | fields)


def steps_in(folder: Path) -> list[int]:
    return [checkpoint.step for checkpoint in list_checkpoints(folder)]


def optimizer_in(folder: Path, step: int) -> dict:
    """The state of the optimizer after this step: what it was built with, and its moments."""
    return torch.load(folder / f"checkpoint-{step}" / "optimizer.bin", weights_only=True)


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Drawing:
    """A stand-in for `draw`: it notes what it was asked for and how the models were, and draws in one step."""

    def __init__(self, parts: tuple[str, ...] = ("unet", "text_encoder")) -> None:
        self.parts, self.calls, self.at_work, self.pipeline = parts, [], False, None

    def __call__(self, pipeline, prompts, **settings) -> torch.Tensor:
        self.pipeline = pipeline
        states = {name: numbers(getattr(pipeline, name)) for name in self.parts}
        precision = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else pipeline.unet.dtype
        self.calls.append(SimpleNamespace(
            prompts=list(prompts), settings=settings, states=states, solver=type(pipeline.scheduler).__name__,
            precision=precision, workers=len(multiprocessing.active_children())))  # fmt: skip
        self.at_work = True
        try:
            return draw(pipeline, prompts, **settings | {"num_inference_steps": 1})
        finally:
            self.at_work = False


def numbers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A model's adapters by their names, or all its weights where it has none."""
    kind = "unet" if isinstance(model, UNet2DConditionModel) else "text_encoder"
    learning = "default" in getattr(model, "peft_config", {})
    state = adapter_state({kind: model}) if learning else model.state_dict()
    return {name: weight.detach().clone() for name, weight in state.items()}


def stored(checkpoint: Path, averaged: bool) -> dict[str, dict[str, torch.Tensor]]:
    """UNet and text encoder of a checkpoint, or their averages, as `numbers` gives them."""
    if (checkpoint / LORA_FILE).is_file():
        found = read_adapter(checkpoint / "ema" if averaged else checkpoint)
        return {part: {name: value for name, value in found.items() if name.startswith(part)}
                for part in ("unet", "text_encoder")}  # fmt: skip
    kinds = {"unet": UNet2DConditionModel, "text_encoder": CLIPTextModel}
    suffix = "_ema" if averaged else ""
    return {part: kind.from_pretrained(checkpoint / f"{part}{suffix}").state_dict() for part, kind in kinds.items()}


# --- the optimizer, its rate, the averages, the log: from what a run leaves ---


@pytest.fixture(scope="module")
def kept(base, pictures, tmp_path_factory) -> tuple[Path, DreamBoothConfig]:
    """A run with adapters in which no number is the default, and a checkpoint of each step."""
    folder = tmp_path_factory.mktemp("kept") / "run"
    config = small(
        base, pictures, folder, lora=True, rank=3, lora_format="kohya", train_batch_size=2,
        gradient_accumulation_steps=2, max_train_steps=6, checkpointing_steps=1, learning_rate=1e-3, adam_beta1=0.8,
        adam_beta2=0.95, adam_weight_decay=0.03, adam_epsilon=1e-5, max_grad_norm=1e-3, use_ema=True, ema_inv_gamma=2.0,
        ema_power=0.5, ema_max_decay=0.4, report_to="tensorboard", logging_dir="diary", seed=3,
    )  # fmt: skip
    train(config)
    return folder, config


@covers(DreamBoothConfig, "learning_rate", "adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon")
def test_the_optimizer_of_a_run_is_that_of_its_config(kept):
    folder, _ = kept
    (group,) = optimizer_in(folder, 1)["param_groups"]
    assert group["betas"] == (0.8, 0.95) and group["weight_decay"] == 0.03 and group["eps"] == 1e-5
    assert group["lr"] == 1e-3


@covers(DreamBoothConfig, "max_grad_norm")
def test_gradients_are_clipped_to_the_norm_that_was_asked_for(kept):
    """After the first step AdamW's first moment is the gradient times 1 - beta1."""
    folder, _ = kept
    moments = [each["exp_avg"] for each in optimizer_in(folder, 1)["state"].values()]
    assert torch.cat([each.flatten() for each in moments]).norm() / 0.2 == pytest.approx(1e-3, rel=1e-3)


@covers(DreamBoothConfig, "gradient_accumulation_steps", "train_batch_size", "max_train_steps", "output_dir")
def test_steps_are_made_of_batches_and_micro_steps(kept):
    """Three pictures are two batches of two, and these are one step."""
    folder, _ = kept
    found = list_checkpoints(folder)
    assert [each.step for each in found] == [1, 2, 3, 4, 5, 6]
    assert [each.progress["epoch"] for each in found] == [0, 1, 2, 3, 4, 5]
    assert [each.progress["batch"] for each in found] == [2] * 6


@covers(DreamBoothConfig, "use_ema", "ema_inv_gamma", "ema_power", "ema_max_decay")
def test_the_averages_are_those_of_the_formula(kept):
    """decay = 1 - (1 + n / inv_gamma) ** -power, at most ema_max_decay, where the first step counts as 0."""
    folder, _ = kept
    average = stored(folder / "checkpoint-1", averaged=False)["unet"]
    decays = [min(0.4, 1 - (1 + number / 2) ** -0.5) for number in range(1, 6)]
    assert decays[1] < 0.4 == decays[-1], "both the power and the maximum are at work"
    for step, decay in enumerate(decays, start=2):
        own = stored(folder / f"checkpoint-{step}", averaged=False)["unet"]
        average = {name: decay * average[name] + (1 - decay) * own[name] for name in own}
        found = stored(folder / f"checkpoint-{step}", averaged=True)["unet"]
        for name in own:
            torch.testing.assert_close(found[name], average[name], atol=1e-7, rtol=1e-4)
        assert not same(found, own)


@covers(DreamBoothConfig, "use_ema")
def test_without_averages_there_are_none(a_config, tmp_path):
    train(a_config(lora=True))
    assert not (tmp_path / "run" / "checkpoint-1" / "ema").exists()


@covers(DreamBoothConfig, "rank", "lora_format", "lora")
def test_adapters_have_the_rank_and_the_format_that_was_asked_for(kept, a_config, tmp_path):
    folder, _ = kept
    assert {min(value.shape) for value in load_file(folder / LORA_FILE).values()} == {3}
    assert (folder / KOHYA_FILE).is_file() and not (folder / "unet").exists()
    train(a_config(lora=True))
    assert {min(value.shape) for value in load_file(tmp_path / "run" / LORA_FILE).values()} == {4}
    assert not (tmp_path / "run" / KOHYA_FILE).exists()


RATES = {  # fields, and the rate as a share of the peak after each of six steps
    "polynomial": ({"lr_scheduler": "polynomial", "lr_power": 2.0, "lr_warmup_steps": 2},
                   [0.5, 1, 0.75**2, 0.5**2, 0.25**2, 0]),
    "two restarts": ({"lr_scheduler": "cosine_with_restarts", "lr_num_cycles": 2}, [0.75, 0.25, 1, 0.75, 0.25, 0]),
    "cosine to a floor": ({"lr_scheduler": "cosine", "min_lr_rate": 0.2},
                          [0.2 + 0.4 * (1 + math.cos(math.pi * step / 6)) for step in range(1, 7)]),
    "linear": ({"lr_scheduler": "linear"}, [step / 6 for step in (5, 4, 3, 2, 1, 0)]),
    "constant": ({"lr_warmup_steps": 4}, [1] * 6),
    "scaled": ({"scale_lr": True, "train_batch_size": 2, "gradient_accumulation_steps": 3}, [6] * 6),
}  # fmt: skip


@covers(DreamBoothConfig, "lr_scheduler", "lr_warmup_steps", "lr_num_cycles", "lr_power", "min_lr_rate", "scale_lr")
@pytest.mark.parametrize("name", RATES)
def test_the_rate_follows_its_schedule(name, a_config, tmp_path):
    chosen, expected = RATES[name]
    train(a_config(lora=True, max_train_steps=6, checkpointing_steps=1, learning_rate=1e-3, **chosen))
    found = [optimizer_in(tmp_path / "run", step)["param_groups"][0]["lr"] / 1e-3 for step in range(1, 7)]
    assert found == pytest.approx(expected, abs=2e-3)


@covers(DreamBoothConfig, "report_to", "logging_dir", "logging_steps")
def test_the_log_is_where_it_should_be_and_as_often_as_asked(kept, a_config, tmp_path):
    folder, _ = kept
    log = read_log(folder / "diary")
    assert [step for _, step, _ in log["train/loss"]] == [1, 2, 3, 4, 5, 6] and not (folder / "logs").exists()
    train(a_config(lora=True, max_train_steps=6, report_to="tensorboard", logging_steps=2))
    log = read_log(tmp_path / "run" / "logs")
    assert [step for _, step, _ in log["train/learning_rate"]] == [2, 3, 5, 6], "each second step, and ends of epochs"
    train(a_config(lora=True))
    assert not list((tmp_path / "run").rglob("events.*")), "nobody asked for a log"


@covers(DreamBoothConfig, "checkpointing_steps", "checkpoints_total_limit", "num_train_epochs")
def test_checkpoints_come_as_often_and_stay_as_many_as_asked(a_config, tmp_path):
    train(a_config(lora=True, max_train_steps=None, num_train_epochs=2, checkpointing_steps=2))
    assert steps_in(tmp_path / "run") == [2, 4, 6], "three pictures, twice"
    train(a_config(lora=True, max_train_steps=5, checkpointing_steps=2, checkpoints_total_limit=2))
    assert steps_in(tmp_path / "run") == [4, 5]


@covers(DreamBoothConfig, "overwrite_output_dir")
def test_an_earlier_run_is_replaced_only_where_that_is_allowed(base, pictures, tmp_path, capfd):
    words = dreambooth_words(pictures, tmp_path / "run", pretrained_model_name_or_path=base, max_train_steps=1,
                             lora=True)  # fmt: skip
    assert main(words) == 0
    before = everything(tmp_path / "run")
    assert main([*words, "--no_overwrite_output_dir"]) == 2
    assert "holds an earlier run" in capfd.readouterr().err and everything(tmp_path / "run") == before
    assert main([*words, "--max_train_steps", "2"]) == 0
    assert steps_in(tmp_path / "run") == [2]


@covers(DreamBoothConfig, "seed")
def test_the_seed_decides_adapters_noise_and_order(a_config, tmp_path):
    found = {}
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        losses = train(a_config(lora=True, seed=seed, output_dir=str(tmp_path / name), learning_rate=1e-9))
        found[name] = (losses, read_adapter(tmp_path / name))
    assert found["one"][0] == found["again"][0] != found["other"][0] and same(found["one"][1], found["again"][1])
    first = next(name for name in found["one"][1] if name.endswith("lora_A.weight"))
    assert not torch.allclose(found["one"][1][first], found["other"][1][first], atol=1e-3)


@covers(DreamBoothConfig, "set_grads_to_none", "pre_compute_text_embeddings", "local_rank")
def test_flags_that_are_accepted_change_no_number(a_config, tmp_path):
    for name, chosen in (("without", {}), ("with", dict(set_grads_to_none=True, pre_compute_text_embeddings=True,
                                                        local_rank=0))):  # fmt: skip
        train(a_config(output_dir=str(tmp_path / name), max_train_steps=2, **chosen))
    one, other = (load_file(tmp_path / name / "unet" / WEIGHTS) for name in ("without", "with"))
    assert same(one, other)


@covers(DreamBoothConfig, "use_8bit_adam")
def test_the_optimizer_of_8_bits_gets_the_same_settings(a_config, monkeypatch):
    seen = []
    stand_in, inner = ModuleType("bitsandbytes"), ModuleType("bitsandbytes.optim")
    stand_in.__spec__ = ModuleSpec("bitsandbytes", None)
    inner.AdamW8bit = lambda parameters, **options: seen.append(options) or "eight bits"
    for module in (stand_in, inner):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    chosen = dict(learning_rate=0.1, adam_beta1=0.2, adam_beta2=0.3, adam_weight_decay=0.4, adam_epsilon=0.5)
    assert make_optimizer([], a_config(**chosen, use_8bit_adam=True)) == "eight bits"
    assert seen == [{"lr": 0.1, "betas": (0.2, 0.3), "weight_decay": 0.4, "eps": 0.5}]
    plain = make_optimizer([torch.nn.Parameter(torch.zeros(1))], a_config(**chosen))
    assert isinstance(plain, torch.optim.AdamW) and len(seen) == 1


@covers(DreamBoothConfig, "full_bf16", "fused_backward_pass")
def test_weights_in_bf16_get_the_optimizer_that_rounds_and_are_stepped_one_by_one(a_config, monkeypatch):
    calls = []

    class StandIn(torch.optim.SGD):
        def __init__(self, parameters, lr=1e-3, bf16_stochastic_round=False, **_):
            assert bf16_stochastic_round
            super().__init__(parameters, lr=lr)

        def step(self, closure=None):
            calls.append({each.dtype for each in self.param_groups[0]["params"] if each.grad is not None})

    for name in ("torchao", "torchao.optim"):
        monkeypatch.setitem(sys.modules, name, module := ModuleType(name))
    module.AdamW8bit = StandIn
    train(a_config(full_bf16=True, use_8bit_adam=True, fused_backward_pass=True, max_train_steps=1))
    assert len(calls) > 100 and all(each == {torch.bfloat16} for each in calls)


@pytest.fixture
def tf32():
    """PyTorch's two switches, off; put back afterwards."""
    switches = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [each.allow_tf32 for each in switches]
    for each in switches:
        each.allow_tf32 = False
    yield lambda: [each.allow_tf32 for each in switches]
    for each, allowed in zip(switches, before, strict=True):
        each.allow_tf32 = allowed


@covers(DreamBoothConfig, "allow_tf32")
def test_tf32_is_allowed_where_it_was_asked_for(a_config, tf32):
    for allowed in (False, True):
        train(a_config(lora=True, allow_tf32=allowed))
        assert tf32() == [allowed] * 2


@covers(DreamBoothConfig, "enable_xformers_memory_efficient_attention")
def test_xformers_is_asked_for_on_the_unet(a_config, monkeypatch):
    asked = []
    monkeypatch.setattr(devices, "xformers_fault", lambda: None)
    monkeypatch.setattr(UNet2DConditionModel, "enable_xformers_memory_efficient_attention",
                        lambda model, *_: asked.append(type(model).__name__))  # fmt: skip
    train(a_config(lora=True))
    assert asked == []
    train(a_config(lora=True, enable_xformers_memory_efficient_attention=True))
    assert asked == ["UNet2DConditionModel"]


# --- the pictures and the prompts ---


@pytest.fixture
def wide(tmp_path) -> Path:
    """Two pictures that are not square, and not of one size."""
    folder = tmp_path / "wide"
    folder.mkdir()
    noise = torch.randint(0, 256, (2, 90, 120, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for number, pixels in enumerate(noise):
        Image.fromarray(pixels[: 90 - 10 * number].numpy()).save(folder / f"{number}.png")
    return folder


def pixels_of(image: Image.Image) -> torch.Tensor:
    return torch.tensor(list(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3).permute(2, 0, 1)


@covers(DreamBoothConfig, "resolution", "image_interpolation_mode", "center_crop", "cache_latents", "instance_data_dir")
@pytest.mark.parametrize("mode, size", [("nearest", 32), ("lanczos", 40), ("bicubic", 32)])
def test_pictures_get_the_size_and_the_crop_that_were_asked_for(mode, size, wide, base, a_config):
    pipeline = load_pipeline(base)

    def load(**chosen) -> list[torch.Tensor]:
        config = a_config(instance_data_dir=str(wide), resolution=size, image_interpolation_mode=mode, **chosen)
        data = load_subject(config, pipeline, [instance_source(str(wide), size)])
        return [data.real[0], *(data.dataset[0][0] for _ in range(8))]

    with Image.open(wide / "0.png") as image:
        width = round(120 * size / 90)
        fitted = pixels_of(image.resize((width, size), Image.Resampling[mode.upper()]))
    left = round((width - size) / 2)
    middle = fitted[:, :, left : left + size]
    real, *cropped = load(cache_latents=False, center_crop=True)
    assert torch.equal(real, middle) and all(torch.equal(each, middle) for each in cropped)
    real, *cropped = load(cache_latents=False)
    assert torch.equal(real, middle) and len({each.numpy().tobytes() for each in cropped}) > 1, "cropped at random"
    parts = [fitted[:, :, start : start + size] for start in range(width - size + 1)]
    assert all(any(torch.equal(each, part) for part in parts) for each in cropped)
    real, *encoded = load()
    assert encoded[0].dtype == torch.float16 and encoded[0].shape == (8, size // 2, size // 2)
    expected = pipeline.vae.encode(middle[None].float() / 127.5 - 1).latent_dist.parameters[0]
    torch.testing.assert_close(encoded[0].float(), expected, atol=2e-3, rtol=2e-3)


@covers(DreamBoothConfig, "instance_prompt", "class_prompt")
def test_the_unet_hears_the_prompts_of_the_config(base, pictures, a_config):
    pipeline = load_pipeline(base)
    sources = [instance_source(str(pictures), 32)] * 2
    config = a_config(instance_prompt=ON_SNOW, class_prompt="a photo of a fish")
    heard = load_subject(config, pipeline, sources).prompts(2, torch.device("cpu"))
    expected = pipeline.encode_prompt([ON_SNOW, "a photo of a fish"], "cpu", 1, do_classifier_free_guidance=False)[0]
    torch.testing.assert_close(heard, expected)


# --- the class ---


@covers(DreamBoothConfig, "with_prior_preservation", "class_data_dir", "class_prompt", "num_class_images",
        "sample_batch_size", "prior_generation_precision")  # fmt: skip
def test_class_images_are_drawn_as_many_at_once_and_as_precisely_as_asked(a_config, tmp_path, monkeypatch):
    monkeypatch.setattr(class_images, "draw", drawing := Drawing())
    chosen = dict(lora=True, class_data_dir=str(tmp_path / "class"), class_prompt="a photo of a fish",
                  num_class_images=7, sample_batch_size=3)  # fmt: skip
    train(a_config(**chosen))
    assert not drawing.calls and not (tmp_path / "class").exists(), "a prompt alone is no wish for the prior"
    class_folder(tmp_path / "class", 2)
    train(a_config(**chosen, with_prior_preservation=True, prior_generation_precision="bf16"))
    assert [call.prompts for call in drawing.calls] == [["a photo of a fish"] * 3, ["a photo of a fish"] * 2]
    assert {call.settings["batch_size"] for call in drawing.calls} == {3}
    assert {call.precision for call in drawing.calls} == {torch.bfloat16}
    assert len(list((tmp_path / "class").glob("*.png"))) == 7
    assert list_checkpoints(tmp_path / "run")[0].progress["steps_per_epoch"] == 7, "as many pairs as class images"
    drawing.calls.clear()
    train(a_config(**chosen | {"num_class_images": 8}, with_prior_preservation=True, prior_generation_precision="fp32",
                   mixed_precision="bf16"))  # fmt: skip
    assert [call.precision for call in drawing.calls] == [torch.float32]


@covers(DreamBoothConfig, "prior_loss_weight")
def test_the_weight_of_the_prior_is_that_of_its_share_in_the_loss(a_config, tmp_path):
    chosen = dict(lora=True, with_prior_preservation=True, class_prompt=CLASS, num_class_images=3,
                  class_data_dir=str(class_folder(tmp_path / "class", 3)))  # fmt: skip
    none, one, three = (train(a_config(**chosen, prior_loss_weight=weight))[0] for weight in (0.0, 1.0, 3.0))
    assert one > none and three - none == pytest.approx(3 * (one - none), rel=1e-3)


# --- what is trained, and in which precision ---


@covers(DreamBoothConfig, "train_text_encoder", "gradient_checkpointing")
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("text", [False, True])
def test_activations_are_computed_twice_where_memory_is_to_be_saved(text, lora, base, a_config):
    """In the UNet and, where it learns, in the text encoder: a layer is called once more in the backward pass."""
    calls = {}
    for saving in (False, True):
        config, pipeline = a_config(lora=lora, train_text_encoder=text, gradient_checkpointing=saving), fresh(base)
        models = choose_models(config, pipeline, precision_plan(config, torch.device("cpu")))
        assert list(models) == ["unet", "text_encoder"] if text else ["unet"]
        layers = {"unet": pipeline.unet.up_blocks[1].resnets[0]}
        layers["text_encoder"] = next(module for name, module in pipeline.text_encoder.named_modules()
                                      if name.endswith("layers.0.self_attn"))  # fmt: skip
        found: list[str] = []
        for name, layer in layers.items():
            layer.register_forward_pre_hook(lambda *_, name=name, found=found: found.append(name))
        for model in models.values():
            model.train()
        words = pipeline.text_encoder(torch.ones(1, 32, dtype=torch.long))[0]
        pipeline.unet(torch.ones(1, 4, 16, 16), torch.tensor([5]), words).sample.square().mean().backward()
        calls[saving] = {name: found.count(name) for name in layers}
    assert calls[False] == {"unet": 1, "text_encoder": 1}
    assert calls[True] == {"unet": 2, "text_encoder": 2 if text else 1}


def fresh(base: Path) -> StableDiffusionPipeline:
    """The small model as a run begins with it: frozen."""
    pipeline = load_pipeline(base)
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        part.requires_grad_(False).eval()
    return pipeline


HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16, "no": torch.float32, None: torch.float16}


@covers(DreamBoothConfig, "mixed_precision")
@pytest.mark.parametrize("precision", HALVES)
@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_on_a_gpu_what_learns_keeps_32_bits_and_the_rest_is_halved(lora, text, precision, base, a_config):
    """The GPU is on paper only: a plan for it, carried out on PyTorch's device without memory."""
    pipeline = fresh(base)
    parts = {name: getattr(pipeline, name) for name in ("unet", "vae", "text_encoder")}
    config = a_config(lora=lora, train_text_encoder=text, mixed_precision=precision)
    on_paper = replace(precision_plan(config, torch.device("cuda", 0)), device=torch.device("meta"), at_work=None)
    models = choose_models(config, pipeline, on_paper)
    assert list(models) == ["unet", "text_encoder"] if text else ["unet"]
    for name, part in parts.items():
        learning = [each for each in part.parameters() if each.requires_grad]
        frozen = [each for each in part.parameters() if not each.requires_grad]
        assert bool(learning) == (name in models) and bool(frozen) == (lora or name not in models)
        assert {each.dtype for each in learning} <= {torch.float32}, name
        assert {each.dtype for each in frozen} <= {HALVES[precision]}, name


@covers(DreamBoothConfig, "mixed_precision")
def test_on_a_cpu_nothing_is_halved(base, a_config):
    pipeline = fresh(base)
    config = a_config(lora=True, mixed_precision="bf16")
    choose_models(config, pipeline, precision_plan(config, torch.device("cpu")))
    parts = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
    assert {each.dtype for part in parts for each in part.parameters()} == {torch.float32}


# --- what is drawn and measured meanwhile, and with which weights ---


@pytest.fixture(scope="module", params=["weights", "adapters"])
def watched(request, base, pictures, tmp_path_factory) -> SimpleNamespace:
    """Three steps with averages, looked at after each: what was drawn, measured, dropped out and trained with."""
    found = SimpleNamespace(folder=tmp_path_factory.mktemp("watched") / "run", grids=Drawing(), rows=Drawing(),
                            trained_with=[], precisions=set(), dropped=set(), resting=[])  # fmt: skip
    chosen = dict(use_ema=True, ema_max_decay=0.4, train_text_encoder=True, max_train_steps=3, checkpointing_steps=1,
                  validation_prompt=[ON_SNOW, SUBJECT], validation_steps=1, num_validation_images=2, class_prompt=CLASS,
                  fidelity_model="miniature", seed=11, resolution=40)  # fmt: skip
    if request.param == "adapters":
        chosen |= dict(lora=True, lora_dropout=0.37, mixed_precision="bf16", validation_scheduler="DDPMScheduler",
                       dataloader_num_workers=1)  # fmt: skip
    found.config = small(base, pictures, found.folder, **chosen)

    def measured(pipeline, prompts, **settings):  # first called before the first step
        if not found.rows.calls:
            pipeline.unet.register_forward_pre_hook(note_weights)
            pipeline.unet.conv_in.register_forward_hook(note_precision)
        return found.rows(pipeline, prompts, **settings)

    def note_weights(unet, _):
        if torch.is_grad_enabled():
            pipeline = found.rows.pipeline
            found.trained_with.append({"unet": numbers(unet), "text_encoder": numbers(pipeline.text_encoder)})
            found.resting += [layer for part in (unet, pipeline.text_encoder) for layer in part.modules()
                              if not layer.training]  # fmt: skip

    def note_precision(layer, inputs, output):
        if torch.is_grad_enabled():
            found.precisions.add(output.dtype)

    def dropout(layer, inputs):
        drawing = found.grids.at_work or found.rows.at_work
        found.dropped.add((layer.p, drawing, layer.training))
        return torch.nn.functional.dropout(inputs, layer.p, layer.training)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "draw", found.grids)
        patch.setattr(fidelity, "draw", measured)
        patch.setattr(torch.nn.Dropout, "forward", dropout)
        found.losses = train(found.config)
    return found


def are(states: dict[str, dict], expected: dict[str, dict]) -> bool:
    return states.keys() == expected.keys() and all(same(states[part], expected[part]) for part in states)


@covers(DreamBoothConfig, "use_ema")
def test_validation_pictures_are_drawn_with_the_averages(watched):
    assert len(watched.grids.calls) == 3 * 2, "three steps, two prompts"
    for number, call in enumerate(watched.grids.calls):
        checkpoint = watched.folder / f"checkpoint-{number // 2 + 1}"
        assert are(call.states, stored(checkpoint, averaged=True)), checkpoint
        assert number < 2 or not are(call.states, stored(checkpoint, averaged=False))


@covers(DreamBoothConfig, "use_ema", "checkpointing_steps")
def test_rows_of_the_table_are_measured_with_the_averages(watched):
    assert len(watched.rows.calls) == 4 * 3, "the untouched model and three steps; subject, class, one more prompt"
    assert [row["step"] for row in json.loads((watched.folder / "fidelity.json").read_text())] == [0, 1, 2, 3]
    assert are(watched.rows.calls[0].states, watched.trained_with[0]), "the untouched model"
    for number, call in enumerate(watched.rows.calls[3:]):
        checkpoint = watched.folder / f"checkpoint-{number // 3 + 1}"
        assert are(call.states, stored(checkpoint, averaged=True)), checkpoint


@covers(DreamBoothConfig, "use_ema")
def test_after_each_look_and_save_the_models_have_their_own_weights_again(watched):
    assert len(watched.trained_with) == 3
    for step, states in enumerate(watched.trained_with[1:], start=1):
        assert are(states, stored(watched.folder / f"checkpoint-{step}", averaged=False)), step
    pipeline, last = watched.rows.pipeline, stored(watched.folder / "checkpoint-3", averaged=False)
    assert are({name: numbers(getattr(pipeline, name)) for name in last}, last), "at the end of the run as well"


@covers(DreamBoothConfig, "use_ema", "train_text_encoder")
def test_the_result_is_the_averages(watched):
    assert are(stored(watched.folder, averaged=False), stored(watched.folder / "checkpoint-3", averaged=True))
    assert not are(stored(watched.folder, averaged=False), stored(watched.folder / "checkpoint-3", averaged=False))


@covers(DreamBoothConfig, "validation_prompt", "num_validation_images", "validation_steps", "seed", "resolution",
        "validation_scheduler", "class_prompt", "instance_prompt")  # fmt: skip
def test_what_is_drawn_is_what_the_config_says(watched):
    assert [call.prompts for call in watched.grids.calls] == [[ON_SNOW] * 2, [SUBJECT] * 2] * 3
    assert [call.prompts for call in watched.rows.calls] == [[name] * 2 for name in (SUBJECT, CLASS, ON_SNOW)] * 4
    calls = watched.grids.calls + watched.rows.calls
    assert {(call.settings["seed"], call.settings["size"]) for call in calls} == {(11, 40)}
    solver = "DDPMScheduler" if watched.config.lora else "DPMSolverMultistepScheduler"
    assert {call.solver for call in calls} == {solver}
    names = [path.name for path in sorted((watched.folder / "samples").iterdir())]
    assert names == ["step-000001.png", "step-000002.png", "step-000003.png"]


@covers(DreamBoothConfig, "mixed_precision")
def test_the_run_is_as_precise_as_asked_in_training_and_in_drawing(watched):
    wanted = torch.bfloat16 if watched.config.lora else torch.float32
    assert watched.precisions == {wanted}
    assert {call.precision for call in watched.grids.calls + watched.rows.calls} == {wanted}


@covers(DreamBoothConfig, "dataloader_num_workers")
def test_pictures_are_loaded_by_as_many_processes_as_asked(watched):
    assert watched.grids.calls[0].workers == (1 if watched.config.lora else 0)


@covers(DreamBoothConfig, "lora_dropout")
def test_dropout_has_its_rate_and_is_active_in_training_alone(watched):
    found = {(drawing, active) for rate, drawing, active in watched.dropped if rate == 0.37}
    assert found == ({(False, True), (True, False)} if watched.config.lora else set())


@covers(DreamBoothConfig, "gradient_checkpointing", "train_text_encoder")
def test_what_learns_is_in_training_mode(watched):
    """A text encoder in evaluation mode would pass over its gradient checkpointing."""
    assert watched.trained_with and watched.resting == []


@covers(DreamBoothConfig, "fidelity_model")
def test_the_table_is_made_by_the_clip_that_was_named(a_config, tmp_path, monkeypatch):
    monkeypatch.setattr(fidelity, "draw", Drawing())
    model = CLIPModel.from_pretrained(shipped("miniature/clip"))
    with torch.no_grad():
        model.visual_projection.weight.mul_(torch.linspace(-1, 1, len(model.visual_projection.weight))[:, None])
    model.save_pretrained(tmp_path / "clip")
    for part in ("feature_extractor", "tokenizer"):
        shutil.copytree(shipped("miniature") / part, tmp_path / "clip", dirs_exist_ok=True)
    rows = {}
    for name in ("miniature", str(tmp_path / "clip"), None):
        train(a_config(lora=True, fidelity_model=name, num_validation_images=1))
        path = tmp_path / "run" / "fidelity.json"
        rows[name] = json.loads(path.read_text())[0] if path.exists() else None
    assert rows["miniature"] is not None and rows[None] is None
    assert rows["miniature"]["prompt"] != rows[str(tmp_path / "clip")]["prompt"]


@covers(DreamBoothConfig, "subject_model")
def test_the_subject_is_compared_by_what_was_named(a_config, tmp_path, monkeypatch):
    monkeypatch.setattr(fidelity, "draw", Drawing())
    rows = {}
    for name in ("none", *(str(eye_folder(tmp_path / f"eye-{seed}", seed)) for seed in (1, 2))):
        train(a_config(lora=True, fidelity_model="miniature", subject_model=name, num_validation_images=1))
        rows[name] = json.loads((tmp_path / "run" / "fidelity.json").read_text())[0]
    assert len({row["prompt"] for row in rows.values()}) == 1, "by the CLIP"
    assert len({row["subject"] for row in rows.values()}) == 3
    assert ["CLIPEncoder" in row["measured_by"].split(",")[0] for row in rows.values()] == [True, False, False]


# --- the miniature's own trainings ---


def stage_fields(folder: Path) -> dict:
    return dict(output_dir=str(folder / "run"), model_dir=str(folder / "model"), data_dir=None, report_to="none",
                num_train_images=4, train_batch_size=4, max_train_steps=2, checkpointing_steps=1, sample_steps=1,
                lr_warmup_steps=0, ema_max_decay=0.4)  # fmt: skip


def test_the_autoencoder_is_looked_at_and_kept_with_its_averages(tmp_path, monkeypatch):
    looked_at, trained_with, reconstruct = [], [], autoencoder.reconstruct

    def noting(model, images):
        if not looked_at:
            model.encoder.register_forward_pre_hook(lambda *_: trained_with.append(numbers(model))
                                                    if torch.is_grad_enabled() else None)  # fmt: skip
        looked_at.append(numbers(model))
        return reconstruct(model, images)

    monkeypatch.setattr(autoencoder, "reconstruct", noting)
    train_autoencoder(AutoencoderConfig(**stage_fields(tmp_path)))
    for step, seen in enumerate(looked_at, start=1):
        assert same(seen, load_file(tmp_path / "run" / f"checkpoint-{step}" / "vae_ema" / WEIGHTS)), step
    assert len(looked_at) == 2 and not same(seen, load_file(tmp_path / "run" / "checkpoint-2" / "vae" / WEIGHTS))
    (second,) = trained_with
    assert same(second, load_file(tmp_path / "run" / "checkpoint-1" / "vae" / WEIGHTS)), "its own weights again"
    assert same(load_file(tmp_path / "model" / "vae" / WEIGHTS), seen)


def test_the_unet_is_looked_at_and_kept_with_its_averages(tmp_path, monkeypatch):
    shutil.copytree(shipped("miniature"), tmp_path / "model", ignore=shutil.ignore_patterns("unet", "clip"))
    drawing, trained_with = Drawing(parts=("unet",)), []

    def noting(pipeline, prompts, **settings):
        if not drawing.calls:
            pipeline.unet.register_forward_pre_hook(lambda unet, _: trained_with.append(numbers(unet))
                                                    if torch.is_grad_enabled() else None)  # fmt: skip
        drawing(pipeline, prompts[:1], **settings)
        return torch.zeros(16, 3, 8, 8, dtype=torch.uint8)

    monkeypatch.setattr(latent_diffusion, "draw", noting)
    train_diffusion(DiffusionConfig(**stage_fields(tmp_path)))
    looked_at = [call.states["unet"] for call in drawing.calls]
    for step, seen in enumerate(looked_at, start=1):
        assert same(seen, load_file(tmp_path / "run" / f"checkpoint-{step}" / "unet_ema" / WEIGHTS)), step
    assert len(looked_at) == 2 and not same(seen, load_file(tmp_path / "run" / "checkpoint-2" / "unet" / WEIGHTS))
    (second,) = trained_with
    assert same(second, load_file(tmp_path / "run" / "checkpoint-1" / "unet" / WEIGHTS)), "its own weights again"
    assert same(load_file(tmp_path / "model" / "unet" / WEIGHTS), seen)


# --- from the Hub and to it ---


@pytest.fixture
def hub(base, tmp_path, monkeypatch) -> SimpleNamespace:
    """A Hub on paper: one model, only in a variant, and one tokenizer; it notes what it was asked for."""
    found = SimpleNamespace(asked=[], model=Path(shutil.copytree(base, tmp_path / "hub")))
    for path in found.model.rglob("*.safetensors"):
        path.rename(path.with_name(f"{path.stem}.fp16.safetensors"))
    tokenizer = load_tokenizer(base / "tokenizer", "-")
    tokenizer.model_max_length = 20
    tokenizer.save_pretrained(tmp_path / "tokenizer")

    def answer(kind: str, reply: object, real: Callable | None = None) -> Callable:
        def note(name, revision=None, variant=None, **more):
            if Path(name).is_dir():
                return real(name, **more)
            found.asked.append((kind, name, revision, variant))
            return reply

        return note

    index = {"_class_name": "StableDiffusionPipeline"}
    monkeypatch.setattr(DiffusionPipeline, "load_config", answer("index", index, DiffusionPipeline.load_config))
    monkeypatch.setattr(DiffusionPipeline, "download", answer("model", str(found.model)))
    monkeypatch.setattr(prompts_room, "snapshot_download", answer("tokenizer", str(tmp_path / "tokenizer")))
    return found


FROM_HUB = {("index", "somebody/sd", "v2", None), ("model", "somebody/sd", "v2", "fp16")}
WORDS_FROM_HUB = ("tokenizer", "somebody/words", "v2", None)


@covers(DreamBoothConfig, "pretrained_model_name_or_path", "revision", "variant", "tokenizer_name")
def test_a_run_takes_the_revision_and_the_variant_that_were_named(hub, pictures, drawing, tmp_path):
    """So does who draws with one of its checkpoints, without naming them again."""
    words = dreambooth_words(
        pictures, tmp_path / "run", pretrained_model_name_or_path="somebody/sd", revision="v2", variant="fp16",
        tokenizer_name="somebody/words", max_train_steps=1,
    )  # fmt: skip
    assert main(words) == 0
    assert set(hub.asked) == FROM_HUB | {WORDS_FROM_HUB}
    own = hub.model / "vae" / "diffusion_pytorch_model.fp16.safetensors"
    assert (tmp_path / "run" / "vae" / WEIGHTS).read_bytes() == own.read_bytes()
    tokenizer = json.loads((tmp_path / "run" / "tokenizer" / "tokenizer_config.json").read_text())
    assert tokenizer["model_max_length"] == 20, "the tokenizer that was named is the result's"
    hub.asked.clear()
    checkpoint = tmp_path / "run" / "checkpoint-1"
    generated(tmp_path / "out", None, checkpoint=str(checkpoint))
    assert set(hub.asked) == FROM_HUB | {WORDS_FROM_HUB}
    assert same(drawing.calls[0].states["unet"], load_file(checkpoint / "unet" / WEIGHTS))


@covers(DreamBoothConfig, "tokenizer_max_length", "tokenizer_name")
@pytest.mark.parametrize(
    "chosen, length", [({"tokenizer_name": "somebody/words"}, 20), ({"tokenizer_max_length": 9}, 9), ({}, 32)]
)
def test_prompts_are_as_long_as_tokenizer_and_config_say(chosen, length, hub, a_config):
    lengths = []
    forward = CLIPTextModel.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CLIPTextModel, "forward", lambda model, ids, **more: (
            lengths.append(ids.shape[-1]), forward(model, ids, **more))[1])  # fmt: skip
        train(a_config(lora=True, train_text_encoder=True, **chosen))
    assert set(lengths) == {length}


@pytest.fixture
def uploads(monkeypatch) -> list[dict]:
    """What the Hub's interface is asked to do, with which token."""
    calls = []

    def create_repo(api, repo_id, *, private=None, exist_ok=False, **_):
        calls.append({"create": repo_id, "private": private, "token": api.token})
        return SimpleNamespace(repo_id=f"me/{repo_id}")

    def upload_folder(api, *, repo_id, folder_path, ignore_patterns, **_):
        calls.append({"upload": repo_id, "folder": Path(folder_path), "ignored": list(ignore_patterns),
                      "token": api.token})  # fmt: skip

    monkeypatch.delenv("HF_HUB_OFFLINE")  # offline, --push_to_hub is refused
    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return calls


@covers(DreamBoothConfig, "push_to_hub", "hub_model_id", "hub_private_repo", "hub_token", "logging_dir")
def test_a_run_is_uploaded_as_the_config_says_and_not_unasked(uploads, a_config, tmp_path):
    train(a_config(lora=True, hub_token="hf_mine", hub_model_id="flies", hub_private_repo=True))
    assert uploads == []
    for chosen, name, private in ((dict(hub_model_id="flies", hub_private_repo=True), "flies", True),
                                  ({}, "run", None)):  # fmt: skip
        uploads.clear()
        train(a_config(lora=True, push_to_hub=True, hub_token="hf_mine", logging_dir="diary", **chosen))
        created, uploaded = uploads
        assert created == {"create": name, "private": private, "token": "hf_mine"}
        assert uploaded["upload"] == f"me/{name}" and uploaded["folder"].name == "run"
        assert uploaded["token"] == "hf_mine" and {"checkpoint-*/**", "diary/**"} <= set(uploaded["ignored"])


@covers(DreamBoothConfig, "hub_token")
@pytest.mark.parametrize("flags", [["--hub_token", "hf_verysecret"], ["--hub_token=hf_verysecret"],
                                   ["--hub-token", "hf_verysecret"]])  # fmt: skip
def test_the_token_leaves_the_words_of_the_process_and_is_in_no_file(flags, uploads, base, pictures, tmp_path,
                                                                     monkeypatch, capfd):  # fmt: skip
    words = dreambooth_words(pictures, tmp_path / "run", "--lora", "--push_to_hub", *flags, max_train_steps=1,
                             pretrained_model_name_or_path=base, report_to="tensorboard")  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["train-dreambooth", *words])
    assert main(words) == 0, capfd.readouterr().err
    assert [call["token"] for call in uploads] == ["hf_verysecret"] * 2
    assert len(sys.argv) == 1 + len(words) and not any("verysecret" in word for word in sys.argv)
    assert [name for name, content in everything(tmp_path).items() if b"verysecret" in content] == []
    assert "verysecret" not in "".join(capfd.readouterr())


# --- drawing ---


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory) -> Path:
    """An adapter for the small model that has learned something random, and looks like a run's checkpoint."""
    pipeline, folder = load_pipeline(base), tmp_path_factory.mktemp("adapter") / "checkpoint-1"
    add_adapters({"unet": pipeline.unet}, rank=2)
    with torch.no_grad():
        for name, weight in pipeline.unet.named_parameters():
            if ".lora_B." in name:
                weight.fill_(0.5)
    save_adapters({"unet": pipeline.unet}, folder)
    return folder


@pytest.fixture
def drawing(monkeypatch) -> Drawing:
    monkeypatch.setattr(inference, "draw", drawing := Drawing(parts=("unet",)))
    return drawing


def generated(folder: Path, base: Path | None, **chosen) -> list[dict]:
    """Draw into a folder, by default one fish, with this model; returns what the pictures say of themselves."""
    usual = dict(model_path=base and str(base), output_dir=str(folder), prompt=["a fish"], num_images=1)
    inference.generate(GenerationConfig(**usual | chosen))
    return [json.loads(Image.open(path).text["parameters"]) for path in sorted(folder.glob("[0-9]*.png"))]


@covers(GenerationConfig, "prompt", "negative_prompt", "num_images", "num_inference_steps", "guidance_scale", "seed",
        "size", "batch_size", "output_dir", "model_path")  # fmt: skip
def test_draw_is_asked_for_what_the_config_says(drawing, base, tmp_path):
    about = generated(
        tmp_path / "out", base, prompt=["a fish", "a dog"], negative_prompt="blur", num_images=3, guidance_scale=2.5,
        num_inference_steps=7, seed=40, size=24, batch_size=2,
    )  # fmt: skip
    assert [call.prompts for call in drawing.calls] == [["a fish"] * 3, ["a dog"] * 3]
    for call in drawing.calls:
        assert call.settings == {"seed": 40, "size": 24, "num_inference_steps": 7, "guidance_scale": 2.5,
                                 "batch_size": 2, "negative_prompt": "blur"}  # fmt: skip
    same_for_all = {"num_inference_steps": 7, "guidance_scale": 2.5, "negative_prompt": "blur",
                    "model": f"{base.parent.name}/{base.name}"}  # fmt: skip
    assert about == [same_for_all | {"prompt": prompt, "seed": seed} for prompt in ("a fish", "a dog")
                     for seed in (40, 41, 42)]  # fmt: skip
    with Image.open(tmp_path / "out" / "0000.png") as image:
        assert image.size == (24, 24)


@covers(GenerationConfig, "num_images", "num_inference_steps", "guidance_scale", "seed", "size", "batch_size")
def test_by_default_four_pictures_of_the_models_own_size_are_drawn(drawing, base, tmp_path):
    inference.generate(GenerationConfig(model_path=str(base), output_dir=str(tmp_path), prompt=["a fish"]))
    assert len(list(tmp_path.glob("*.png"))) == 4
    (call,) = drawing.calls
    assert call.settings == {"seed": 0, "size": None, "num_inference_steps": 50, "guidance_scale": 7.5,
                             "batch_size": 4, "negative_prompt": None}  # fmt: skip
    assert same(call.states["unet"], load_pipeline(base).unet.state_dict())


@covers(GenerationConfig, "lora_weights", "lora_scale", "checkpoint")
@pytest.mark.parametrize("flag", ["lora_weights", "checkpoint"])
def test_as_much_of_an_adapter_is_added_as_was_asked_for(flag, adapter, base, tmp_path, monkeypatch):
    seen = []

    def prediction(pipeline) -> torch.Tensor:
        with torch.no_grad():
            return pipeline.unet(torch.ones(1, 4, 16, 16), torch.tensor([5]), torch.ones(1, 32, 16)).sample

    def note(pipeline, prompts, **_) -> torch.Tensor:
        seen.append(prediction(pipeline))
        return torch.zeros(len(prompts), 3, 8, 8, dtype=torch.uint8)

    monkeypatch.setattr(inference, "draw", note)
    for scale in (0.0, 0.3, 1.0):
        about = generated(tmp_path / str(scale), base, **{flag: str(adapter)}, lora_scale=scale)
        plain = load_pipeline(base)
        plain.load_lora_weights(str(adapter), adapter_name="one")
        plain.set_adapters(["one"], [scale])
        torch.testing.assert_close(seen[-1], prediction(plain))
        assert about[0][flag].endswith("checkpoint-1")
        assert flag == "checkpoint" or about[0]["lora_scale"] == scale
    assert not torch.allclose(seen[0], seen[1], atol=1e-3) and not torch.allclose(seen[1], seen[2], atol=1e-3)
    torch.testing.assert_close(seen[0], prediction(load_pipeline(base)))


@covers(GenerationConfig, "revision", "variant", "model_path", "save_pipeline")
def test_drawing_takes_the_revision_and_the_variant_that_were_named(drawing, hub, tmp_path):
    chosen = dict(model_path="somebody/sd", revision="v2", variant="fp16")
    generated(tmp_path / "out", None, **chosen, save_pipeline=str(tmp_path / "kept"))
    assert set(hub.asked) == FROM_HUB
    assert [path.name for path in (tmp_path / "kept" / "unet").glob("*.safetensors")] == [WEIGHTS]


@covers(GenerationConfig, "mixed_precision", "save_pipeline")
def test_drawing_is_as_precise_as_asked_and_saving_is_in_32_bits(drawing, base, tmp_path):
    for precision, wanted in (("bf16", torch.bfloat16), ("no", torch.float32), (None, torch.float32)):
        kept = tmp_path / "kept" / str(precision)
        generated(tmp_path / "out", base, mixed_precision=precision, save_pipeline=str(kept))
        assert drawing.calls[-1].precision == wanted
        assert same(load_file(kept / "unet" / WEIGHTS), load_file(base / "unet" / WEIGHTS))
    generated(tmp_path / "out", base)
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["None", "bf16", "no"]


@covers(GenerationConfig, "compare_to", "instance_data_dir")
def test_a_sheet_has_a_row_for_each_model_that_was_named(drawing, adapter, base, pictures, tmp_path):
    chosen = dict(num_images=2, size=24, seed=9, negative_prompt="blur", guidance_scale=2.0, batch_size=1)
    sizes = {}
    for name, folder in (("with", str(pictures)), ("without", None)):
        drawing.calls.clear()
        generated(tmp_path / name, base, compare_to=[str(adapter), "miniature"], instance_data_dir=folder, **chosen)
        assert len(drawing.calls) == 3 and len({str(call.settings) for call in drawing.calls}) == 1
        assert drawing.calls[0].settings["seed"] == 9 and drawing.calls[0].settings["negative_prompt"] == "blur"
        names = {frozenset(call.states["unet"]) for call in drawing.calls}
        assert len(names) == 3, "the model, the adapter on it, and the miniature"
        with Image.open(tmp_path / name / "comparison.png") as sheet:
            sizes[name] = sheet.size
    assert sizes["without"] == (48, 3 * (20 + 20 + 24)) and sizes["with"] == (48, sizes["without"][1] + 20 + 24)


@covers(GenerationConfig, "model_path", "num_images", "num_inference_steps", "seed", "batch_size", "output_dir")
def test_an_unconditional_model_is_asked_for_what_the_config_says(tmp_path, monkeypatch):
    DDPMPipeline(make_unet("tiny-16", 16, seed=0), make_noise_scheduler()).save_pretrained(tmp_path / "model")
    asked = []

    def note(unet, scheduler, number, **settings) -> torch.Tensor:
        asked.append((number, settings))
        return torch.zeros(number, 3, 16, 16, dtype=torch.uint8)

    monkeypatch.setattr(inference, "sample_images", note)
    about = generated(tmp_path / "out", tmp_path / "model", prompt=None, num_images=5, num_inference_steps=6, seed=8,
                      batch_size=3)  # fmt: skip
    assert asked == [(5, {"num_inference_steps": 6, "seed": 8, "batch_size": 3})]
    assert [each["seed"] for each in about] == [8, 9, 10, 11, 12]


# --- nothing is left out ---


ELSEWHERE = {  # fields that other tests watch
    DreamBoothConfig: {
        "on_bad_image": "test_train_dreambooth.py::test_an_unreadable_picture_can_be_skipped",
        "offset_noise": "test_dreambooth_loop.py::test_a_step_is_the_one_written_by_hand",
        "snr_gamma": "test_dreambooth_loop.py::test_a_step_is_the_one_written_by_hand",
        "validation_epochs": "test_train_dreambooth.py::test_validation_pictures_come_by_epochs",
        "resume_from_checkpoint": "test_dreambooth_resume.py::test_resumed_from_the_middle_equals_uninterrupted",
        "force_resume": "test_resume.py::test_what_makes_it_another_run_is_refused_unless_forced",
        "text_encoder_use_attention_mask": "test_dreambooth_config.py::test_a_flag_of_the_scripts_means_what_it_meant",
        "skip_save_text_encoder": "test_dreambooth_config.py::test_a_flag_of_the_scripts_means_what_it_meant",
        "validation_images": "test_dreambooth_config.py::test_a_flag_of_the_scripts_means_what_it_meant",
        "class_labels_conditioning": "test_dreambooth_config.py::test_a_flag_of_the_scripts_means_what_it_meant",
    },
    GenerationConfig: {},
}


@pytest.mark.parametrize("config_class", ELSEWHERE)
def test_every_field_has_a_test_that_notices_when_it_does_nothing(config_class):
    here, elsewhere = COVERED[config_class], ELSEWHERE[config_class]
    names = {each.name for each in fields(config_class)}
    assert names - here - elsewhere.keys() == set(), "add a test here, or name the one that watches the field"
    assert here | elsewhere.keys() == names and not here & elsewhere.keys()
    for test in set(elsewhere.values()):
        file, name = test.split("::")
        text = (Path(__file__).parent / file).read_text(encoding="utf-8")
        assert re.search(rf"^def {name}\(", text, re.MULTILINE), test

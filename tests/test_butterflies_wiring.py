"""From each field of a butterflies run to what it does: a step by hand, every wire tried, nothing uploaded unasked."""

import copy
import gc
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image
from runs import TINY, words
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import diffusion_lessons.butterflies.command as command
import diffusion_lessons.butterflies.training as butterflies
import diffusion_lessons.engine.publishing as publishing
import diffusion_lessons.engine.run as run_room
from diffusion_lessons.butterflies.command import build_model, check_before_work, dry_run, load_data, main
from diffusion_lessons.butterflies.config import TrainingConfig
from diffusion_lessons.butterflies.training import evaluate, train_loop
from diffusion_lessons.diffusion.sampling import sample_images
from diffusion_lessons.diffusion.unet import make_unet
from diffusion_lessons.engine.config import InputError
from diffusion_lessons.engine.data import mixed_seed
from diffusion_lessons.engine.optimization import make_optimizer
from diffusion_lessons.engine.run import start_run
from diffusion_lessons.pictures.figures import make_grid
from diffusion_lessons.pictures.meadow import specimens
from diffusion_lessons.pictures.sets import ImageSet, make_dataloader

COVERED: set[str] = set()

# Fields that tests of another file follow to their end, as `file: test`.
ELSEWHERE = {
    "overwrite_output_dir": "test_butterflies.py: "
                            "test_an_earlier_run_is_replaced_only_when_allowed_and_an_unfinished_one_is_kept",
    "resume_from_checkpoint": "test_resume.py: test_going_back_sets_the_later_checkpoints_aside",
    "force_resume": "test_resume.py: test_what_makes_it_another_run_is_refused_unless_forced",
}  # fmt: skip


def covers(*names: str) -> Callable[[Callable], Callable]:
    """Mark a test as the one that would notice when these fields of the config led nowhere."""
    COVERED.update(names)
    return lambda test: test


def spoken(case: object) -> str | None:
    """The name of a case: the fields that it chooses."""
    return " ".join(f"{name}={value}" for name, value in case.items()) if isinstance(case, dict) else None


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> Iterator[None]:
    """A run ends with a collection of garbage, and searching what the imports made costs more than the run."""
    gc.freeze()
    yield
    gc.unfreeze()


def a_config(folder: Path, **changed) -> TrainingConfig:
    """A run of two steps over eight pictures."""
    plain = {"output_dir": str(folder), "num_train_images": 8, "num_epochs": 1, "mixed_precision": "no",
             "lr_warmup_steps": 0, "seed": 3}  # fmt: skip
    return TrainingConfig(**(TINY | plain | changed))


def noise_pictures(number: int = 8) -> ImageSet:
    """Pictures of random bytes: no two alike, none its own mirror image."""
    return ImageSet(np.random.default_rng(0).integers(0, 256, (number, 3, 16, 16), dtype=np.uint8))


def numbered_pictures(number: int) -> ImageSet:
    """Picture `i` is `i` everywhere."""
    return ImageSet(np.broadcast_to(np.arange(number, dtype=np.uint8)[:, None, None, None], (number, 3, 16, 16)).copy())


def trained(
    config: TrainingConfig, images: ImageSet | None = None, watch: Callable | None = None
) -> tuple[UNet2DModel, list[float]]:
    """Train what the config names on pictures in their order; return the network and the losses.

    watch: is given the network and the optimizer before the run, to put hooks on them.
    """
    model, scheduler = build_model(config)
    optimizer = make_optimizer(model.parameters(), config)
    if watch is not None:
        watch(model, optimizer)
    loader = make_dataloader(images or noise_pictures(), config.train_batch_size, shuffle=False)
    return model, train_loop(config, model, scheduler, optimizer, loader)


def flat(model: torch.nn.Module) -> torch.Tensor:
    return parameters_to_vector(model.parameters()).detach().clone()


def saved_network(folder: Path) -> UNet2DModel:
    return UNet2DModel.from_pretrained(folder, subfolder="unet")


# --- a step by hand ---


def alpha_bars(config: TrainingConfig) -> torch.Tensor:
    steps = config.ddpm_num_steps
    if config.ddpm_beta_schedule == "squaredcos_cap_v2":
        wave = [math.cos((step / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for step in range(steps + 1)]
        betas = torch.tensor([min(1 - wave[step + 1] / wave[step], 0.999) for step in range(steps)])
    else:
        betas = {"linear": torch.linspace(0.0001, 0.02, steps),
                 "scaled_linear": torch.linspace(0.01, math.sqrt(0.02), steps) ** 2,
                 "sigmoid": 0.0001 + 0.0199 * torch.linspace(-6, 6, steps).sigmoid(),
                 }[config.ddpm_beta_schedule]  # fmt: skip
    return torch.cumprod(1 - betas, 0)


def loss_by_hand(model, pictures: torch.Tensor, config: TrainingConfig, dice: torch.Generator) -> torch.Tensor:
    clean = pictures / 127.5 - 1
    if config.random_flip:
        mirrored = torch.rand(len(clean), generator=dice) < 0.5
        clean[mirrored] = clean[mirrored].flip(-1)
    timesteps = torch.randint(config.ddpm_num_steps, (len(clean),), generator=dice)
    noise = torch.randn(clean.shape, generator=dice)
    share = alpha_bars(config)[timesteps].reshape(-1, 1, 1, 1)
    target = {"epsilon": noise, "sample": clean,
              "v_prediction": share.sqrt() * noise - (1 - share).sqrt() * clean}[config.prediction_type]  # fmt: skip
    answer = model(share.sqrt() * clean + (1 - share).sqrt() * noise, timesteps).sample
    snr = (share / (1 - share)).flatten()
    bounded = snr.clamp(max=config.snr_gamma or math.inf)
    weights = {"epsilon": bounded / snr, "sample": bounded,
               "v_prediction": bounded / (snr + 1) if config.snr_gamma else 1}[config.prediction_type]  # fmt: skip
    return (weights * (answer - target).square().mean(dim=(1, 2, 3))).mean()


def steps_by_hand(model, pictures: torch.Tensor, config: TrainingConfig) -> tuple[list[float], list, list[float]]:
    """Losses, the weights after each optimizer step, and the norm of each gradient before it was clipped."""
    dice = torch.Generator().manual_seed(mixed_seed(config.seed, 0))
    batches = list(pictures.split(config.train_batch_size))
    groups = [batches[i : i + config.gradient_accumulation_steps]
              for i in range(0, len(batches), config.gradient_accumulation_steps)]  # fmt: skip
    weights, momentum, scale, losses, after, norms = flat(model), 0, 0, [], [], []
    beta1, beta2 = config.adam_beta1, config.adam_beta2
    for step, group in enumerate(groups, start=1):
        loss = sum(loss_by_hand(model, batch, config, dice) for batch in group) / len(group)
        gradient = torch.cat([each.flatten() for each in torch.autograd.grad(loss, list(model.parameters()))])
        norms.append(gradient.norm().item())
        gradient = gradient * min(1, config.max_grad_norm / norms[-1])
        momentum = beta1 * momentum + (1 - beta1) * gradient
        scale = beta2 * scale + (1 - beta2) * gradient**2
        rate = config.learning_rate * (1 + math.cos(math.pi * (step - 1) / len(groups))) / 2
        update = momentum / (1 - beta1**step) / ((scale / (1 - beta2**step)).sqrt() + config.adam_epsilon)
        weights = weights * (1 - rate * config.adam_weight_decay) - rate * update
        vector_to_parameters(weights, model.parameters())
        losses, after = [*losses, loss.item()], [*after, weights]
    return losses, after, norms


# Far from the defaults, and an epsilon that keeps a rounding error from becoming a whole step.
ADAM = {"learning_rate": 0.02, "adam_beta1": 0.7, "adam_beta2": 0.9, "adam_weight_decay": 0.5, "adam_epsilon": 0.003}


@covers("learning_rate", "adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon", "max_grad_norm",
        "gradient_accumulation_steps", "train_batch_size", "random_flip", "prediction_type", "ddpm_num_steps",
        "ddpm_beta_schedule", "snr_gamma", "seed")  # fmt: skip
@pytest.mark.parametrize(
    "chosen",
    [
        {"max_grad_norm": 100.0},
        {"max_grad_norm": 0.05},
        {"gradient_accumulation_steps": 2, "train_batch_size": 2, "max_grad_norm": 0.05},
        {"random_flip": False},
        {"seed": 4},
        {"prediction_type": "v_prediction", "ddpm_beta_schedule": "squaredcos_cap_v2", "ddpm_num_steps": 60},
        {"prediction_type": "sample", "ddpm_beta_schedule": "sigmoid"},
        {"snr_gamma": 0.02, "ddpm_beta_schedule": "scaled_linear"},
        {"snr_gamma": 0.5, "prediction_type": "v_prediction"},
        {"snr_gamma": 0.5, "prediction_type": "sample"},
    ],
    ids=spoken,
)
def test_two_steps_of_a_run_are_those_written_by_hand(tmp_path, chosen):
    config = a_config(tmp_path / "run", **(ADAM | chosen))
    images = noise_pictures()
    start, _ = build_model(config)
    model, losses = trained(config, images)
    expected, after, norms = steps_by_hand(copy.deepcopy(start), torch.from_numpy(images.pixels).float(), config)
    assert len(after) == 2 and not torch.allclose(flat(start), after[-1], atol=1e-3), "it learned something"
    if config.max_grad_norm != 1.0:
        assert all((norm > config.max_grad_norm) == (config.max_grad_norm < 1) for norm in norms)
    assert losses == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(flat(model), after[-1], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(flat(saved_network(tmp_path / "run")), flat(model), atol=0, rtol=0)


@covers("use_ema", "ema_inv_gamma", "ema_power", "ema_max_decay")
@pytest.mark.parametrize("chosen", [{"ema_inv_gamma": 0.5, "ema_power": 0.4}, {"ema_max_decay": 0.2}], ids=spoken)
def test_the_published_average_is_the_one_computed_by_hand(tmp_path, chosen):
    config = a_config(tmp_path / "run", use_ema=True, train_batch_size=2, **(ADAM | chosen))
    images = noise_pictures()
    model, _ = trained(config, images)
    _, after, _ = steps_by_hand(build_model(config)[0], torch.from_numpy(images.pixels).float(), config)
    average = after[0]
    for step, weights in enumerate(after[1:], start=1):
        decay = min(1 - (1 + step / config.ema_inv_gamma) ** -config.ema_power, config.ema_max_decay)
        average = decay * average + (1 - decay) * weights
    torch.testing.assert_close(flat(saved_network(tmp_path / "run")), average, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(flat(model), after[-1], atol=2e-5, rtol=1e-4)
    assert not torch.allclose(average, after[-1], atol=1e-3)


# --- optimizer and schedule ---


def test_the_optimizer_is_adamw_with_the_numbers_of_the_config(tmp_path):
    (group,) = make_optimizer([torch.nn.Parameter(torch.zeros(1))], a_config(tmp_path, **ADAM)).param_groups
    assert (group["lr"], group["betas"], group["weight_decay"], group["eps"]) == (0.02, (0.7, 0.9), 0.5, 0.003)


@covers("use_8bit_adam")
def test_8_bit_adam_comes_from_bitsandbytes_with_the_same_numbers(tmp_path, monkeypatch):
    optim = SimpleNamespace(AdamW8bit=lambda parameters, **options: options)
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace(__spec__=object(), optim=optim))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", optim)
    asked = make_optimizer([], a_config(tmp_path, use_8bit_adam=True, **ADAM))
    assert asked == {"lr": 0.02, "betas": (0.7, 0.9), "weight_decay": 0.5, "eps": 0.003}


def rates_of(config: TrainingConfig) -> list[float]:
    """The learning rate of each step of a run, as the optimizer had it."""
    rates = []
    trained(config, noise_pictures(), lambda model, optimizer: optimizer.register_step_pre_hook(
        lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"])))  # fmt: skip
    return rates


def cosine(step: float, steps: float) -> float:
    return (1 + math.cos(math.pi * step / steps)) / 2


@covers("lr_scheduler", "lr_warmup_steps", "lr_num_cycles", "lr_power", "min_lr_rate", "max_train_steps")
@pytest.mark.parametrize(
    "chosen, factor",
    [
        ({"lr_scheduler": "constant"}, lambda step: 1),
        ({"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 3}, lambda step: min(1, step / 3)),
        ({"lr_scheduler": "linear"}, lambda step: 1 - step / 6),
        ({"lr_scheduler": "linear", "lr_warmup_steps": 2}, lambda step: step / 2 if step < 2 else (6 - step) / 4),
        ({"lr_scheduler": "cosine"}, lambda step: cosine(step, 6)),
        ({"min_lr_rate": 0.2, "lr_warmup_steps": 2},
         lambda step: step / 2 if step < 2 else 0.2 + 0.8 * cosine(step - 2, 4)),
        ({"lr_scheduler": "cosine_with_restarts", "lr_num_cycles": 2}, lambda step: cosine(step % 3, 3)),
        ({"lr_scheduler": "polynomial", "lr_power": 2.0}, lambda step: (1 - step / 6) ** 2),
    ],
    ids=spoken,
)  # fmt: skip
def test_the_learning_rate_of_each_step_follows_the_schedule_that_was_chosen(tmp_path, chosen, factor):
    config = a_config(tmp_path / "run", max_train_steps=6, train_batch_size=1, learning_rate=1e-3, **chosen)
    assert rates_of(config) == pytest.approx([1e-3 * factor(step) for step in range(6)], rel=1e-4, abs=1e-7)


@covers("scale_lr")
def test_a_scaled_rate_is_multiplied_by_batch_and_accumulation(tmp_path):
    fields = dict(learning_rate=1e-4, lr_scheduler="constant", train_batch_size=2, gradient_accumulation_steps=4)
    assert rates_of(a_config(tmp_path / "plain", **fields)) == [pytest.approx(1e-4)]
    assert rates_of(a_config(tmp_path / "scaled", scale_lr=True, **fields)) == [pytest.approx(8e-4)]


WITH_A_HUB_OF_PAPER = """
import sys
from pathlib import Path
from types import SimpleNamespace
import diffusion_lessons.engine.publishing as publishing
import diffusion_lessons.engine.run as run_room
from diffusion_lessons.butterflies.command import main

class Hub:
    def __init__(self, token):
        pass
    def create_repo(self, repo_id, **options):
        return SimpleNamespace(repo_id=repo_id)
    def upload_folder(self, repo_id, **options):
        with open(sys.argv[1], "a") as notes:
            notes.write(repo_id + " ")

publishing.HfApi = Hub
raise SystemExit(main(sys.argv[2:]))
"""


def test_two_processes_count_in_a_scaled_rate_and_upload_once(tmp_path):
    chosen = dict(learning_rate=1e-4, lr_scheduler="constant", train_batch_size=2, gradient_accumulation_steps=3,
                  max_train_steps=1, num_train_images=12, push_to_hub=True, hub_token="hf_token")  # fmt: skip
    arguments = [str(tmp_path / "uploads"), *words(tmp_path / "flies", num_processes=2, scale_lr=True, **chosen)]
    command = [sys.executable, "-c", WITH_A_HUB_OF_PAPER, *arguments]
    online = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=online)
    assert done.returncode == 0, done.stderr
    checkpoint = tmp_path / "flies" / "checkpoint-1"
    assert json.loads((checkpoint / "progress.json").read_text())["num_processes"] == 2
    (group,) = torch.load(checkpoint / "optimizer.bin", weights_only=True)["param_groups"]
    assert group["lr"] == pytest.approx(1e-4 * 2 * 3 * 2)
    assert (tmp_path / "uploads").read_text().split() == ["flies"]


@covers("num_epochs")
def test_epochs_are_passes_over_the_data_unless_the_steps_decide(tmp_path):
    assert len(trained(a_config(tmp_path / "epochs", num_epochs=3))[1]) == 6
    assert len(trained(a_config(tmp_path / "steps", num_epochs=3, max_train_steps=5))[1]) == 5


# --- the network and its noise schedule ---


@pytest.mark.parametrize(
    "chosen",
    [{}, {"prediction_type": "v_prediction"}, {"ddpm_num_steps": 321}, {"ddpm_beta_schedule": "squaredcos_cap_v2"}],
    ids=spoken,
)
def test_the_saved_pipeline_names_the_noise_it_was_trained_with(tmp_path, chosen):
    trained(a_config(tmp_path / "run", max_train_steps=1, **chosen))
    saved = DDPMScheduler.from_pretrained(tmp_path / "run", subfolder="scheduler").config
    wanted = {"prediction_type": "epsilon", "ddpm_num_steps": 1000, "ddpm_beta_schedule": "linear"} | chosen
    assert wanted == {"prediction_type": saved.prediction_type, "ddpm_num_steps": saved.num_train_timesteps,
                      "ddpm_beta_schedule": saved.beta_schedule}  # fmt: skip


@covers("model_config_name_or_path", "image_size")
def test_the_network_is_the_named_one_for_pictures_of_that_size(tmp_path):
    small, _ = build_model(a_config(tmp_path))
    assert small.config.block_out_channels == (8, 16) and small.config.sample_size == 16
    larger, _ = build_model(a_config(tmp_path, model_config_name_or_path="tiny-32", image_size=64))
    assert larger.config.block_out_channels == (8, 16, 16) and larger.config.sample_size == 64
    larger.save_pretrained(tmp_path / "mine")
    mine, _ = build_model(a_config(tmp_path, model_config_name_or_path=str(tmp_path / "mine"), image_size=8))
    assert list(mine.config.block_out_channels) == [8, 16, 16] and mine.config.sample_size == 8


def test_the_seed_draws_the_weights_whatever_was_drawn_before(tmp_path):
    drawn = []
    for seed, before in ((3, 0), (3, 1), (4, 0)):
        torch.manual_seed(before)
        drawn.append(flat(build_model(a_config(tmp_path, seed=seed))[0]))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert torch.equal(drawn[2], flat(make_unet("tiny-16", 16, seed=4)))


@covers("pretrained_model_name_or_path")
def test_fine_tuning_takes_weights_and_noise_of_the_pipeline(tmp_path):
    theirs, scheduler = build_model(a_config(tmp_path, seed=9, prediction_type="sample", ddpm_num_steps=77))
    DDPMPipeline(theirs, scheduler).save_pretrained(tmp_path / "theirs")
    model, noise = build_model(a_config(tmp_path, pretrained_model_name_or_path=str(tmp_path / "theirs")))
    assert torch.equal(flat(model), flat(theirs))
    assert (noise.config.prediction_type, noise.config.num_train_timesteps) == ("sample", 77)


@covers("fused_backward_pass")
def test_a_fused_pass_steps_each_weight_within_the_backward_pass(tmp_path):
    calls = []

    def watch(model, optimizer):
        optimizer.register_step_pre_hook(lambda *_: calls.append(sum(each.grad is not None for each in weights(model))))

    def weights(model) -> list[torch.nn.Parameter]:
        return list(model.parameters())

    model, _ = trained(a_config(tmp_path, max_train_steps=2), noise_pictures(), watch)
    assert calls == [len(weights(model))] * 2
    calls.clear()
    trained(a_config(tmp_path, max_train_steps=2, fused_backward_pass=True), noise_pictures(), watch)
    assert calls == [1] * len(weights(model)) * 2


@covers("enable_xformers_memory_efficient_attention")
def test_xformers_is_switched_on_for_the_network_only_when_asked(tmp_path, monkeypatch):
    switched = []
    monkeypatch.setattr(command, "enable_xformers", switched.append)
    build_model(a_config(tmp_path))
    assert not switched
    model, _ = build_model(a_config(tmp_path, enable_xformers_memory_efficient_attention=True))
    assert switched == [model]
    monkeypatch.setattr(run_room, "check_xformers", lambda: switched.append("tried"))
    check_before_work(a_config(tmp_path / "run", enable_xformers_memory_efficient_attention=True))
    assert switched == [model, "tried"], "a network without numbers is not asked"


# --- before the work ---


def test_a_dry_run_times_whole_steps_and_counts_those_of_each_process(tmp_path, monkeypatch):
    timed = []

    def two_seconds(state, loss_of, repeats):
        timed.append(state.accelerator.gradient_accumulation_steps)
        return 2.0

    monkeypatch.setattr(command, "seconds_per_micro_step", two_seconds)
    config = a_config(tmp_path / "run", train_batch_size=4, gradient_accumulation_steps=4, num_epochs=3,
                      max_train_steps=None)  # fmt: skip
    said = dry_run(config, noise_pictures(33), num_processes=2)  # five batches for each
    assert "33 pictures, 2 steps an epoch, 6 steps in 3 epochs" in said
    assert "about 0.5 minutes (2.000 s a micro-step" in said, "15 micro-steps: the second step of an epoch has one"
    assert timed == [1], "each micro-step is timed with its update"


def test_a_wanted_upload_without_a_login_ends_before_the_work(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(publishing, "get_token", lambda: None)
    assert main(words(tmp_path / "run", push_to_hub=True)) == 2
    assert "--push_to_hub: not logged in" in capsys.readouterr().err and not (tmp_path / "run").exists()


# --- the pictures ---


@pytest.fixture
def folder(tmp_path) -> Path:
    """A wide picture, red on the left and blue on the right of a green square, and a file that is no picture."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    pixels = np.zeros((32, 64, 3), np.uint8)
    pixels[:, :16, 0] = pixels[:, 16:48, 1] = pixels[:, 48:, 2] = 200
    Image.fromarray(pixels).save(pictures / "flag.png")
    (pictures / "torn.png").write_bytes(b"\x89PNG torn")
    return pictures


def seen(config: TrainingConfig) -> np.ndarray:
    (picture,) = load_data(config).pixels
    return np.asarray(picture)


@covers("train_data_dir", "resize", "center_crop")
def test_pictures_of_a_folder_are_made_square_in_the_way_that_was_chosen(tmp_path, folder):
    chosen = {"train_data_dir": str(folder), "on_bad_image": "skip"}
    cropped = seen(a_config(tmp_path, resize="crop", **chosen))
    assert (cropped[1, :, 1:-1] == 200).all() and not cropped[[0, 2], :, 1:-1].any(), "the square in the middle"
    assert np.array_equal(cropped, seen(a_config(tmp_path, center_crop=True, **chosen)))
    squeezed = seen(a_config(tmp_path, resize="squeeze", **chosen))
    assert (squeezed[0, :, 1] == 200).all() and (squeezed[2, :, -2] == 200).all(), "all of it, to the edges"
    assert np.array_equal(squeezed, seen(a_config(tmp_path, **chosen))), "as the tutorial does"
    padded = seen(a_config(tmp_path, resize="pad", **chosen))
    assert (padded[0, 6:10, 1] > 190).all() and (padded[2, 6:10, -2] > 190).all(), "all of it"
    assert len(np.unique(padded[:, 0].reshape(3, -1), axis=1).T) == 1, "under a border of one colour"


@covers("on_bad_image")
def test_a_torn_file_is_refused_or_skipped(tmp_path, folder):
    with pytest.raises(InputError, match="torn.png"):
        load_data(a_config(tmp_path, train_data_dir=str(folder)))
    images = load_data(a_config(tmp_path, train_data_dir=str(folder), on_bad_image="skip"))
    assert len(images) == 1 and len(images.skipped) == 1


@covers("num_train_images")
def test_the_meadow_draws_so_many_pictures_from_the_seed(tmp_path):
    images = load_data(a_config(tmp_path, num_train_images=5, seed=6))
    drawn = [np.asarray(each).transpose(2, 0, 1) for each in specimens(5, 16, 6)["image"]]
    assert np.array_equal(images.pixels, np.stack(drawn))
    assert not np.array_equal(images.pixels, load_data(a_config(tmp_path, num_train_images=5, seed=7)).pixels)


@covers("dataset_name", "dataset_config_name", "cache_dir")
def test_a_data_set_by_name_and_configuration_lands_in_the_cache_that_was_named(tmp_path):
    home = tmp_path / "two"
    for number, name in enumerate(("dark", "light")):
        (home / name).mkdir(parents=True)
        Image.new("RGB", (16, 16), (200 * number,) * 3).save(home / name / "one.png")
    configurations = [f"- config_name: {name}\n  data_dir: {name}" for name in ("dark", "light")]
    (home / "README.md").write_text("---\nconfigs:\n" + "\n".join(configurations) + "\n---\n")
    chosen = {"dataset_name": str(home), "cache_dir": str(tmp_path / "cache")}
    assert (seen(a_config(tmp_path, dataset_config_name="light", **chosen)) == 200).all()
    assert (seen(a_config(tmp_path, dataset_config_name="dark", **chosen)) == 0).all()
    assert list((tmp_path / "cache").rglob("*.arrow"))


@covers("preserve_input_precision")
def test_input_precision_is_refused(tmp_path):
    with pytest.raises(InputError, match="--preserve_input_precision"):
        a_config(tmp_path, preserve_input_precision=True)


def order_of(config: TrainingConfig, global_seed: int) -> list[list[int]]:
    """The pictures of each epoch in the order in which a run gets them, its loader made after the global seed."""
    torch.manual_seed(global_seed)
    model = make_unet("tiny-16", 16, seed=0)
    loader = make_dataloader(numbered_pictures(24), 8)
    optimizer, epochs = make_optimizer(model.parameters(), config), []
    with start_run(config, {"unet": model}, optimizer, loader, num_epochs=2) as started:
        for _ in started.epochs():
            epochs.append([])
            for batch in started.batches():
                epochs[-1] += batch["images"][:, 0, 0, 0].tolist()
                with started.accumulate():
                    started.backward(next(started.prepared["unet"].parameters()).square().sum())
                    started.step()
    return epochs


def test_the_seed_draws_the_order_of_the_pictures_anew_in_each_epoch(tmp_path):
    one, again, other = (order_of(a_config(tmp_path / name, seed=seed), number)
                         for number, (name, seed) in enumerate([("one", 3), ("again", 3), ("other", 4)]))  # fmt: skip
    assert one == again and one[0] != other[0] and one[0] != one[1]
    assert sorted(one[0]) == sorted(one[1]) == list(range(24))


# --- what the command builds ---


def handed_over(monkeypatch, folder: Path, **chosen) -> SimpleNamespace:
    """What the command gives to the loop, in place of training."""
    caught = SimpleNamespace()

    def catch(config, model, noise_scheduler, optimizer, train_dataloader):
        caught.__dict__.update(locals())

    monkeypatch.setattr(command, "train_loop", catch)
    assert main(words(folder, **chosen)) == 0
    return caught


@covers("dataloader_num_workers")
def test_the_command_hands_everything_that_was_said_to_the_loop(tmp_path, monkeypatch):
    chosen = dict(train_batch_size=3, dataloader_num_workers=2, num_train_images=7, seed=8, ddpm_num_steps=44,
                  prediction_type="sample", **ADAM)  # fmt: skip
    given = handed_over(monkeypatch, tmp_path / "run", **chosen)
    assert {name: getattr(given.config, name) for name in chosen} == chosen
    loader = given.train_dataloader
    assert (loader.batch_size, loader.num_workers, len(loader.dataset)) == (3, 2, 7)
    assert isinstance(loader.sampler, torch.utils.data.RandomSampler)
    assert np.array_equal(loader.dataset.pixels, load_data(given.config).pixels)
    assert torch.equal(flat(given.model), flat(make_unet("tiny-16", 16, seed=8)))
    assert given.noise_scheduler.config.num_train_timesteps == 44
    (group,) = given.optimizer.param_groups
    assert (group["lr"], group["betas"], group["weight_decay"], group["eps"]) == (0.02, (0.7, 0.9), 0.5, 0.003)
    assert {id(each) for each in group["params"]} == {id(each) for each in given.model.parameters()}


@covers("local_rank")
def test_a_local_rank_from_an_old_launcher_changes_nothing(tmp_path):
    for name, rank in (("without", -1), ("with", 0)):
        assert main(words(tmp_path / name, max_train_steps=1, num_train_images=4, local_rank=rank)) == 0
    assert torch.equal(flat(saved_network(tmp_path / "without")), flat(saved_network(tmp_path / "with")))


# --- precision ---


@covers("mixed_precision")
@pytest.mark.parametrize("chosen, dtype", [("no", torch.float32), ("bf16", torch.bfloat16)])
def test_the_network_computes_in_the_precision_that_was_chosen_also_for_the_grids(tmp_path, chosen, dtype):
    computed = {True: [], False: []}

    def watch(model, optimizer):
        model.conv_in.register_forward_hook(lambda layer, _, output: computed[layer.training].append(output.dtype))

    trained(a_config(tmp_path / "run", mixed_precision=chosen), watch=watch)
    assert computed == {True: [dtype] * 2, False: [dtype] * 2}, "two steps of training, two of a grid"
    assert next(saved_network(tmp_path / "run").parameters()).dtype == torch.float32


@pytest.fixture
def tf32() -> Iterator[tuple]:
    """PyTorch's two switches, off; afterwards as they were."""
    switches = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = False
    yield switches
    for switch, value in zip(switches, before, strict=True):
        switch.allow_tf32 = value


@covers("allow_tf32")
@pytest.mark.parametrize("allowed", [False, True])
def test_tf32_is_allowed_only_when_asked(tmp_path, tf32, allowed):
    trained(a_config(tmp_path / "run", max_train_steps=1, allow_tf32=allowed))
    assert [switch.allow_tf32 for switch in tf32] == [allowed] * 2


# --- looking and saving ---


def grid(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


@covers("eval_batch_size", "sampler", "num_inference_steps", "output_dir")
@pytest.mark.parametrize(
    "chosen, calls",
    [
        ({"sampler": "ddpm", "num_inference_steps": 3}, 3),
        ({"sampler": "ddim", "num_inference_steps": 3}, 3),
        ({"sampler": "dpmsolver++", "num_inference_steps": 3}, 3),
        ({"num_inference_steps": 5, "eval_batch_size": 6, "seed": 9}, 5),
        ({"sampler": "ddpm", "num_inference_steps": None, "ddpm_num_steps": 7}, 7),
        ({"sampler": "ddim", "num_inference_steps": None}, 50),
        ({"sampler": "dpmsolver++", "num_inference_steps": None}, 25),
    ],
    ids=spoken,
)
def test_a_grid_shows_so_many_pictures_of_that_solver_and_seed(tmp_path, chosen, calls):
    config, asked = a_config(tmp_path / "run", **({"eval_batch_size": 3} | chosen)), []
    model, scheduler = build_model(config)
    hook = model.register_forward_hook(lambda *_: asked.append(1))
    shown = evaluate(config, 4, DDPMPipeline(model, scheduler))
    hook.remove()
    assert len(asked) == calls
    rows, cols = {3: (1, 3), 6: (2, 3)}[config.eval_batch_size]
    pictures = sample_images(model, scheduler, config.eval_batch_size, sampler=config.sampler,
                             num_inference_steps=calls, seed=config.seed)  # fmt: skip
    expected = np.asarray(make_grid(list(pictures), rows, cols))
    assert np.array_equal(np.asarray(shown), expected) and expected.shape == (16 * rows, 16 * cols, 3)
    assert np.array_equal(grid(tmp_path / "run" / "samples" / "0004.png"), expected)


def test_each_solver_and_each_seed_shows_something_else(tmp_path):
    shown = []
    for chosen in ({"sampler": "ddpm"}, {"sampler": "ddim"}, {"sampler": "dpmsolver++"}, {"seed": 5}):
        config = a_config(tmp_path, num_inference_steps=6, **chosen)
        _, scheduler = build_model(config)
        shown.append(evaluate(config, 0, DDPMPipeline(make_unet("tiny-16", 16, seed=0), scheduler)).tobytes())
    assert len(set(shown)) == 4


@pytest.mark.parametrize("use_ema", [False, True])
def test_a_grid_is_drawn_with_the_weights_that_are_published(tmp_path, use_ema):
    config = a_config(tmp_path / "run", use_ema=use_ema, train_batch_size=2, **ADAM)
    model, _ = trained(config)
    published = DDPMPipeline.from_pretrained(tmp_path / "run")
    assert torch.equal(flat(published.unet), flat(model)) != use_ema
    shown = grid(tmp_path / "run" / "samples" / "0000.png")
    elsewhere = a_config(tmp_path / "again")
    assert np.array_equal(shown, np.asarray(evaluate(elsewhere, 0, published)))
    with_last_weights = np.asarray(evaluate(elsewhere, 1, DDPMPipeline(model, published.scheduler)))
    assert np.array_equal(shown, with_last_weights) != use_ema


def looks_and_saves(monkeypatch, config: TrainingConfig) -> list[tuple[str, int]]:
    """After which steps a run of one step an epoch draws a grid and saves the pipeline."""
    found, steps = [], []

    def look(*_) -> Image.Image:
        found.append(("look", len(steps)))
        return Image.new("RGB", (1, 1))

    monkeypatch.setattr(butterflies, "evaluate", look)
    monkeypatch.setattr(butterflies, "save_pipeline", lambda *_: found.append(("save", len(steps))))
    trained(config, noise_pictures(4), lambda model, optimizer: optimizer.register_step_post_hook(
        lambda *_: steps.append(1)))  # fmt: skip
    return found


@covers("save_image_epochs", "save_model_epochs")
@pytest.mark.parametrize(
    "looking, saving, looks, saves",
    [(2, 3, [2, 4, 6, 7], [3, 6, 7]), (None, 100, [3, 5, 7], [7]), (5, 1, [5, 7], range(1, 8))],
)
def test_grids_and_pipelines_are_due_after_their_epochs_and_at_the_end(
    tmp_path, monkeypatch, looking, saving, looks, saves
):
    config = a_config(tmp_path / "run", num_epochs=7, save_image_epochs=looking, save_model_epochs=saving)
    found = looks_and_saves(monkeypatch, config)
    assert [step for kind, step in found if kind == "look"] == list(looks)
    assert [step for kind, step in found if kind == "save"] == list(saves)


@covers("checkpointing_steps", "checkpoints_total_limit")
@pytest.mark.parametrize("limit, left", [(None, [2, 4, 6, 7]), (2, [6, 7])])
def test_checkpoints_are_written_every_so_many_steps_and_the_newest_are_kept(tmp_path, limit, left):
    config = a_config(tmp_path / "run", max_train_steps=7, checkpointing_steps=2, checkpoints_total_limit=limit)
    trained(config, noise_pictures(4))
    assert sorted(int(path.name.split("-")[1]) for path in (tmp_path / "run").glob("checkpoint-*")) == left


# --- trackers ---


def logged(folder: Path) -> dict[str, list[int]]:
    """The steps at which TensorBoard got each number, from the one log below a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = (path for path in folder.glob("*/events.out.tfevents.*"))
    events = EventAccumulator(str(file))
    events.Reload()
    return {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@covers("report_to", "logging_dir", "logging_steps")
def test_the_tracker_that_was_named_gets_the_numbers_in_groups_in_its_folder(tmp_path):
    chosen = dict(report_to="tensorboard", logging_dir="diary", logging_steps=3)
    trained(a_config(tmp_path / "run", train_batch_size=1, **chosen))
    numbers = logged(tmp_path / "run" / "diary")
    assert numbers["train/loss"] == list(range(1, 9)) and numbers["train/learning_rate"] == [3, 6, 8]
    assert not (tmp_path / "run" / "logs").exists()


def test_without_a_tracker_nothing_is_logged(tmp_path):
    trained(a_config(tmp_path / "run", report_to="none"))
    assert not (tmp_path / "run" / "logs").exists() and not list((tmp_path / "run").rglob("*tfevents*"))


# --- publishing ---

TOKEN = "hf_a_token_that_must_not_be_written_anywhere"


class Hub:
    """Stands for HfApi, and notes what is asked of it."""

    def __init__(self, asked: list, token: str | None) -> None:
        self.asked = asked
        self.asked.append(("token", token))

    def create_repo(self, repo_id, private=None, exist_ok=False):
        self.asked.append(("create", repo_id, private, exist_ok))
        return SimpleNamespace(repo_id=f"somebody/{repo_id.split('/')[-1]}")

    def upload_folder(self, repo_id, folder_path, ignore_patterns, commit_message):
        present = {path.name for path in Path(folder_path).iterdir()}
        self.asked.append(("upload", repo_id, str(folder_path), set(ignore_patterns), present))


@pytest.fixture
def hub(monkeypatch) -> list:
    asked = []
    monkeypatch.delenv("HF_HUB_OFFLINE")  # offline, --push_to_hub is refused
    monkeypatch.setattr(publishing, "HfApi", lambda token=None: Hub(asked, token))
    return asked


@covers("push_to_hub", "hub_token", "hub_model_id", "hub_private_repo")
@pytest.mark.parametrize(
    "chosen, name, private",
    [({}, "flies", None), ({"hub_private_repo": True, "hub_model_id": "club/moths"}, "club/moths", True)],
)
def test_a_finished_run_is_uploaded_once_when_asked(tmp_path, hub, chosen, name, private):
    folder = tmp_path / "flies"
    assert main(words(folder, push_to_hub=True, hub_token=TOKEN, num_train_images=4, num_epochs=3, save_model_epochs=1,
                      logging_dir="diary", **chosen)) == 0  # fmt: skip
    assert [each[0] for each in hub] == ["token", "create", "upload"]
    assert hub[0] == ("token", TOKEN) and hub[1] == ("create", name, private, True)
    _, repository, uploaded, left_out, present = hub[2]
    assert repository == f"somebody/{name.split('/')[-1]}" and Path(uploaded).name == folder.name
    assert {"checkpoint-*/**", "diary/**", "logs/**"} <= left_out
    assert {"README.md", "model_index.json", "unet", "scheduler", "samples", "training_config.json"} <= present


def test_nothing_is_uploaded_unasked(tmp_path, hub):
    assert main(words(tmp_path / "run", hub_token=TOKEN, hub_model_id="club/moths", hub_private_repo=True,
                      max_train_steps=1, num_train_images=4)) == 0  # fmt: skip
    assert hub == []


def test_a_run_that_fails_uploads_nothing(tmp_path, hub, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("the sun went down")

    monkeypatch.setattr(butterflies, "denoising_loss", fail)
    assert main(words(tmp_path / "run", push_to_hub=True, hub_token=TOKEN, num_train_images=4)) == 1
    assert hub == []


def test_the_card_of_a_run_says_what_it_is_and_how_it_was_made(tmp_path):
    folder = tmp_path / "flies"
    trained(a_config(folder, num_epochs=2, save_image_epochs=1, prediction_type="v_prediction", hub_token=TOKEN))
    card = (folder / "README.md").read_text()
    for said in ("# flies", "pictures of 16 px, trained for 4 steps", "![samples](samples/0001.png)",
                 'from_pretrained("flies")', "- unconditional-image-generation", '"prediction_type": "v_prediction"',
                 '"num_epochs": 2', '"output_dir": "flies"'):  # fmt: skip
        assert said in card, said
    assert "base_model" not in card and '"num_inference_steps": 2' in card and '"sampler"' not in card


def test_the_card_names_the_model_that_was_fine_tuned(tmp_path, monkeypatch):
    theirs, scheduler = build_model(a_config(tmp_path, seed=9))
    monkeypatch.setattr(command, "load_unconditional", lambda name, size: (theirs, scheduler))
    trained(a_config(tmp_path / "run", max_train_steps=1, pretrained_model_name_or_path="somebody/moths"))
    assert "base_model: somebody/moths" in (tmp_path / "run" / "README.md").read_text()


def test_a_token_of_the_command_line_is_nowhere_after_the_run(tmp_path, hub, monkeypatch, capfd):
    chosen = dict(report_to="tensorboard", checkpointing_steps=1, num_train_images=8, max_train_steps=2, use_ema=True)
    typed = words(tmp_path / "run", push_to_hub=True, hub_token=TOKEN, **chosen)
    monkeypatch.setattr(sys, "argv", ["train-butterflies", *typed])
    assert main() == 0
    assert ("token", TOKEN) in hub and not any(TOKEN in word for word in sys.argv)
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    names = {path.name for path in written}
    assert {"README.md", "training_config.json", "progress.json"} <= names and any("tfevents" in name for name in names)
    assert not [path for path in written if TOKEN.encode() in path.read_bytes()]
    assert not [line for line in capfd.readouterr() if TOKEN in line]


@pytest.mark.parametrize("typed", [["--hub_token", TOKEN], ["--hub-token", TOKEN], [f"--hub_token={TOKEN}"]])
def test_the_token_is_hidden_before_the_work_begins_and_the_other_words_stay(monkeypatch, typed):
    during = []
    monkeypatch.setattr(sys, "argv", ["train-butterflies", "--seed", "7", *typed, "--sampler", "ddim"])
    monkeypatch.setattr(command, "run_butterflies", lambda config, _: during.append((config, list(sys.argv))))
    assert main() == 0
    ((config, argv),) = during
    assert (config.hub_token, config.seed, config.sampler) == (TOKEN, 7, "ddim")
    assert not any(TOKEN in word for word in argv)
    assert argv[:3] == ["train-butterflies", "--seed", "7"] and argv[-2:] == ["--sampler", "ddim"]


# --- nothing forgotten ---


def test_every_field_is_covered_here_or_in_the_file_that_is_named():
    names = {each.name for each in fields(TrainingConfig)}
    assert names >= COVERED | set(ELSEWHERE), "a test covers a field that is no more"
    assert not COVERED & set(ELSEWHERE)
    assert not names - COVERED - set(ELSEWHERE), "write a test that the field does something"
    for name, place in ELSEWHERE.items():
        file, test = place.split(": ")
        text = (Path(__file__).parent / file).read_text()
        assert f"def {test}(" in text and name in text, place

"""The autoencoder: loss and measure by hand, moments and scale, small runs, and an encoder that stands still."""

import json
import math
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image

from diffusion_lessons.engine.config import InputError
from diffusion_lessons.miniature.autoencoder import (
    AutoencoderConfig,
    autoencoder_loss,
    load_autoencoder,
    make_autoencoder,
    measure_scale,
    psnr,
    reconstruct,
    train_autoencoder,
)
from diffusion_lessons.miniature.captions import render_scenes
from diffusion_lessons.stable_diffusion.latents import encode_moments


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def pictures():
    return render_scenes(12, seed=3, exclude=())


@pytest.fixture(scope="module")
def pixels(pictures) -> torch.Tensor:
    return torch.as_tensor(pictures.pixels)


@pytest.fixture(scope="module")
def model() -> AutoencoderKL:
    return make_autoencoder(seed=0)


def cloud(mean: float, log_variance: float) -> DiagonalGaussianDistribution:
    """Two pictures' latents, all with the same mean and variance."""
    shape = (2, 4, 2, 2)
    return DiagonalGaussianDistribution(torch.cat([torch.full(shape, mean), torch.full(shape, log_variance)], dim=1))


# --- the model ---


def test_new_weights_come_from_the_seed_and_from_nothing_else():
    before = torch.get_rng_state()
    one, same, other = (make_autoencoder(seed).decoder.conv_in.weight for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("size", [32, 64, 96])
def test_latents_have_a_quarter_of_the_side(model, size):
    latents = model.encode(torch.zeros(1, 3, size, size)).latent_dist.mean
    assert latents.shape == (1, 4, size // 4, size // 4)
    assert model.decode(latents).sample.shape == (1, 3, size, size)


# --- the loss ---


@pytest.mark.parametrize("mean, log_variance, kl", [(0.0, 0.0, 0.0), (1.0, 0.0, 0.5), (0.0, math.log(4), 0.8068528),
                                                    (2.0, -2.0, 2.5676676)])  # fmt: skip
def test_the_loss_is_the_sum_of_three_means(mean, log_variance, kl):
    images = torch.zeros(2, 3, 8, 8)
    loss = autoencoder_loss(images + 0.5, images, cloud(mean, log_variance), kl_weight=0.1)
    assert float(loss) == pytest.approx(0.25 + 0.2 * 0.5 + 0.1 * kl, rel=1e-5)


def test_the_kl_term_pulls_a_narrow_cloud_wider():
    parameters = torch.cat([torch.zeros(1, 4, 2, 2), torch.full((1, 4, 2, 2), -6.0)], dim=1).requires_grad_()
    images = torch.zeros(1, 3, 8, 8)
    autoencoder_loss(images, images, DiagonalGaussianDistribution(parameters), 1.0).backward()
    mean, log_variance = parameters.grad.chunk(2, dim=1)
    assert (log_variance < 0).all() and (mean == 0).all()


# --- the measure ---


def test_psnr_by_hand_one_number_for_each_pair():
    zeros = torch.zeros(3, 3, 4, 4)
    other = zeros + torch.tensor([0.2, 0.02, 0.0])[:, None, None, None]
    torch.testing.assert_close(psnr(zeros, other), torch.tensor([20.0, 40.0, math.inf]))
    torch.testing.assert_close(psnr(zeros, other), psnr(other, zeros))


def test_psnr_takes_bytes_and_floats_alike(pixels):
    floats = pixels.float() / 127.5 - 1
    torch.testing.assert_close(psnr(pixels, pixels.flip(0)), psnr(floats, floats.flip(0)), rtol=1e-5, atol=1e-3)
    one_level = psnr(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), torch.ones(1, 3, 4, 4, dtype=torch.uint8))
    assert float(one_level) == pytest.approx(20 * math.log10(255), abs=1e-3)


# --- many pictures ---


def test_reconstruct_does_not_depend_on_batches_and_restores_the_mode(model, pixels):
    model.train()
    whole, pieces = reconstruct(model, pixels), reconstruct(model, pixels, batch_size=5)
    assert model.training and model.decoder.training
    assert whole.dtype == torch.uint8 and whole.shape == pixels.shape
    assert (whole.int() - pieces.int()).abs().max() <= 1
    with torch.no_grad():
        by_hand = model.decode(model.encode(pixels.float() / 127.5 - 1).latent_dist.mode()).sample
    assert (((by_hand.clamp(-1, 1) + 1) * 127.5) - whole).abs().max() < 0.51


def test_moments_are_what_the_encoder_says_in_16_bits(model, pixels):
    moments = encode_moments(model, pixels, batch_size=5)
    assert moments.shape == (12, 8, 16, 16) and moments.dtype == torch.float16 and not moments.requires_grad
    with torch.no_grad():
        said = model.encode(pixels.float() / 127.5 - 1).latent_dist
    torch.testing.assert_close(moments[:, :4].float(), said.mean, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(moments[:, 4:].float(), said.logvar, atol=2e-3, rtol=2e-3)


def test_the_scale_makes_latents_of_spread_one_and_is_saved_with_the_model(pictures, pixels, tmp_path):
    model = make_autoencoder(seed=0)
    measure_scale(model, pictures)
    scale = model.config.scaling_factor
    assert float(encode_moments(model, pixels)[:, :4].float().std()) * scale == pytest.approx(1, abs=1e-3)
    model.save_pretrained(tmp_path / "vae")
    assert load_autoencoder(tmp_path).config.scaling_factor == scale
    measure_scale(model, pictures, num_images=1)
    assert model.config.scaling_factor != scale, "measured on the first picture only"


# --- a model folder ---


def test_a_folder_without_an_autoencoder_is_named(tmp_path):
    with pytest.raises(InputError, match="nowhere") as caught:
        load_autoencoder(tmp_path / "nowhere")
    assert "\n" not in str(caught.value) and "`autoencoder`" in str(caught.value)


@pytest.mark.parametrize("fault", ["half", "text", "no config", "broken config", "no weights", "other class"])
def test_a_broken_autoencoder_is_input_and_not_a_traceback(model, tmp_path, fault):
    folder = tmp_path / "vae"
    model.save_pretrained(folder)
    weights, config = folder / "diffusion_pytorch_model.safetensors", folder / "config.json"
    if fault == "half":
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    elif fault == "text":
        weights.write_text("version https://git-lfs.github.com/spec/v1")
    elif fault == "no config":
        config.unlink()
    elif fault == "broken config":
        config.write_text("{")
    elif fault == "no weights":
        weights.unlink()
    else:
        config.write_text(json.dumps({"_class_name": "AutoencoderKL", "block_out_channels": [8], "norm_num_groups": 8}))
    with pytest.raises(InputError, match="model_dir"):
        load_autoencoder(tmp_path)


# --- runs ---


def small(folder: Path, **fields) -> AutoencoderConfig:
    chosen = {"output_dir": str(folder / "run"), "model_dir": str(folder / "model"), "data_dir": None,
              "report_to": "none", "num_train_images": 8, "train_batch_size": 4, "max_train_steps": 4,
              "sample_steps": 1000, "lr_warmup_steps": 0, "mixed_precision": "no",
              "ema_max_decay": 0.5} | fields  # fmt: skip
    return AutoencoderConfig(**chosen)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, list[float]]:
    """The folder of a run of a few steps, and its losses."""
    folder = tmp_path_factory.mktemp("autoencoder")
    return folder, train_autoencoder(small(folder, sample_steps=2))


def test_a_run_leaves_a_model_samples_and_a_checkpoint(trained):
    folder, losses = trained
    assert len(losses) == 4 and all(math.isfinite(loss) for loss in losses)
    names = sorted(path.name for path in (folder / "run" / "samples").iterdir())
    assert names == ["step-000002.png", "step-000004.png"]
    assert Image.open(folder / "run" / "samples" / names[0]).size == (8 * 64, 2 * 64)
    assert (folder / "run" / "checkpoint-4" / "vae").is_dir()
    assert (folder / "run" / "training_config.json").is_file()


def test_a_run_saves_its_average_and_measures_the_scale(trained):
    folder, _ = trained
    saved = load_autoencoder(folder / "model")
    average = AutoencoderKL.from_pretrained(folder / "run" / "checkpoint-4" / "vae_ema")
    last = AutoencoderKL.from_pretrained(folder / "run" / "checkpoint-4" / "vae")
    assert all(torch.equal(weight, average.state_dict()[name]) for name, weight in saved.state_dict().items())
    assert not torch.equal(saved.decoder.conv_out.weight, last.decoder.conv_out.weight)
    latents = encode_moments(saved, torch.as_tensor(render_scenes(8).pixels))[:, :4].float()
    assert float(latents.std()) * saved.config.scaling_factor == pytest.approx(1, abs=1e-3)


def test_equal_runs_are_equal(trained, tmp_path):
    assert train_autoencoder(small(tmp_path)) == trained[1]


def test_with_a_frozen_encoder_no_latent_moves(trained, tmp_path):
    """Not even where the decoder sees other pictures: a UNet relies on the latents and on their scale."""
    old = load_autoencoder(trained[0] / "model")
    old.save_pretrained(tmp_path / "model" / "vae")
    train_autoencoder(small(tmp_path, freeze_encoder=True, seed=7, max_train_steps=2))
    new = load_autoencoder(tmp_path / "model")
    moved = {name for name, weight in new.state_dict().items() if not torch.equal(weight, old.state_dict()[name])}
    assert moved and all(name.startswith(("decoder.", "post_quant_conv.")) for name in moved)
    assert {"decoder.conv_in.weight", "decoder.conv_out.weight", "post_quant_conv.weight"} <= moved
    assert new.config.scaling_factor == old.config.scaling_factor
    pixels = torch.as_tensor(render_scenes(2).pixels)
    assert torch.equal(encode_moments(new, pixels), encode_moments(old, pixels))


def test_a_frozen_encoder_needs_one(tmp_path):
    with pytest.raises(InputError, match="autoencoder"):
        train_autoencoder(small(tmp_path, freeze_encoder=True))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("fields", [{"mixed_precision": "half"}, {"train_batch_size": 16}, {"sample_steps": 0}])
def test_values_that_cannot_be_are_refused(tmp_path, fields):
    with pytest.raises(InputError, match=next(iter(fields)).replace("train_batch_size", "num_train_images")):
        small(tmp_path, **fields)

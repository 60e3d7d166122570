"""Schedules by name, targets and their weights, and a whole batch, against diffusers and against the formulas."""
import math

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from noised import SHAPES, batch, generator

from diffusion_lessons.diffusion.noise import add_noise, alphas_cumprod_for
from diffusion_lessons.diffusion.targets import (
    BETA_SCHEDULES,
    PREDICTION_TYPES,
    betas_for,
    denoising_loss,
    loss_weights,
    make_noise_scheduler,
    min_snr_weights,
    noise_batch,
    predicted_clean,
    sample_noise,
    signal_to_noise,
    training_target,
)
from diffusion_lessons.engine.config import InputError

EVERY = torch.arange(1000)


@pytest.mark.parametrize("num_steps", [1000, 100, 7])
@pytest.mark.parametrize("name", BETA_SCHEDULES)
def test_schedules_are_those_of_diffusers(name, num_steps):
    scheduler = DDPMScheduler(num_steps, beta_schedule=name)
    assert torch.equal(betas_for(name, num_steps), scheduler.betas)
    assert torch.equal(alphas_cumprod_for(betas_for(name, num_steps)), scheduler.alphas_cumprod)


def test_ends_of_the_betas_are_used():
    expected = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    assert torch.equal(betas_for("scaled_linear", 1000, 0.00085, 0.012), expected.betas)
    ours = make_noise_scheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    assert torch.equal(ours.alphas_cumprod, expected.alphas_cumprod)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", BETA_SCHEDULES)
def test_velocity_is_that_of_diffusers(name, shape):
    clean, noise, timesteps = batch(shape)
    scheduler = DDPMScheduler(beta_schedule=name)
    velocity = training_target("v_prediction", clean, noise, timesteps, scheduler.alphas_cumprod)
    assert torch.equal(velocity, scheduler.get_velocity(clean, noise, timesteps))


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("name", ["linear", "squaredcos_cap_v2"])
def test_targets_lead_back_to_the_picture(name, prediction_type):
    clean, noise, timesteps = batch((6, 3, 8, 8))
    clean, noise = clean.double(), noise.double()
    alpha_bar = alphas_cumprod_for(betas_for(name))
    noisy = add_noise(clean, noise, timesteps, alpha_bar)
    target = training_target(prediction_type, clean, noise, timesteps, alpha_bar)
    back = predicted_clean(prediction_type, target, noisy, timesteps, alpha_bar)
    # The factors are 32-bit numbers; the cosine schedule divides by one of 5e-5 at the end.
    torch.testing.assert_close(back[:5], clean[:5], rtol=0, atol=2e-3)
    if name == "linear":
        torch.testing.assert_close(back, clean, rtol=0, atol=1e-4)


def test_targets_are_what_their_names_say():
    clean, noise, timesteps = batch((6, 3, 8, 8))
    alpha_bar = alphas_cumprod_for(betas_for())
    assert torch.equal(training_target("epsilon", clean, noise, timesteps, alpha_bar), noise)
    assert torch.equal(training_target("sample", clean, noise, timesteps, alpha_bar), clean)


@pytest.mark.parametrize("name", BETA_SCHEDULES)
def test_signal_to_noise_is_that_of_diffusers(name):
    scheduler = DDPMScheduler(beta_schedule=name)
    ours = signal_to_noise(scheduler.alphas_cumprod, EVERY)
    torch.testing.assert_close(ours, compute_snr(scheduler, EVERY), rtol=1e-4, atol=0)


@pytest.mark.parametrize("gamma", [1.0, 5.0, 20.0])
def test_min_snr_weights_by_the_formula(gamma):
    alpha_bar = alphas_cumprod_for(betas_for())
    snr = (alpha_bar.double() / (1 - alpha_bar.double())).tolist()
    expected = {
        "epsilon": [min(s, gamma) / s for s in snr],
        "v_prediction": [min(s, gamma) / (s + 1) for s in snr],
        "sample": [min(s, gamma) for s in snr],
    }
    for prediction_type, values in expected.items():
        ours = min_snr_weights(EVERY, alpha_bar, gamma, prediction_type)
        torch.testing.assert_close(ours.double(), torch.tensor(values, dtype=torch.float64), rtol=1e-4, atol=1e-9)


def test_weights_at_pure_noise_are_numbers():
    alpha_bar = DDPMScheduler(rescale_betas_zero_snr=True).alphas_cumprod
    last = torch.tensor([999])
    assert alpha_bar[-1] == 0
    assert min_snr_weights(last, alpha_bar, 5.0, "epsilon").item() == 1
    assert min_snr_weights(last, alpha_bar, 5.0, "v_prediction").item() == 0
    assert min_snr_weights(last, alpha_bar, 5.0, "sample").item() == 0


@pytest.mark.parametrize("snr_gamma", [None, 5.0])
def test_one_guess_costs_the_same_in_every_language(snr_gamma):
    clean, noise, timesteps = batch((6, 3, 8, 8))
    alpha_bar = alphas_cumprod_for(betas_for()).double()
    clean, noise = clean.double(), noise.double()
    noisy = add_noise(clean, noise, timesteps, alpha_bar)
    guess = clean + 0.05 * noise
    a, b = (scale.reshape(-1, 1, 1, 1) for scale in (alpha_bar[timesteps].sqrt(), (1 - alpha_bar[timesteps]).sqrt()))
    answers = {"sample": guess, "epsilon": (noisy - a * guess) / b, "v_prediction": (a * noisy - guess) / b}
    losses = {}
    for kind in ("sample", "epsilon", "v_prediction") if snr_gamma else ("sample", "epsilon"):
        target = training_target(kind, clean, noise, timesteps, alpha_bar)
        weights = loss_weights(timesteps, alpha_bar, kind, snr_gamma)
        losses[kind] = denoising_loss(answers[kind], target, weights).item()
    assert max(losses.values()) == pytest.approx(min(losses.values()), rel=5e-3)


def test_what_is_weighted_without_gamma():
    alpha_bar = alphas_cumprod_for(betas_for())
    assert loss_weights(EVERY, alpha_bar, "epsilon") is None
    assert loss_weights(EVERY, alpha_bar, "v_prediction") is None
    assert torch.equal(loss_weights(EVERY, alpha_bar, "sample"), signal_to_noise(alpha_bar, EVERY))


def test_loss_is_the_plain_mean_without_weights():
    prediction, target = torch.randn(2, 5, 3, 4, 4, generator=generator())
    expected = torch.nn.functional.mse_loss(prediction, target)
    torch.testing.assert_close(denoising_loss(prediction, target), expected)
    torch.testing.assert_close(denoising_loss(prediction, target, torch.ones(5)), expected)


def test_weights_belong_to_samples_and_halves_can_be_told_apart():
    """A batch doubled by class pictures: the loss of each half uses that half's weights."""
    clean = torch.rand(8, 4, 6, 6, generator=generator())
    noised = noise_batch(clean, make_noise_scheduler(), generator(), snr_gamma=5.0)
    prediction = torch.zeros_like(noised.target)
    by_hand = [w * (t**2).mean() for w, t in zip(noised.weights, noised.target, strict=True)]
    halves = [
        denoising_loss(*part)
        for part in zip(prediction.chunk(2), noised.target.chunk(2), noised.weights.chunk(2), strict=True)
    ]
    assert halves[0].item() == pytest.approx(sum(by_hand[:4]).item() / 4, rel=1e-5)
    assert halves[1].item() == pytest.approx(sum(by_hand[4:]).item() / 4, rel=1e-5)


def test_loss_of_half_precision_is_computed_in_32_bits():
    prediction = torch.full((2, 3, 64, 64), 300.0, dtype=torch.float16)
    loss = denoising_loss(prediction, torch.zeros_like(prediction))
    assert loss.dtype == torch.float32
    assert loss.item() == 90_000  # more than float16 can hold


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("shape", [(6, 3, 8, 8), (6, 4, 5, 7)])
def test_noise_batch_is_consistent(shape, prediction_type):
    clean = batch(shape)[0]
    scheduler = make_noise_scheduler(prediction_type=prediction_type, beta_schedule="scaled_linear")
    noised = noise_batch(clean, scheduler, generator(3), snr_gamma=5.0)
    back = predicted_clean(
        prediction_type, noised.target, noised.noisy_images, noised.timesteps, scheduler.alphas_cumprod
    )
    torch.testing.assert_close(back, clean, rtol=0, atol=1e-4)
    expected = min_snr_weights(noised.timesteps, scheduler.alphas_cumprod, 5.0, prediction_type)
    assert torch.equal(noised.weights, expected)
    assert noised.timesteps.dtype == torch.int64


def test_only_the_given_generator_is_used():
    clean, scheduler = batch((6, 3, 8, 8))[0], make_noise_scheduler()
    state = torch.get_rng_state()
    first, second = (noise_batch(clean, scheduler, generator(5)) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.noisy_images, second.noisy_images)
    assert not torch.equal(first.noisy_images, noise_batch(clean, scheduler, generator(6)).noisy_images)


def test_offset_noise_shifts_whole_channels():
    like = torch.zeros(2000, 3, 8, 8)
    means = {offset: sample_noise(like, generator(), offset).mean(dim=(2, 3)) for offset in (0.0, 0.5)}
    assert means[0.0].std().item() == pytest.approx(1 / 8, rel=0.1)
    assert means[0.5].std().item() == pytest.approx(math.sqrt(0.25 + 1 / 64), rel=0.1)
    assert abs(torch.corrcoef(means[0.5].T)[0, 1]) < 0.1  # each channel has its own


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"beta_schedule": "quadratic"}, "--ddpm_beta_schedule quadratic"),
        ({"prediction_type": "velocity"}, "--prediction_type velocity"),
        ({"num_train_timesteps": 0}, "--ddpm_num_steps 0"),
    ],
)
def test_bad_settings_are_named(settings, named):
    with pytest.raises(InputError, match=named) as caught:
        make_noise_scheduler(**settings)
    assert "\n" not in str(caught.value)


def test_bad_prediction_types_are_named_everywhere():
    clean, noise, timesteps = batch((6, 3, 8, 8))
    alpha_bar = alphas_cumprod_for(betas_for())
    for call in (
        lambda: training_target("noise", clean, noise, timesteps, alpha_bar),
        lambda: predicted_clean("noise", noise, clean, timesteps, alpha_bar),
        lambda: min_snr_weights(timesteps, alpha_bar, 5.0, "noise"),
    ):
        with pytest.raises(InputError, match="--prediction_type noise"):
            call()

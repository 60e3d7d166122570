"""The forward process, against diffusers and against its own small steps."""
import math

import pytest
import torch
from diffusers import DDPMScheduler
from noised import SHAPES, batch, generator

from diffusion_lessons.diffusion.noise import (
    add_noise,
    alphas_cumprod_for,
    betas_that_follow,
    cosine_betas,
    linear_betas,
    sample_timesteps,
    scales_at,
)
from diffusion_lessons.diffusion.targets import BETA_SCHEDULES


@pytest.mark.parametrize("num_steps", [1000, 100, 7])
@pytest.mark.parametrize(("ours", "name"), [(linear_betas, "linear"), (cosine_betas, "squaredcos_cap_v2")])
def test_the_two_schedules_are_those_of_diffusers(ours, name, num_steps):
    scheduler = DDPMScheduler(num_steps, beta_schedule=name)
    assert torch.equal(ours(num_steps), scheduler.betas)
    assert torch.equal(alphas_cumprod_for(ours(num_steps)), scheduler.alphas_cumprod)


def test_betas_follow_the_curve_that_is_given():
    left = alphas_cumprod_for(betas_that_follow(lambda u: 1 - 0.9 * u, 100))
    torch.testing.assert_close(left, 1 - 0.9 * torch.arange(1, 101) / 100, rtol=1e-5, atol=1e-6)
    assert betas_that_follow(lambda u: 1 - u, 100).max() < 1, "a curve that ends at nothing does not divide by it"


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", BETA_SCHEDULES)
def test_noise_is_that_of_diffusers(name, shape):
    clean, noise, timesteps = batch(shape)
    scheduler = DDPMScheduler(beta_schedule=name)
    ours = add_noise(clean, noise, timesteps, scheduler.alphas_cumprod)
    assert torch.equal(ours, scheduler.add_noise(clean, noise, timesteps))


def test_the_scales_are_those_of_each_sample():
    alpha_bar, timesteps = alphas_cumprod_for(linear_betas()), torch.tensor([0, 500, 999])
    signal, amount = scales_at(alpha_bar, timesteps, torch.zeros(3, 2, 4, 4))
    assert signal.shape == amount.shape == (3, 1, 1, 1)
    assert torch.equal(signal.flatten(), alpha_bar[timesteps].sqrt())
    torch.testing.assert_close(signal**2 + amount**2, torch.ones(3, 1, 1, 1))


def test_the_jump_is_the_walk():
    """A thousand small steps with known noise end where one jump with the summed noise ends."""
    betas = linear_betas().double()
    x = clean = torch.tensor([0.7], dtype=torch.float64)
    summed = torch.zeros(1, dtype=torch.float64)
    for beta, epsilon in zip(betas, torch.randn(1000, generator=generator(), dtype=torch.float64), strict=True):
        x = (1 - beta).sqrt() * x + beta.sqrt() * epsilon
        summed = (1 - beta).sqrt() * summed + beta.sqrt() * epsilon
    alpha_bar = torch.cumprod(1 - betas, 0)
    unit_noise = summed / (1 - alpha_bar[-1]).sqrt()
    torch.testing.assert_close(x, add_noise(clean, unit_noise, torch.tensor([999]), alpha_bar), rtol=1e-6, atol=1e-6)


def test_half_precision_rounds_last():
    clean, noise, _ = batch((6, 3, 8, 8))
    timesteps, alpha_bar = torch.arange(6), alphas_cumprod_for(linear_betas())
    exact = add_noise(clean, noise, timesteps, alpha_bar)
    half = add_noise(clean.bfloat16(), noise.bfloat16(), timesteps, alpha_bar)
    assert half.dtype == torch.bfloat16
    assert (half.float() - exact).abs().max() < 0.02


def test_timesteps_are_uniform_over_all():
    drawn = sample_timesteps(20_000, 10, generator(), "cpu")
    counts = torch.bincount(drawn, minlength=10)
    assert len(counts) == 10
    assert (counts - 2000).abs().max() < 5 * math.sqrt(2000)

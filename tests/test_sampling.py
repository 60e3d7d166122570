"""Samplers against diffusers, against the exact answer, and the promises of sample_images."""
import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, DPMSolverMultistepScheduler

from diffusion_lessons.diffusion.noise import add_noise
from diffusion_lessons.diffusion.samplers import SAMPLERS, make_sampler
from diffusion_lessons.diffusion.sampling import (
    ExactDenoiser,
    ddim_step,
    ddpm_step,
    denoise,
    dpm_solver_step,
    evaluating,
    sample_images,
    starting_noise,
    to_uint8,
    trailing_timesteps,
)
from diffusion_lessons.diffusion.targets import (
    BETA_SCHEDULES,
    PREDICTION_TYPES,
    make_noise_scheduler,
    noise_batch,
    predicted_clean,
)
from diffusion_lessons.diffusion.unet import make_unet
from diffusion_lessons.engine.config import InputError


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def world() -> torch.Tensor:
    """Twenty pictures of 8 pixels, in [-1, 1]."""
    return torch.rand(20, 3, 8, 8, generator=generator(1)) * 2 - 1


@pytest.fixture(scope="module")
def unet():
    return make_unet("tiny-16", seed=0)


@pytest.mark.parametrize("num_steps", [1, 2, 7, 25, 30, 50, 64, 100, 999, 1000])
@pytest.mark.parametrize("name", SAMPLERS)
def test_timesteps_trail_from_the_last(name, num_steps):
    sampler = make_sampler(make_noise_scheduler(), name)
    sampler.set_timesteps(num_steps)
    assert torch.equal(sampler.timesteps, trailing_timesteps(num_steps))
    assert sampler.timesteps[0] == 999


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_take_over_the_settings(name, beta_schedule, prediction_type):
    training = make_noise_scheduler(500, beta_schedule, prediction_type, beta_start=0.0002, beta_end=0.03)
    sampler = make_sampler(training, name)
    assert torch.equal(sampler.alphas_cumprod, training.alphas_cumprod)
    assert sampler.config.prediction_type == prediction_type
    assert sampler.config.timestep_spacing == "trailing"
    assert sampler.config.num_train_timesteps == 500


@pytest.mark.parametrize("name", SAMPLERS)
def test_pure_noise_at_the_end_is_taken_over(name):
    training = DDPMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    sampler = make_sampler(training, name)
    assert sampler.config.rescale_betas_zero_snr
    torch.testing.assert_close(sampler.alphas_cumprod[:-1], training.alphas_cumprod[:-1])


def test_solver_ends_at_no_noise_and_clips():
    sampler = make_sampler(make_noise_scheduler())
    sampler.set_timesteps(25)
    assert isinstance(sampler, DPMSolverMultistepScheduler)
    assert sampler.sigmas[-1] == 0
    wild = torch.randn(4, 3, 8, 8, generator=generator()) * 3
    torch.testing.assert_close(sampler._threshold_sample(wild), wild.clamp(-1, 1))
    assert sampler.config.thresholding


@pytest.mark.parametrize("name", SAMPLERS)
def test_latents_are_not_clipped(name):
    training = DDPMScheduler.from_config(make_noise_scheduler().config, clip_sample=False)
    config = make_sampler(training, name).config
    assert not config.get("clip_sample", False) and not config.thresholding


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_solver_skips_the_timesteps_without_signal(prediction_type):
    sampler = make_sampler(make_noise_scheduler(1000, "squaredcos_cap_v2", prediction_type))
    sampler.set_timesteps(25)
    assert len(sampler.timesteps) == 25
    assert sampler.alphas_cumprod[sampler.timesteps[0]].sqrt() > 0.005


@pytest.mark.parametrize("t", [999, 700, 40, 1])
def test_ddpm_step_is_that_of_diffusers(t, world):
    scheduler = DDPMScheduler(clip_sample=False)
    noisy = torch.randn(4, 3, 8, 8, generator=generator(2))
    epsilon = torch.randn(4, 3, 8, 8, generator=generator(3))
    expected = scheduler.step(epsilon, t, noisy, generator=generator(4)).prev_sample
    clean = predicted_clean("epsilon", epsilon, noisy, torch.full((4,), t), scheduler.alphas_cumprod)
    noise = torch.randn(4, 3, 8, 8, generator=generator(4))
    ours = ddpm_step(clean, noisy, noise, scheduler.alphas_cumprod[t], scheduler.alphas_cumprod[t - 1])
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_last_ddpm_step_is_the_prediction():
    clean, noisy, noise = torch.randn(3, 2, 3, 8, 8, generator=generator())
    torch.testing.assert_close(ddpm_step(clean, noisy, noise, torch.tensor(0.9999), torch.tensor(1.0)), clean)


@pytest.mark.parametrize("num_steps", [25, 50])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_ddim_run_is_that_of_diffusers(prediction_type, num_steps, world):
    training = make_noise_scheduler(prediction_type=prediction_type)
    network = ExactDenoiser(world, training.alphas_cumprod, prediction_type, width=0.3)
    scheduler = DDIMScheduler(timestep_spacing="trailing", clip_sample=False, prediction_type=prediction_type)
    scheduler.set_timesteps(num_steps)
    start = torch.randn(5, 3, 8, 8, generator=generator(9))
    x = y = start
    alpha_bars = torch.cat([training.alphas_cumprod[scheduler.timesteps], torch.ones(1)])
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(network(x, t).sample, t, x).prev_sample
        y = ddim_step(network.best_guess(y, t.expand(5)), y, alpha_bars[i], alpha_bars[i + 1])
    torch.testing.assert_close(y, x, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("num_steps", [5, 25, 100])
@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear"])
def test_solver_run_is_that_of_diffusers(beta_schedule, num_steps, world):
    training = make_noise_scheduler(beta_schedule=beta_schedule)
    network = ExactDenoiser(world, training.alphas_cumprod, width=0.3)
    scheduler = DPMSolverMultistepScheduler(
        beta_schedule=beta_schedule, timestep_spacing="trailing", lower_order_final=False
    )
    scheduler.set_timesteps(num_steps)
    start = torch.randn(5, 3, 8, 8, generator=generator(9))
    x, y, last = start, start, None
    alpha_bars = torch.cat([training.alphas_cumprod[scheduler.timesteps], torch.ones(1)])
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(network(x, t).sample, t, x).prev_sample
        clean = network.best_guess(y, t.expand(5))
        usable = last if i < num_steps - 1 else None
        y = dpm_solver_step(clean, usable, y, alpha_bars[i - 1], alpha_bars[i], alpha_bars[i + 1])
        last = clean
    torch.testing.assert_close(y, x, rtol=1e-3, atol=1e-3)


def test_solver_is_of_second_order(world):
    training = make_noise_scheduler()
    network = ExactDenoiser(world, training.alphas_cumprod, width=0.5)
    start = torch.randn(8, 3, 8, 8, generator=generator(9))

    def run(name: str, num_steps: int) -> torch.Tensor:
        unclipped = DDPMScheduler.from_config(training.config, clip_sample=False)
        sampler = make_sampler(unclipped, name)
        sampler.set_timesteps(num_steps)
        return denoise(network, sampler, start, [generator()] * 8)[0]

    reference = run("dpmsolver++", 1000)
    errors = {
        name: [(run(name, count) - reference).abs().mean(dim=(1, 2, 3)).median().item() for count in (100, 250)]
        for name in ("ddim", "dpmsolver++")
    }
    ddim, solver = (each[0] / each[1] for each in errors.values())
    assert 2 < ddim < 3.2  # 2.5 times the steps: 2.5 times better
    assert solver > 4  # and 2.5 squared, nearly
    assert errors["dpmsolver++"][0] < errors["ddim"][0] / 5


@pytest.mark.parametrize("width", [0.0, 0.4])
def test_exact_denoiser_is_bayes_rule(width, world):
    scheduler = make_noise_scheduler()
    timesteps = torch.tensor([999, 800, 600, 300, 20])
    noisy = add_noise(world[:5], torch.randn(5, 3, 8, 8, generator=generator()), timesteps, scheduler.alphas_cumprod)
    guess = ExactDenoiser(world, scheduler.alphas_cumprod, width=width).best_guess(noisy, timesteps)
    for seen, t, ours in zip(noisy.double(), timesteps, guess, strict=True):
        alpha_bar = scheduler.alphas_cumprod[t].double()
        variance = 1 - alpha_bar + alpha_bar * width**2
        away = seen - alpha_bar.sqrt() * world.double()
        weights = torch.softmax(-away.square().sum(dim=(1, 2, 3)) / (2 * variance), dim=0)
        # Within one cloud, the mean given what was seen (a normal prior and normal noise).
        inside = world.double() + alpha_bar.sqrt() * width**2 / variance * away
        expected = (weights[:, None, None, None] * inside).sum(dim=0)
        torch.testing.assert_close(ours.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", SAMPLERS)
def test_exact_denoiser_draws_its_pictures(name, world):
    scheduler = make_noise_scheduler()
    network = ExactDenoiser(world, scheduler.alphas_cumprod)
    steps = {"ddpm": 200, "ddim": 50, "dpmsolver++": 25}[name]
    images = sample_images(network, scheduler, 12, sampler=name, num_inference_steps=steps)
    distances = torch.cdist(images.flatten(1).float(), to_uint8(world).flatten(1).float(), p=float("inf"))
    nearest = distances.min(dim=1)
    assert nearest.values.max() <= 2
    assert len(set(nearest.indices.tolist())) > 3  # and not always the same one
    assert network.num_evaluations == steps


@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
@pytest.mark.parametrize("name", SAMPLERS)
def test_all_prediction_types_draw_the_same(name, beta_schedule, world):
    drawn = []
    for prediction_type in PREDICTION_TYPES:
        training = make_noise_scheduler(1000, beta_schedule, prediction_type)
        network = ExactDenoiser(world, training.alphas_cumprod, prediction_type)
        drawn.append(sample_images(network, training, 4, sampler=name, num_inference_steps=50).int())
    # Where almost no signal is left, dividing by it costs epsilon some digits and now and then a picture.
    same = [(drawn[1] - other).abs().amax(dim=(1, 2, 3)) <= 2 for other in (drawn[0], drawn[2])]
    assert same[1].all() and same[0].sum() >= 3


@pytest.mark.parametrize(
    ("name", "pipeline_class", "options"),
    [("ddpm", DDPMPipeline, {}), ("ddim", DDIMPipeline, {"use_clipped_model_output": True})],
)
def test_pictures_are_those_of_the_pipelines(name, pipeline_class, options, unet):
    training = make_noise_scheduler()
    pipeline = pipeline_class(unet, make_sampler(training, name))
    pipeline.set_progress_bar_config(disable=True)
    seeds = [generator(3 + i) for i in range(3)]
    expected = pipeline(batch_size=3, generator=seeds, num_inference_steps=20, output_type="np", **options).images
    ours = sample_images(unet, training, 3, sampler=name, num_inference_steps=20, seed=3)
    assert np.array_equal((expected * 255).round().astype("uint8"), ours.permute(0, 2, 3, 1).numpy())


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_picture_depends_on_its_seed_alone(name, unet):
    def draw(count: int, **options) -> torch.Tensor:
        return sample_images(unet, make_noise_scheduler(), count, sampler=name, num_inference_steps=6, **options).int()

    all_at_once = draw(6, seed=10)
    assert all_at_once.shape == (6, 3, 16, 16)
    for other in (draw(6, seed=10, batch_size=1), draw(6, seed=10, batch_size=4)):
        assert (all_at_once - other).abs().max() <= 1  # sums in another order
    assert (draw(3, seed=12) - all_at_once[2:5]).abs().max() <= 1
    assert (draw(2, generators=[generator(15), generator(10)]) - all_at_once[[5, 0]]).abs().max() <= 1
    assert (all_at_once[0] - all_at_once[1]).abs().max() > 5


def test_the_global_generator_is_left_alone(unet):
    state = torch.get_rng_state()
    sample_images(unet, make_noise_scheduler(), 2, sampler="ddpm", num_inference_steps=3)
    assert torch.equal(torch.get_rng_state(), state)


def test_frames_lead_from_noise_to_the_picture(unet):
    images, frames = sample_images(unet, make_noise_scheduler(), 5, seed=4, batch_size=2, return_frames=6)
    timesteps = [t for t, _ in frames]
    assert timesteps[0] == 999 and timesteps[-1] == 0 and len(frames) == 6
    assert timesteps == sorted(timesteps, reverse=True)
    noise, _ = starting_noise(unet, [generator(4 + i) for i in range(5)])
    assert torch.equal(frames[0][1], to_uint8(noise))
    assert torch.equal(frames[-1][1], images)
    assert torch.equal(images, sample_images(unet, make_noise_scheduler(), 5, seed=4, batch_size=2))


def test_more_frames_than_steps(unet):
    _, frames = sample_images(unet, make_noise_scheduler(), 1, num_inference_steps=3, return_frames=10)
    assert [t for t, _ in frames] == [999, 666, 332, 0]


def test_modes_are_restored_part_by_part(unet):
    unet.train()
    unet.mid_block.eval()
    seen = []
    hook = unet.mid_block.register_forward_hook(lambda *_: seen.append((unet.training, torch.is_grad_enabled())))
    sample_images(unet, make_noise_scheduler(), 1, num_inference_steps=2)
    hook.remove()
    assert seen == [(False, False)] * 2
    assert unet.training and unet.conv_in.training and not unet.mid_block.training
    with pytest.raises(ZeroDivisionError), evaluating(unet):
        assert not unet.training
        raise ZeroDivisionError
    assert unet.training
    unet.eval()
    sample_images(unet, make_noise_scheduler(), 1, num_inference_steps=1)
    assert not unet.training


def test_half_precision_and_memory_layout(unet):
    reference = sample_images(unet, make_noise_scheduler(), 2).float()
    half = make_unet("tiny-16", seed=0).to(torch.bfloat16, memory_format=torch.channels_last)
    images = sample_images(half, make_noise_scheduler(), 2)
    assert images.dtype == torch.uint8 and half.dtype == torch.bfloat16
    assert (images.float() - reference).abs().mean() < 10
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = sample_images(unet, make_noise_scheduler(), 2)
    assert (mixed.float() - reference).abs().mean() < 10


def test_wrapped_and_not_square():
    class Wrapper(torch.nn.Module):
        def __init__(self, module: torch.nn.Module):
            super().__init__()
            self.module = module

        def forward(self, *args, **options):
            return self.module(*args, **options)

    wide = make_unet("tiny-16", seed=0)
    wide.register_to_config(sample_size=[8, 12])
    assert sample_images(Wrapper(wide), make_noise_scheduler(), 2, num_inference_steps=2).shape == (2, 3, 8, 12)


@pytest.mark.parametrize("name", ["ddim", "dpmsolver++"])
def test_no_step_reads_from_the_device(name):
    """The meta device has no values: whatever needs one on the host fails there."""
    unet, sampler = make_unet("tiny-16", seed=0).to("meta"), make_sampler(make_noise_scheduler(), name)
    sampler.set_timesteps(5)
    images, frames = denoise(unet, sampler, torch.empty(2, 3, 16, 16, device="meta"), [], keep=[0, 3])
    assert images.device.type == "meta" and len(frames) == 2


def test_no_training_batch_reads_from_the_device():
    scheduler = make_noise_scheduler()
    noised = noise_batch(torch.empty(4, 3, 8, 8, device="meta"), scheduler, generator(), snr_gamma=5.0)
    assert {part.device.type for part in noised} == {"meta"}
    assert scheduler.alphas_cumprod.device.type == "meta", "copied once and not in every step"


def test_noise_on_the_way_is_drawn_on_the_device_from_the_same_seeds(unet, monkeypatch):
    class Noted:
        def __init__(self, device: torch.device) -> None:
            self.at = device.type

        def manual_seed(self, seed: int) -> "Noted":
            self.seed = seed
            return self

    given = [generator(4), generator(9)]
    monkeypatch.setattr(torch, "Generator", Noted)  # PyTorch has none for the device `meta`
    noise, on_the_way = starting_noise(unet, given, "meta")
    assert noise.device.type == "meta" and [(each.at, each.seed) for each in on_the_way] == [("meta", 4), ("meta", 9)]
    assert starting_noise(unet, given, "cpu")[1] == given


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"sampler": "euler"}, "--sampler euler"),
        ({"num_inference_steps": 0}, "--num_inference_steps 0"),
        ({"num_inference_steps": 1001}, "--num_inference_steps 1001"),
        ({"num_images": 0}, "--num_images 0"),
    ],
)
def test_bad_numbers_are_named(options, named):
    arguments = {"num_images": 1} | options
    with pytest.raises(InputError, match=named) as caught:
        sample_images(make_unet("tiny-16", seed=0), make_noise_scheduler(), **arguments)
    assert "\n" not in str(caught.value)

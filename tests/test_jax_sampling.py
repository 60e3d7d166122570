"""DDIM and DPM-Solver++ in JAX: every step is that of diffusers' classes, the pictures those of the PyTorch side."""
# ruff: noqa: E402

import inspect
import json

import numpy as np
import pytest

jax = pytest.importorskip("jax", reason="JAX is not installed: pip install 'diffusion_lessons[jax]'")
import jax.numpy as jnp
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from diffusion_lessons import miniature
from diffusion_lessons.engine.config import InputError
from diffusion_lessons.jax.sampling import (
    check_served,
    compiled_sampler,
    denoise_latents,
    guided,
    read_sampler,
    seeded_noise,
    step_table,
)
from diffusion_lessons.stable_diffusion.drawing import scheduler_trained_with

torch.set_num_threads(1)
CLASSES = {"ddim": DDIMScheduler, "dpmsolver++": DPMSolverMultistepScheduler}
STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
COSINE = {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1}
MEAN = torch.linspace(-1, 1, 4 * 6 * 6).reshape(1, 4, 6, 6)  # of a world that is one normal cloud
WIDTH = 0.5


def their_scheduler(sampler: str, settings: dict):
    """diffusers' class with the settings that it knows."""
    known = {name: value for name, value in settings.items() if sampler != "ddim" or name != "lambda_min_clipped"}
    return CLASSES[sampler](**known, **({"clip_sample": False} if sampler == "ddim" else {}))


def exact(x, alpha_bar, kind: str, mean):
    """What the best network says about noisy draws from a normal cloud, for arrays of either library."""
    signal, variance = alpha_bar**0.5, 1 - alpha_bar + alpha_bar * WIDTH**2
    clean = mean + signal * WIDTH**2 / variance * (x - signal * mean)
    noise = (x - signal * clean) / (1 - alpha_bar) ** 0.5
    return {"epsilon": noise, "v_prediction": signal * noise - (1 - alpha_bar) ** 0.5 * clean, "sample": clean}[kind]


def off(ours, theirs) -> float:
    """The largest difference, relative to the largest number."""
    return float(np.abs(np.asarray(ours) - np.asarray(theirs)).max() / np.abs(np.asarray(theirs)).max())


def their_walk(sampler: str, settings: dict, steps: int, x: Tensor):
    """Before, prediction, after and timestep of each step of diffusers' class."""
    scheduler = their_scheduler(sampler, settings)
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        prediction = exact(x, scheduler.alphas_cumprod[t], settings["prediction_type"], MEAN)
        after = scheduler.step(prediction, t, x).prev_sample
        yield x, prediction, after, int(t)
        x = after


@pytest.mark.parametrize("sampler", CLASSES)
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("betas", [STABLE_DIFFUSION, {}, COSINE], ids=["scaled_linear", "linear", "cosine"])
def test_every_step_is_that_of_diffusers(sampler, spacing, kind, betas):
    """From the same latents and the same prediction, in 1 to 50 steps; what the table says, without any loop."""
    settings = {**betas, "timestep_spacing": spacing, "prediction_type": kind, "steps_offset": 1}
    scheduler = their_scheduler(sampler, settings)
    noise = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    for steps in (1, 2, 5, 20, 50):
        table, last = step_table(scheduler, steps), 0.0
        walk = list(their_walk(sampler, settings, steps, noise))
        assert table.timestep.tolist() == [t for *_, t in walk] and len(walk) == steps
        for row, (x, prediction, after, t) in zip(zip(*table, strict=True), walk, strict=True):
            guess = row[1] * x.numpy() + row[2] * prediction.numpy()
            ours, last = row[3] * x.numpy() + row[4] * guess + row[5] * last, guess
            # Where next to no signal is left, a guess from a predicted noise is a difference of two large numbers.
            rounding = 3e-6 / float(scheduler.alphas_cumprod[t]) ** 0.5 if kind == "epsilon" else 0
            limit = 1e-4 if betas is STABLE_DIFFUSION else max(1e-4, rounding)
            assert off(ours, after) <= limit, (steps, t)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [1, 2, 5, 20, 50])
def test_the_loop_ends_where_diffusers_ends(steps, kind):
    """With a network of its own on each side; one program for both solvers and all spacings."""
    settings = {**STABLE_DIFFUSION, "prediction_type": kind, "steps_offset": 1}
    bars = jnp.asarray(their_scheduler("ddim", settings).alphas_cumprod.numpy())
    mean = jnp.asarray(MEAN.permute(0, 2, 3, 1).numpy())
    walk = jax.jit(lambda table, x: denoise_latents(lambda y, t: exact(y, bars[t], kind, mean), table, x))
    noise = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(1))
    for sampler in CLASSES:
        for spacing in ("leading", "linspace", "trailing"):
            spaced = settings | {"timestep_spacing": spacing}
            *_, (_, _, theirs, _) = their_walk(sampler, spaced, steps, noise)
            table = step_table(their_scheduler(sampler, spaced), steps)
            clean, guesses = walk(table, noise.permute(0, 2, 3, 1).numpy())
            assert clean.shape == (2, 6, 6, 4) and guesses.shape == (steps, 2, 6, 6, 4)
            assert off(clean, theirs.permute(0, 2, 3, 1)) <= 1e-4, (sampler, spacing)
    assert walk._cache_size() == 1, "compiled once"


@pytest.mark.parametrize(
    "settings",
    [
        {"set_alpha_to_one": False}, {"final_sigmas_type": "sigma_min"}, {"solver_order": 1},
        {"num_train_timesteps": 400},
        {"final_sigmas_type": "sigma_min", "lower_order_final": False},
        {"final_sigmas_type": "sigma_min", "lower_order_final": False, "euler_at_final": True},
        {"trained_betas": np.linspace(1e-3, 1e-2, 1000).tolist()}, {"steps_offset": 3, "timestep_spacing": "leading"},
    ],
    ids=str,
)  # fmt: skip
def test_the_habits_of_a_folder_are_followed(settings):
    """A walk of 8 steps from the same noise; each setting is known to one of the two classes at least."""
    noise, moved = torch.randn(1, 4, 6, 6, generator=torch.Generator().manual_seed(2)), 0
    for sampler, kind in CLASSES.items():
        accepted = inspect.signature(kind.__init__).parameters
        known = {name: value for name, value in settings.items() if name in accepted}
        full = {**STABLE_DIFFUSION, "prediction_type": "v_prediction", **known}
        table = step_table(their_scheduler(sampler, full), 8)
        plain = step_table(their_scheduler(sampler, STABLE_DIFFUSION | {"prediction_type": "v_prediction"}), 8)
        moved += any(not np.array_equal(one, other) for one, other in zip(table, plain, strict=True))
        x, last = noise.numpy(), 0.0
        walk = list(their_walk(sampler, full, 8, noise))
        for row, (_, prediction, after, _) in zip(zip(*table, strict=True), walk, strict=True):
            guess = row[1] * x + row[2] * prediction.numpy()
            x, last = row[3] * x + row[4] * guess + row[5] * last, guess
            assert off(x, after) <= 1e-4, sampler
    assert moved, "the setting makes a difference"


@pytest.mark.parametrize(
    "setting, word",
    [
        ({"use_karras_sigmas": True}, "use_karras_sigmas True"),
        ({"thresholding": True}, "thresholding True"),
        ({"clip_sample": True}, "clip_sample True"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr True"),
        ({"algorithm_type": "sde-dpmsolver++"}, "algorithm_type 'sde-dpmsolver++'"),
        ({"solver_type": "heun"}, "solver_type 'heun'"),
        ({"solver_order": 3}, "solver_order 3"),
        ({"prediction_type": "flow_prediction"}, "prediction_type 'flow_prediction'"),
    ],
)
def test_what_is_not_served_is_refused_by_name(setting, word):
    with pytest.raises(InputError) as error:
        check_served(STABLE_DIFFUSION | setting)
    assert word in str(error.value) and "\n" not in str(error.value)


def test_a_scheduler_with_such_a_setting_makes_no_table():
    with pytest.raises(InputError, match="use_karras_sigmas True"):
        step_table(DPMSolverMultistepScheduler(**STABLE_DIFFUSION, use_karras_sigmas=True), 5)


def test_a_flow_model_has_no_such_noise():
    with pytest.raises(InputError, match="FlowMatchEulerDiscreteScheduler belongs to a flow model"):
        scheduler_trained_with(STABLE_DIFFUSION | {"_class_name": "FlowMatchEulerDiscreteScheduler"})


def test_steps_that_there_are_not_are_refused():
    for sampler, spacing, steps in (
            ("ddim", "trailing", 0), ("ddim", "trailing", 1001), ("dpmsolver++", "leading", 1000)):
        scheduler = their_scheduler(sampler, STABLE_DIFFUSION | {"timestep_spacing": spacing})
        with pytest.raises(InputError, match=f"--num_inference_steps {steps}"):
            step_table(scheduler, steps)


def test_a_table_leaves_its_scheduler_as_it_is():
    scheduler = their_scheduler("dpmsolver++", STABLE_DIFFUSION)
    scheduler.set_timesteps(7)
    step_table(scheduler, 20)
    assert len(scheduler.timesteps) == 7


def test_a_folder_is_drawn_from_as_on_the_pytorch_side(tmp_path):
    solver, ddim = (read_sampler(miniature.path(), sampler) for sampler in ("dpmsolver++", "ddim"))
    assert isinstance(solver, DPMSolverMultistepScheduler) and isinstance(ddim, DDIMScheduler)
    assert (solver.config.beta_schedule, solver.config.timestep_spacing, solver.config.lambda_min_clipped) == (
        "scaled_linear", "trailing", -5.1)  # fmt: skip
    with pytest.raises(InputError, match="scheduler_config.json"):
        read_sampler(tmp_path)
    with pytest.raises(InputError, match="--sampler euler"):
        read_sampler(miniature.path(), "euler")
    (tmp_path / "scheduler").mkdir()
    pndm = {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "steps_offset": 1}
    for other in (pndm, {"beta_schedule": "sigmoid"}):
        (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(other))
        assert step_table(read_sampler(tmp_path), 5).timestep[0] >= 990, "from where training ended"


def test_guidance_is_the_formula_in_one_pass():
    def network(x, t, context):
        passes.append(x.shape[0])
        return x * context.mean(axis=(1, 2))[:, None, None, None] + t[:, None, None, None]

    passes, x = [], jnp.asarray(seeded_noise([0, 1], 4, 6, 6))
    towards, away = jnp.full((2, 3, 5), 2.0), jnp.full((2, 3, 5), -1.0)
    np.testing.assert_allclose(guided(network, towards)(x, 7), 2 * x + 7, rtol=1e-6)
    np.testing.assert_allclose(guided(network, towards, away, 5.0)(x, 7), 14 * x + 7, rtol=1e-5, atol=1e-5)
    assert passes == [2, 4]


def test_noise_is_that_of_the_pytorch_side():
    for index, seed in enumerate((3, 9)):
        drawn = torch.randn((1, 4, 6, 8), generator=torch.Generator().manual_seed(seed))
        assert np.array_equal(seeded_noise([3, 9], 4, 6, 8)[index], drawn[0].permute(1, 2, 0))


def test_the_miniature_draws_the_pictures_of_the_pytorch_side():
    """Its UNet is PyTorch's on both sides; solver, guidance and noise are JAX's on one."""
    from diffusers import StableDiffusionPipeline

    from diffusion_lessons.stable_diffusion.drawing import encode_guidance

    pipeline = StableDiffusionPipeline.from_pretrained(miniature.path())
    pipeline.set_progress_bar_config(disable=True)
    towards, away = encode_guidance(pipeline, ["a photo of a red butterfly on snow", "a photo of a blue fish"])
    channels, side = pipeline.unet.config.in_channels, pipeline.unet.config.sample_size

    @torch.no_grad()
    def ask(x, t, context):
        x, t, context = (torch.from_numpy(np.array(each)) for each in (x, t, context))
        return pipeline.unet(x.permute(0, 3, 1, 2), t, context).sample.permute(0, 2, 3, 1).contiguous().numpy()

    def network(weights, x, t, context):
        return jax.pure_callback(ask, jax.ShapeDtypeStruct(x.shape, jnp.float32), x, t, context)

    sample, noise = compiled_sampler(network), seeded_noise([0, 1], channels, side, side)
    for sampler in CLASSES:
        pipeline.scheduler = read_sampler(miniature.path(), sampler)
        table = step_table(pipeline.scheduler, 4)
        ours = sample(None, table, noise, towards.numpy(), away.numpy(), 5.0)
        generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        theirs = pipeline(prompt_embeds=towards, negative_prompt_embeds=away, num_inference_steps=4,
                          guidance_scale=5.0, generator=generators, output_type="latent").images
        assert off(ours, theirs.permute(0, 2, 3, 1)) <= 1e-4, sampler
    assert sample._cache_size() == 1, "one program for both solvers"

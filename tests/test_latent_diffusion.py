"""Text to picture in latents: schedule, sentences, moments, guidance by hand, the drawing's promises, small runs."""

import functools
import math
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from PIL import Image

from diffusion_lessons.diffusion.noise import alphas_cumprod_for
from diffusion_lessons.diffusion.samplers import make_sampler
from diffusion_lessons.diffusion.sampling import to_uint8
from diffusion_lessons.diffusion.targets import betas_for
from diffusion_lessons.engine.config import InputError
from diffusion_lessons.miniature import latent_diffusion
from diffusion_lessons.miniature.captions import HELD_OUT, all_captions, render_scenes, say_some
from diffusion_lessons.miniature.latent_diffusion import (
    WATCHED_PROMPTS,
    DiffusionConfig,
    latent_set,
    load_frozen_parts,
    load_unet,
    make_latent_scheduler,
    make_pipeline,
    make_text_unet,
    train_diffusion,
)
from diffusion_lessons.pictures.meadow import caption
from diffusion_lessons.stable_diffusion.drawing import draw
from diffusion_lessons.stable_diffusion.folder import shipped
from diffusion_lessons.stable_diffusion.latents import encode_moments, scaled_latents
from diffusion_lessons.stable_diffusion.prompts import encode_prompts

PROMPTS = ["a photo of a red butterfly on snow", "a photo of a blue fish on sand", "a green flower"]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def parts():
    """Autoencoder, text tower and tokenizer that come with the package."""
    return load_frozen_parts(shipped("miniature"))


@pytest.fixture(scope="module")
def pipeline(parts):
    """The shipped parts around an untrained UNet: what is tested here does not depend on how well anybody learned."""
    return make_pipeline(*parts, make_text_unet(seed=0), make_latent_scheduler())


# --- network and noise ---


def test_the_noise_is_that_of_stable_diffusion():
    scheduler = make_latent_scheduler()
    expected = alphas_cumprod_for(betas_for("scaled_linear", 1000, 0.00085, 0.012))
    torch.testing.assert_close(scheduler.alphas_cumprod, expected)
    assert float(scheduler.alphas_cumprod[-1]) == pytest.approx(0.00466, abs=1e-5)
    assert scheduler.config.prediction_type == "epsilon" and not scheduler.config.clip_sample
    assert make_sampler(scheduler).config.get("thresholding") is False, "latents are not clipped to [-1, 1]"


def test_new_weights_come_from_the_seed_and_from_nothing_else():
    before = torch.get_rng_state()
    one, same, other = (make_text_unet(seed).conv_in.weight for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_unet_hears_sentences_at_8_and_4_latents(pipeline):
    seen = []
    hooks = [module.register_forward_hook(lambda layer, inputs, output: seen.append(inputs[0].shape[1]))
             for name, module in pipeline.unet.named_modules() if name.endswith("attn2")]  # fmt: skip
    z, words = torch.randn(1, 4, 16, 16, generator=generator()), torch.randn(2, 32, 128, generator=generator(1))
    with torch.no_grad():
        one, other = pipeline.unet(z.expand(2, -1, -1, -1), 10, words).sample
    for hook in hooks:
        hook.remove()
    assert sorted(seen) == [16] * 4 + [64] * 3
    assert one.shape == (4, 16, 16) and (one - other).abs().max() > 1e-3


# --- latents and sentences ---


def test_latents_are_drawn_from_their_moments_and_scaled():
    mean, log_variance = torch.full((2, 4, 3, 3), 0.5), torch.full((2, 4, 3, 3), math.log(0.25))
    moments = torch.cat([mean, log_variance], dim=1).half()
    noise = torch.randn(2, 4, 3, 3, generator=generator(3))
    drawn = scaled_latents(moments, 2.0, generator(3))
    assert drawn.dtype == torch.float32
    torch.testing.assert_close(drawn, 2.0 * (0.5 + 0.5 * noise), atol=1e-3, rtol=1e-3)


def test_a_latent_set_holds_each_picture_and_its_mirror_image(parts):
    images = render_scenes(5, seed=2)
    moments, attributes = latent_set(parts[0], images).tensors
    pixels = torch.as_tensor(images.pixels)
    assert moments.shape == (10, 8, 16, 16) and moments.dtype == torch.float16
    assert torch.equal(moments[:5], encode_moments(parts[0], pixels))
    assert torch.equal(moments[5:], encode_moments(parts[0], pixels.flip(-1)))
    assert torch.equal(attributes, torch.cat([images.attributes, images.attributes]))
    assert not torch.equal(moments[:5].flip(-1), moments[5:])


def test_latents_of_the_meadow_have_a_spread_of_one(parts):
    moments, _ = latent_set(parts[0], render_scenes(32, seed=5)).tensors
    latents = scaled_latents(moments, parts[0].config.scaling_factor, generator())
    assert float(latents.std()) == pytest.approx(1, abs=0.1)


def test_prompts_are_encoded_as_the_pipeline_does(pipeline, parts):
    _, text_encoder, tokenizer = parts
    text_encoder.train()
    ours = encode_prompts(text_encoder, tokenizer, PROMPTS)
    assert text_encoder.training and not ours.requires_grad
    text_encoder.eval()
    theirs, empty = pipeline.encode_prompt(PROMPTS, "cpu", 1, True)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(encode_prompts(text_encoder, tokenizer, [""]), empty[:1])


def test_rows_find_the_sentence_that_was_said(parts):
    said = say_some(render_scenes(40).attributes, generator(), empty=0.3)
    table = encode_prompts(*parts[1:], all_captions())
    torch.testing.assert_close(table[said.rows], encode_prompts(*parts[1:], said.captions), atol=1e-5, rtol=1e-4)


# --- drawing ---


@torch.no_grad()
def by_hand(pipeline, prompts: list[str], w: float, seed: int, num_steps: int, size: int = 64) -> torch.Tensor:
    """The picture of each prompt, with nothing but the parts and the equations."""
    text, empty = (encode_prompts(pipeline.text_encoder, pipeline.tokenizer, each) for each in (prompts, [""]))
    solver, pictures = make_sampler(make_latent_scheduler()), []
    for index in range(len(prompts)):
        solver.set_timesteps(num_steps)
        z = torch.randn(1, 4, size // 4, size // 4, generator=generator(seed + index))
        for t in solver.timesteps:
            with_words = pipeline.unet(z, t, text[index : index + 1]).sample
            without = pipeline.unet(z, t, empty).sample
            z = solver.step(without + w * (with_words - without), t, z).prev_sample
        pictures.append(to_uint8(pipeline.vae.decode(z / pipeline.vae.config.scaling_factor).sample))
    return torch.cat(pictures)


@pytest.mark.parametrize("w, size", [(1.0, 64), (3.0, 64), (3.0, 32)])
def test_drawing_is_guidance_and_solver_by_hand(pipeline, w, size):
    drawn = draw(pipeline, PROMPTS, seed=4, num_inference_steps=3, guidance_scale=w, size=size)
    expected = by_hand(pipeline, PROMPTS, w, 4, 3, size)
    assert drawn.dtype == torch.uint8 and drawn.shape == (3, 3, size, size)
    assert (drawn.int() - expected.int()).abs().max() <= 1


def test_guidance_changes_pictures(pipeline):
    low, high = (draw(pipeline, PROMPTS, num_inference_steps=2, guidance_scale=w) for w in (1.0, 8.0))
    assert (low.int() - high.int()).abs().max() > 2


def test_a_picture_does_not_depend_on_its_company(pipeline):
    settings = {"num_inference_steps": 2, "guidance_scale": 2.0}
    together = draw(pipeline, PROMPTS, seed=7, **settings)
    in_batches = draw(pipeline, PROMPTS, seed=7, batch_size=2, **settings)
    alone = draw(pipeline, PROMPTS[2:], seed=9, **settings)
    assert (together.int() - in_batches.int()).abs().max() <= 1
    assert (together[2].int() - alone[0].int()).abs().max() <= 1
    assert not torch.equal(together, draw(pipeline, PROMPTS, seed=8, **settings))


def test_drawing_leaves_the_unet_in_its_mode(pipeline):
    pipeline.unet.train()
    draw(pipeline, PROMPTS[:1], num_inference_steps=1)
    assert pipeline.unet.training and all(module.training for module in pipeline.unet.modules())
    pipeline.unet.eval()


@pytest.mark.parametrize(
    "name, value",
    [("guidance_scale", 0.9), ("guidance_scale", -1), ("size", 100), ("size", 0), ("size", -8),
     ("num_inference_steps", 0), ("num_inference_steps", 1001)],
)  # fmt: skip
def test_numbers_that_cannot_be_drawn_with_are_named(pipeline, name, value):
    with pytest.raises(InputError, match=rf"--{name} {value}: must") as caught:
        draw(pipeline, PROMPTS, **{name: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("prompts", ["a red fish", [], ()])
def test_prompts_are_a_list(pipeline, prompts):
    """A bare sentence is a sequence of letters, and would give a picture of each."""
    with pytest.raises(InputError, match="list of sentences"):
        draw(pipeline, prompts)


# --- model folders ---


def test_missing_parts_are_named(tmp_path):
    with pytest.raises(InputError, match="`autoencoder`"):
        load_frozen_parts(tmp_path)
    shutil.copytree(shipped("miniature/vae"), tmp_path / "vae")
    with pytest.raises(InputError, match="`clip`"):
        load_frozen_parts(tmp_path)
    shutil.copytree(shipped("miniature/text_encoder"), tmp_path / "text_encoder")
    with pytest.raises(InputError, match="`clip`"):
        load_frozen_parts(tmp_path)


@pytest.mark.parametrize("fault", ["missing", "half", "broken config"])
def test_an_unreadable_part_is_input_and_not_a_traceback(tmp_path, fault):
    for name in ("vae", "text_encoder", "tokenizer"):
        shutil.copytree(shipped(f"miniature/{name}"), tmp_path / name)
    weights = tmp_path / "text_encoder" / "model.safetensors"
    if fault == "missing":
        weights.unlink()
    elif fault == "half":
        weights.write_bytes(weights.read_bytes()[:5000])
    else:
        (tmp_path / "text_encoder" / "config.json").write_text("{")
    with pytest.raises(InputError, match="model_dir"):
        load_frozen_parts(tmp_path)


def test_an_unreadable_unet_is_named(tmp_path):
    for folder in (tmp_path / "nowhere", shipped("miniature/vae")):
        with pytest.raises(InputError, match=f"{folder.name}: .*UNet2DConditionModel"):
            load_unet(folder)


# --- runs ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model folder with everything but a UNet."""
    place = tmp_path_factory.mktemp("diffusion") / "model"
    shutil.copytree(shipped("miniature"), place, ignore=shutil.ignore_patterns("unet", "clip"))
    return place


def small(output_dir: Path, model_dir: Path, **fields) -> DiffusionConfig:
    chosen = {"output_dir": str(output_dir), "model_dir": str(model_dir), "data_dir": None, "report_to": "none",
              "num_train_images": 6, "train_batch_size": 4, "max_train_steps": 2, "sample_steps": 1000,
              "lr_warmup_steps": 0, "mixed_precision": "no", "ema_max_decay": 0.5} | fields  # fmt: skip
    return DiffusionConfig(**chosen)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return UNet2DConditionModel.from_pretrained(folder, use_safetensors=True).state_dict()


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_leaves_its_average_in_the_model_folder(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(latent_diffusion, "draw", functools.partial(draw, num_inference_steps=1))
    frozen = {path: path.read_bytes() for path in folder.rglob("*.safetensors") if "unet" not in path.parts}
    losses = train_diffusion(small(tmp_path / "run", folder, sample_steps=2))
    assert len(losses) == 2 and all(0 < loss < 3 for loss in losses)
    assert [path.name for path in (tmp_path / "run" / "samples").iterdir()] == ["step-000002.png"]
    assert Image.open(tmp_path / "run" / "samples" / "step-000002.png").size == (256, 256)
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert same(weights(folder / "unet"), weights(checkpoint / "unet_ema"))
    assert not same(weights(folder / "unet"), weights(checkpoint / "unet"))
    assert len(frozen) == 2 and all(path.read_bytes() == content for path, content in frozen.items())
    # The same again, without looking at samples: what is looked at does not change what is learned.
    assert train_diffusion(small(tmp_path / "again", folder)) == losses


def test_a_run_can_start_from_an_earlier_unet(folder, tmp_path):
    earlier = make_text_unet(seed=5)
    earlier.save_pretrained(tmp_path / "earlier")
    train_diffusion(small(tmp_path / "run", folder, start_from=str(tmp_path / "earlier"), max_train_steps=1,
                          learning_rate=1e-9))  # fmt: skip
    for name, weight in weights(folder / "unet").items():
        torch.testing.assert_close(weight, earlier.state_dict()[name], atol=1e-7, rtol=0)


def test_training_hears_the_captions(folder, tmp_path, monkeypatch):
    """With words that say nothing the losses are others, from the same noise and the same weights."""
    usual = train_diffusion(small(tmp_path / "run", folder, empty_captions=0.0, max_train_steps=1))
    empty = train_diffusion(small(tmp_path / "empty", folder, empty_captions=1.0, max_train_steps=1))
    assert usual[0] != empty[0] and usual[0] == pytest.approx(empty[0], rel=0.2)


@pytest.mark.parametrize("fields", [{"empty_captions": -0.1}, {"empty_captions": 1.1}, {"mixed_precision": "half"}])
def test_values_that_cannot_be_are_refused(tmp_path, fields):
    with pytest.raises(InputError, match=next(iter(fields))):
        small(tmp_path, tmp_path, **fields)


def test_the_watched_prompts_are_sixteen_that_training_never_shows():
    assert len(set(WATCHED_PROMPTS)) == 16
    assert set(WATCHED_PROMPTS) <= {caption(*triple) for triple in HELD_OUT}


def test_the_scheduler_of_a_folder_is_the_one_of_training():
    stored = DDPMScheduler.from_pretrained(shipped("miniature/scheduler"))
    torch.testing.assert_close(stored.alphas_cumprod, make_latent_scheduler().alphas_cumprod)

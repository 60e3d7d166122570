"""The named networks: the tutorial's exactly, sizes that are possible, weights that can be repeated."""
import json

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.models.embeddings import get_timestep_embedding

from diffusion_lessons.diffusion.networks import check_image_size
from diffusion_lessons.diffusion.pipelines import load_unconditional
from diffusion_lessons.diffusion.targets import denoising_loss, make_noise_scheduler, noise_batch
from diffusion_lessons.diffusion.unet import (
    UNETS,
    count_parameters,
    make_unet,
    timestep_embedding,
    unet_levels,
)
from diffusion_lessons.engine.config import InputError


def on_meta(**config) -> UNet2DModel:
    with torch.device("meta"):
        return UNet2DModel(**config)


def test_tutorial_128_is_the_tutorials():
    tutorial = on_meta(
        sample_size=128,
        in_channels=3,
        out_channels=3,
        layers_per_block=2,
        block_out_channels=(128, 128, 256, 256, 512, 512),
        down_block_types=("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4,
    )
    ours = on_meta(**UNETS["tutorial-128"])
    assert count_parameters(ours) == count_parameters(tutorial) == 113_673_219
    assert {name: tensor.shape for name, tensor in ours.state_dict().items()} == {
        name: tensor.shape for name, tensor in tutorial.state_dict().items()
    }
    assert dict(ours.config) == dict(tutorial.config)


def test_the_default_is_the_tutorials():
    with torch.device("meta"):
        model = make_unet()
    assert model.config.sample_size == 128
    assert count_parameters(model) == 113_673_219


@pytest.mark.parametrize(
    ("name", "count"),
    [("quick-64", 1_086_515), ("quick-32", 1_113_955), ("tiny-32", 71_323), ("tiny-16", 40_779)],
)
def test_small_networks_answer_in_the_pictures_shape(name, count):
    model = make_unet(name, seed=0)
    size = UNETS[name]["sample_size"]
    picture = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    assert count_parameters(model) == count
    with torch.no_grad():
        assert model(picture, torch.tensor([0, 999])).sample.shape == picture.shape


@pytest.mark.parametrize("name", UNETS)
def test_levels_are_those_of_the_model(name):
    shapes, model = [], on_meta(**UNETS[name])
    for block in model.down_blocks:
        block.register_forward_hook(lambda block, inputs, output: shapes.append(output[1][0].shape))
    size = UNETS[name]["sample_size"]
    model(torch.empty(1, 3, size, size, device="meta"), torch.zeros(1, dtype=torch.long, device="meta"))
    levels = unet_levels(UNETS[name])
    assert [(level.channels, level.size, level.size) for level in levels] == [tuple(shape[1:]) for shape in shapes]
    assert [level.attention for level in levels] == ["Attn" in type(block).__name__ for block in model.down_blocks]


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [("tutorial-128", (32, 96, 128, 512), (16, 100, 127, 0)), ("quick-32", (4, 32, 36), (2, 30, 33, -4))],
)
def test_sizes(name, good, bad):
    for size in good:
        check_image_size(UNETS[name], size)
    for size in bad:
        with pytest.raises(InputError, match=f"--image_size {size}:") as caught:
            check_image_size(UNETS[name], size)
        assert "\n" not in str(caught.value)


def test_refused_sizes_fail_in_the_model_and_suggested_ones_do_not():
    """The check says neither too much nor too little: it agrees with what the network can do."""
    model = make_unet("tiny-32", seed=0)
    for size in range(1, 25):
        try:
            check_image_size(model.config, size)
            allowed = True
        except InputError:
            allowed = False
        try:
            with torch.no_grad():
                works = model(torch.zeros(1, 3, size, size), 0).sample.shape[-1] == size
        except RuntimeError:
            works = False
        assert works == allowed, size


def test_error_names_the_nearest_sizes():
    with pytest.raises(InputError, match="use 96 or 128"):
        check_image_size(UNETS["tutorial-128"], 100)
    with pytest.raises(InputError, match="use 32 or more"):
        check_image_size(UNETS["tutorial-128"], 20)
    with pytest.raises(InputError, match="--image_size 30"):
        make_unet("tiny-32", image_size=30)


def test_seed_repeats_the_weights_and_leaves_the_global_generator():
    state = torch.get_rng_state()
    first, second, third = (make_unet("tiny-16", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, first.parameters(), second.parameters()))
    assert not torch.equal(first.conv_in.weight, third.conv_in.weight)


def test_without_a_seed_the_global_generator_decides():
    torch.manual_seed(3)
    first = make_unet("tiny-16")
    torch.manual_seed(3)
    assert torch.equal(first.conv_in.weight, make_unet("tiny-16").conv_in.weight)


def test_from_folder_file_and_pipeline(tmp_path):
    make_unet("tiny-16", seed=0).save_pretrained(tmp_path / "model")
    make_unet("tiny-32", seed=0).save_pretrained(tmp_path / "pipeline" / "unet")
    for source in (tmp_path / "model", tmp_path / "model" / "config.json", str(tmp_path / "model")):
        model = make_unet(source, image_size=32, seed=5)
        assert model.config.sample_size == 32
        assert tuple(model.config.block_out_channels) == UNETS["tiny-16"]["block_out_channels"]
    assert not torch.equal(model.conv_in.weight, make_unet("tiny-16", seed=0).conv_in.weight)  # the shape, new weights
    assert make_unet(tmp_path / "pipeline").config.sample_size == 32


def test_a_pipeline_to_go_on_from_must_be_able_to_halve_the_pictures(tmp_path):
    make_unet("tiny-16", seed=0).save_pretrained(tmp_path / "unet")
    make_noise_scheduler(prediction_type="sample").save_pretrained(tmp_path / "scheduler")
    unet, scheduler = load_unconditional(str(tmp_path), 32)
    assert torch.equal(unet.conv_in.weight, make_unet("tiny-16", seed=0).conv_in.weight)
    assert scheduler.config.prediction_type == "sample"
    with pytest.raises(InputError, match="--image_size 33"):
        load_unconditional(str(tmp_path), 33)
    with pytest.raises(InputError, match="--pretrained_model_name_or_path .*nowhere: is no unconditional pipeline"):
        load_unconditional(str(tmp_path / "nowhere"), 32)


def test_named_configs_cannot_be_changed_by_what_is_built():
    before = json.dumps(UNETS)
    make_unet("tiny-16", image_size=64)
    assert json.dumps(UNETS) == before


@pytest.mark.parametrize("name", ["tutorial-129", "someone/unreachable", "a/b/c", ""])
def test_unknown_names_are_named(name):
    with pytest.raises(InputError, match="--model_config_name_or_path") as caught:
        make_unet(name)
    assert "\n" not in str(caught.value)


def test_folders_that_hold_something_else(tmp_path):
    with pytest.raises(InputError, match="no config.json"):
        make_unet(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    with pytest.raises(InputError, match="AutoencoderKL"):
        make_unet(tmp_path)
    (tmp_path / "config.json").write_text("{ not json")
    with pytest.raises(InputError, match="--model_config_name_or_path"):
        make_unet(tmp_path)


@pytest.mark.parametrize("dim", [8, 32, 128])
def test_timestep_embedding_is_that_of_diffusers(dim):
    every = torch.arange(1000)
    expected = get_timestep_embedding(every, dim, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(timestep_embedding(every, dim), expected)
    model = on_meta(**{**UNETS["tiny-16"], "block_out_channels": (dim, dim)})
    torch.testing.assert_close(timestep_embedding(every, dim), model.time_proj(every))


def test_the_smallest_network_learns():
    clean = torch.full((8, 3, 16, 16), 0.8)
    model, scheduler = make_unet("tiny-16", seed=0), make_noise_scheduler()
    optimizer, generator = torch.optim.AdamW(model.parameters(), lr=4e-3), torch.Generator().manual_seed(0)
    losses = []
    for _ in range(60):
        noised = noise_batch(clean, scheduler, generator)
        prediction = model(noised.noisy_images, noised.timesteps, return_dict=False)[0]
        loss = denoising_loss(prediction, noised.target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])

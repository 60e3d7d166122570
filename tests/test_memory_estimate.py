"""What a run takes in memory, phase by phase, computed from configs; and that real tensors agree with it."""

import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffusion_lessons import miniature
from diffusion_lessons.dreambooth.config import DreamBoothConfig
from diffusion_lessons.dreambooth.lora import add_adapters
from diffusion_lessons.dreambooth.memory import (
    Calls,
    LiveBytes,
    OnPaper,
    PhaseMemory,
    choose_models,
    estimate,
    networks_of,
    on_paper,
    peak_of_call,
    precision_plan,
    state_bytes,
)
from diffusion_lessons.engine.config import InputError
from diffusion_lessons.engine.devices import forget_accelerator, make_accelerator
from diffusion_lessons.engine.optimization import TrainState, make_optimizer, trained_parameters
from diffusion_lessons.engine.precision import Phase
from diffusion_lessons.stable_diffusion.folder import find_model

GIB = 2**30
UNET, VAE, TEXT = 859_520_964, 83_653_863, 123_060_480  # numbers in Stable Diffusion 1.4
BLOCKS = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
AUTOENCODER = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2} | BLOCKS
SHAPES = {
    "1.4": {
        "unet": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
        "vae": AUTOENCODER,
        "text_encoder": {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_attention_heads": 12,
            "num_hidden_layers": 12,
            "vocab_size": 49408,
        },
    },
    "2.1": {
        "unet": {
            "sample_size": 96,
            "cross_attention_dim": 1024,
            "attention_head_dim": [5, 10, 20, 20],
            "use_linear_projection": True,
        },
        "vae": AUTOENCODER,
        "text_encoder": {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_attention_heads": 16,
            "num_hidden_layers": 23,
            "vocab_size": 49408,
        },
    },
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Model folders with configs and nothing else."""
    root = tmp_path_factory.mktemp("shapes")
    for version, networks in SHAPES.items():
        for name, config in networks.items():
            path = root / version / name / "config.json"
            path.parent.mkdir(parents=True)
            path.write_text(json.dumps(config), encoding="utf-8")
    return {version: root / version for version in SHAPES}


def a_config(**fields) -> DreamBoothConfig:
    needed = {"pretrained_model_name_or_path": "anything", "instance_data_dir": "dog", "instance_prompt": "a sks dog"}
    return DreamBoothConfig(**needed | {"train_batch_size": 1} | fields)


@cache  # an estimate of a large model takes seconds
def phases(folder: Path, device_type: str = "cuda", **fields) -> dict[Phase, PhaseMemory]:
    return {each.phase: each for each in estimate(a_config(**fields), folder, device_type)}


def numbers(tensors: Iterable[Tensor]) -> int:
    return sum(each.numel() for each in tensors)


def test_a_tensor_and_its_views_are_counted_once_and_until_the_last_is_gone():
    with LiveBytes() as live:
        first = torch.zeros(1000)
        view = first.view(10, 100)[3:].T
        assert live.now == 4000
        second = first.half()
        assert live.now == 6000
        del first, second
        assert live.now == 4000
        view += 1  # in place: nothing new
        assert live.now == live.peak - 2000
        del view
    assert (live.now, live.peak) == (0, 6000)


def test_what_was_there_before_is_counted_when_noted():
    weight = torch.zeros(100)
    with LiveBytes() as live:
        live.note(weight)
        live.note(weight[:10])
        assert live.now == 400
        shared = weight.view(10, 10)
        assert live.now == 400 and shared.shape == (10, 10)


@pytest.mark.parametrize(
    ("version", "counts"), [("1.4", (UNET, VAE, TEXT)), ("2.1", (865_910_724, 83_653_863, 340_387_840))]
)
def test_the_shapes_have_the_numbers_of_the_published_models(folders, version, counts):
    networks = on_paper(folders[version])
    assert tuple(numbers(each.parameters()) for each in networks) == counts
    assert all(each.device.type == "meta" for network in networks for each in network.parameters())


@pytest.mark.parametrize(
    ("version", "fields"),
    [("1.4", {}), ("2.1", {"resolution": 768}), ("2.1", {"sample_batch_size": 1})],
    ids=["1.4 at 512", "2.1 at its 768", "2.1 at 512"],
)
def test_with_adapters_no_phase_needs_more_than_training_does(folders, version, fields):
    found = phases(folders[version], lora=True, **fields)
    assert list(found) == [Phase.CLASS_IMAGES, Phase.ENCODE, Phase.TRAIN, Phase.LOOK]
    assert max(found.values(), key=lambda each: each.total).phase == Phase.TRAIN


@pytest.mark.parametrize(("version", "fields"), [("1.4", {}), ("2.1", {"resolution": 768})], ids=["1.4", "2.1"])
def test_gradient_checkpointing_keeps_training_small(folders, version, fields):
    without = phases(folders[version], lora=True, **fields)[Phase.TRAIN]
    saving = phases(folders[version], lora=True, gradient_checkpointing=True, **fields)[Phase.TRAIN]
    assert saving.total < 6 and saving.weights == without.weights and saving.work < 0.5 * without.work


def test_before_a_run_needed_more_to_encode_than_to_train(folders):
    """All three networks on the device in 32 bits, eight pictures at a time: that is what was mended."""
    there = 4 * sum(numbers(each.parameters()) for each in on_paper(folders["1.4"])) / GIB
    old = there + peak_of_call(folders["1.4"], "encode", torch.float32, 512, 8)
    now = phases(folders["1.4"], lora=True)
    assert old > 8.9, "an 8 GB card never got to its first step"
    assert old > 3 * now[Phase.TRAIN].total and old > 10 * now[Phase.ENCODE].total
    assert peak_of_call(folders["1.4"], "decode", torch.float16, 512, 16) > 10 * now[Phase.LOOK].work


def test_pictures_through_the_encoder_cost_in_proportion(folders):
    one, eight = (peak_of_call(folders["1.4"], "encode", torch.float16, 512, number) for number in (1, 8))
    assert one == pytest.approx(0.31, abs=0.01) and eight == pytest.approx(8 * one, rel=0.02)


def test_what_learns_lies_there_in_32_bits_and_what_is_read_in_half(folders):
    """The UNet alone; with the text encoder; with pictures encoded in every step; with averages and 8-bit moments."""
    fields = {"gradient_checkpointing": True}
    found = phases(folders["1.4"], **fields)
    assert found[Phase.CLASS_IMAGES].weights == pytest.approx((2 * UNET + 2 * VAE) / GIB)
    assert found[Phase.ENCODE].weights == pytest.approx((2 * VAE + 2 * TEXT) / GIB)
    assert found[Phase.TRAIN].weights == pytest.approx(4 * UNET / GIB)
    assert found[Phase.TRAIN].state == found[Phase.LOOK].state == pytest.approx(8 * UNET / GIB)
    assert found[Phase.LOOK].weights == pytest.approx((6 * UNET + 2 * VAE) / GIB), "a copy in half, and the decoder"
    gradients = 4 * UNET / GIB
    assert gradients < found[Phase.TRAIN].work < 1.05 * gradients, "and no second set of weights in half"

    found = phases(folders["1.4"], train_text_encoder=True, use_ema=True, cache_latents=False, **fields)
    learning = UNET + TEXT
    assert found[Phase.ENCODE].weights == pytest.approx((2 * VAE + 4 * TEXT) / GIB), "not rounded before it is trained"
    assert found[Phase.TRAIN].weights == pytest.approx((4 * learning + 2 * VAE) / GIB)
    assert found[Phase.TRAIN].state == pytest.approx(12 * learning / GIB)
    assert found[Phase.LOOK].weights == pytest.approx((6 * learning + 2 * VAE) / GIB), "all are there, none comes again"


def test_adapters_leave_the_network_in_half(folders):
    networks = on_paper(folders["1.4"])
    add_adapters({"unet": networks.unet}, rank=4)
    learning = trained_parameters(networks.unet)
    found = phases(folders["1.4"], lora=True, use_8bit_adam=True, gradient_checkpointing=True)
    assert found[Phase.TRAIN].weights == pytest.approx((2 * UNET + 4 * numbers(learning)) / GIB)
    small = [each for each in learning if each.numel() < 4096]
    assert found[Phase.TRAIN].state * GIB == 2 * numbers(learning) + 6 * numbers(small)
    assert numbers(small) > 0.4 * numbers(learning), "bitsandbytes leaves these in 32 bits"


def test_state_is_counted_to_the_byte():
    large, small = torch.zeros(64, 64), torch.zeros(4095)
    assert state_bytes([large, small]) == 8 * (4096 + 4095)
    assert state_bytes([large, small], use_8bit_adam=True) == 2 * 4096 + 8 * 4095
    assert state_bytes([large, small], use_8bit_adam=True, use_ema=True) == 6 * 4096 + 12 * 4095


@pytest.mark.parametrize(("device_type", "precision", "each"), [("xpu", None, 2), ("mps", None, 4), ("cuda", "no", 4)])
def test_other_devices_and_full_precision(device_type, precision, each):
    """On Apple's the default is 32 bits, as it is for a run."""
    folder = find_model("miniature")
    found = phases(folder, device_type, lora=True, resolution=64, mixed_precision=precision)
    networks = on_paper(folder)
    there = each * (numbers(networks.vae.parameters()) + numbers(networks.text_encoder.parameters()))
    assert found[Phase.ENCODE].weights == pytest.approx(there / GIB)
    halves = phases(folder, lora=True, resolution=64, mixed_precision="fp16")
    assert (found[Phase.TRAIN].work > 1.2 * halves[Phase.TRAIN].work) == (each == 4)


@pytest.mark.parametrize("spoil", [lambda path: path.write_text("{"), Path.unlink], ids=["damaged", "missing"])
def test_a_config_that_cannot_be_read_is_named(folders, tmp_path, spoil):
    for name, config in SHAPES["1.4"].items():
        path = tmp_path / name / "config.json"
        path.parent.mkdir()
        path.write_text(json.dumps(config), encoding="utf-8")
    spoil(tmp_path / "vae" / "config.json")
    with pytest.raises(InputError, match="vae.*config.json.*missing or damaged"):
        estimate(a_config(), tmp_path)


@pytest.mark.parametrize("fields", [{}, {"lora": True}, {"gradient_checkpointing": True}], ids=str)
def test_the_estimate_equals_the_tensors_of_a_real_step(fields):
    """Of the miniature in 32 bits: weights, gradients and moments to the byte, activations to a few per cent."""
    small = {"resolution": 64, "train_batch_size": 2, "mixed_precision": "no", "seed": 0, "report_to": "none"}
    config = a_config(**small, **fields).resolve()
    expected = phases(find_model("miniature"), **small, **fields)[Phase.TRAIN]
    pipeline, accelerator = miniature.load(), make_accelerator(config)
    for network in networks_of(pipeline).values():
        network.requires_grad_(False)
    models = choose_models(config, pipeline, precision_plan(config, torch.device("cpu")))
    learning = trained_parameters(models["unet"])
    state = TrainState(accelerator, config, models, make_optimizer(learning, config), 2)
    with LiveBytes() as live:
        for weight in pipeline.unet.parameters():
            live.note(weight)
        weights = live.now
        Calls(OnPaper(pipeline.unet, pipeline.vae, pipeline.text_encoder), 64).learn(config)
    state.optimizer.step()
    kept = [moments[name] for moments in state.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    forget_accelerator(accelerator)
    assert weights == round(expected.weights * GIB)
    assert sum(each.nbytes for each in kept) == round(expected.state * GIB)
    assert sum(each.grad.nbytes for each in learning) == sum(each.nbytes for each in learning)
    assert (live.peak - weights) / GIB == pytest.approx(expected.work, rel=0.03)

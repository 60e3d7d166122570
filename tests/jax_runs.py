"""Small real DreamBooth runs in JAX: on a Stable Diffusion of two blocks, whose step compiles in a few seconds."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from dreambooth_runs import SMALL
from transformers import CLIPTextConfig, CLIPTextModel

from diffusion_lessons import miniature
from diffusion_lessons.stable_diffusion.prompts import load_tokenizer

PROCESS_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def toy_model(folder: Path) -> Path:
    """A Stable Diffusion with random weights: a UNet of 16 and 32 channels, a decoder that halves the side once."""
    tokenizer = load_tokenizer(miniature.path() / "tokenizer", "")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=16, block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=32, norm_num_groups=8,
            attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
        vae = AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, sample_size=32,
                            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
        text = CLIPTextModel(CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length, eos_token_id=2))  # as in old text encoders
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False)
    StableDiffusionPipeline(vae, text, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
                            ).save_pretrained(folder)
    return folder


def jax_words(model: Path | str, instance_dir: Path | str, output_dir: Path | str, *flags: str, **fields) -> list[str]:
    """The words of a small run in JAX; a field given here goes over the usual ones, as in `dreambooth_words`."""
    chosen = SMALL | {"pretrained_model_name_or_path": str(model), "instance_data_dir": str(instance_dir),
                      "output_dir": str(output_dir), "fidelity_model": "none"} | fields
    named = [[f"--{name}"] if value is True else [f"--{name}", str(value)]
             for name, value in chosen.items() if value is not None]
    return [*(word for flag in named for word in flag), *flags]


def jax_environment(cache: Path, devices: int = 1, **variables: str) -> dict[str, str]:
    """The environment of a process with so many CPU devices, which finds programs that others have compiled."""
    own = {name: value for name, value in os.environ.items() if name not in PROCESS_VARIABLES}
    flags = (f"--xla_force_host_platform_device_count={devices} --xla_cpu_multi_thread_eigen=false "
             "--xla_cpu_collective_call_terminate_timeout_seconds=300")  # a busy machine has the eight wait
    return own | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(cache),
                  "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
                  **variables}


def start_jax(words: list[str], cwd: Path, environment: dict[str, str]) -> subprocess.Popen:
    """The command in a process of its own; what it says, output and errors together, is read from `stdout`."""
    return subprocess.Popen([sys.executable, "-m", "diffusion_lessons.jax.training", *words], cwd=cwd, env=environment,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def ended(process: subprocess.Popen, code: int = 0) -> str:
    """What a process said until it ended, with this exit code."""
    said = process.communicate(timeout=500)[0]
    assert process.returncode == code, said[-3000:]
    return said

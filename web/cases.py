"""What the package does, written down for the tests of the page: tokens, noise, steps of the solver, whole drawings.

    python web/cases.py FILE

The tests in `web/tests` do the same in JavaScript and compare.
"""
import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from diffusion_lessons import miniature
from diffusion_lessons.dreambooth.adapters import KOHYA_FILE, LORA_FILE, load_adapter, save_adapters
from diffusion_lessons.dreambooth.lora import add_adapters
from diffusion_lessons.engine.config import InputError
from diffusion_lessons.miniature.captions import all_captions
from diffusion_lessons.miniature.model import attention_maps, caption_notes
from diffusion_lessons.stable_diffusion.drawing import decode, draw, encode_guidance
from diffusion_lessons.stable_diffusion.prompts import tokenize

CAPTION = "a photo of a red butterfly on snow"
AWKWARD = (
    "", " ", "\t\n", "a", "A Photo of a RED Butterfly, on snow!", "a  photo\nof\ta\u00a0blue beetle\u2003on\u0085sand",
    "it's the butterfly's; they'll, we've, I'd, you're, can't, 'Tis 's", "1234 butterflies and 5.5 fish",
    "''s!!'s ... ?!", "<|endoftext|>", "a <|startoftext|> b", "<|ENDOFTEXT|> shouted", "<|endoftext|",
    "🦋 on ❄️ and 👩🏽\u200d🎨", "ΟΔΟΣ Σ İstanbul ẞ ǅ", "café cafe\u0301 ñ ﬁ ①②", "日本語の蝶 на снегу فراشة",
    "a_b-c/d\\e @#$%^&*()", "\ufeff zero\u200bwidth\u00ad soft", "ªº²³ Ⅷ", "x" * 300, "butterfly " * 200,
    "\x00\x07 control", "a photo of a sks butterfly on snow", "\U0001f1e9\U0001f1ea flag",
    " ".join(f"unknown{number}" for number in range(12)),
)
DRAWINGS = (  # prompt, seed, steps, guidance
    (CAPTION, 0, 20, 5.0), ("a photo of a blue beetle on sand", 3, 8, 7.5),
    ("a white flower on night", 2**32 - 1, 20, 1.0), ("", 7, 2, 3.0),
    ("a photo of a sks butterfly on meadow", 12345, 1, 5.0), ("a yellow fish on sea", 41, 33, 10.0),
)


def tokens(pipeline: StableDiffusionPipeline) -> Iterator[dict[str, Any]]:
    """Every caption and the awkward texts: what the text encoder reads, and what is said of them."""
    for text in [*dict.fromkeys(all_captions()), *AWKWARD]:
        yield {"text": text, "numbers": tokenize(pipeline.tokenizer, [text])[0].tolist(),
               "notes": caption_notes(text, pipeline.tokenizer)}


def noise() -> Iterator[dict[str, Any]]:
    """The first noise of some seeds, and noise of other lengths."""
    for seed, count in ((0, 16), (1, 1024), (41, 48), (2**31, 1024), (2**32 - 1, 4096)):
        yield {"seed": seed, "noise": torch.randn(count, generator=torch.Generator().manual_seed(seed)).tolist()}


def solver(pipeline: StableDiffusionPipeline) -> Iterator[dict[str, Any]]:
    """Which timesteps are visited for every number of steps, and where a made-up network leads in some of them."""
    for steps in range(1, 51):
        sampler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
        sampler.set_timesteps(steps)
        case = {"steps": steps, "timesteps": sampler.timesteps.tolist()}
        if steps in (1, 2, 3, 14, 15, 20, 50):
            x = torch.linspace(-2, 2, 32)
            for timestep in sampler.timesteps:
                x = sampler.step((x + timestep / 500).sin(), timestep, x).prev_sample
            case["end"] = x.tolist()
        yield case


def drawn(pipeline: StableDiffusionPipeline, prompt: str, seed: int, steps: int, guidance: float) -> dict[str, Any]:
    """One drawing: its latents, and its pixels in rows of red, green, blue."""
    towards, away = encode_guidance(pipeline, [prompt], guidance_scale=guidance)
    with torch.no_grad():
        latents = pipeline(prompt_embeds=towards, negative_prompt_embeds=away, output_type="latent",
                           num_inference_steps=steps, guidance_scale=guidance,
                           generator=[torch.Generator().manual_seed(seed)]).images
    picture = draw(pipeline, [prompt], seed=seed, num_inference_steps=steps, guidance_scale=guidance)
    assert torch.equal(picture, decode(pipeline, latents))
    return {"prompt": prompt, "seed": seed, "steps": steps, "guidance": guidance,
            "latents": latents.flatten().tolist(), "pixels": picture[0].permute(1, 2, 0).flatten().tolist()}


def looked() -> dict[str, Any]:
    """Where each token was looked at while the caption was drawn: (tokens, 8, 8)."""
    _, maps = attention_maps(miniature.load(), CAPTION, num_inference_steps=6)
    return {"prompt": CAPTION, "seed": 0, "steps": 6, "guidance": 5.0, "maps": maps.flatten().tolist()}


def to_text(file: Path) -> str:
    """The bytes of a file, as JSON can hold them."""
    return file.read_bytes().hex()


def adapters(folder: Path) -> Iterator[dict[str, Any]]:
    """Adapters of chance in every format, half and whole, and what the model draws with them."""
    trained = miniature.load()
    models = {"unet": trained.unet, "text_encoder": trained.text_encoder}
    add_adapters(models, rank=3)
    generator = torch.Generator().manual_seed(0)
    for model in models.values():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.data = 0.1 * torch.randn(weight.shape, generator=generator)
    save_adapters(models, folder, "kohya")
    halves = {name: value.half() for name, value in load_file(folder / LORA_FILE).items() if name.startswith("unet")}
    save_file(halves, folder / "half.safetensors")
    for name, strength in ((LORA_FILE, 1.0), (KOHYA_FILE, 0.5), ("half.safetensors", 1.0)):
        pipeline = miniature.load()
        load_adapter(pipeline, folder / name, strength)
        yield {"file": to_text(folder / name), "strength": strength, "drawn": drawn(pipeline, CAPTION, 0, 6, 5.0)}


def refused(folder: Path) -> Iterator[dict[str, Any]]:
    """Files that Python refuses as adapters of the miniature, with a word that the page's message has to have."""
    whole = (folder / LORA_FILE).read_bytes()
    state = load_file(folder / LORA_FILE)
    name = next(name for name in state if name.endswith("to_k.lora.up.weight"))
    wide = {key: value.repeat(*([1, 2] if "down" in key else [2, 1])) for key, value in state.items()}
    files = {
        "nothing": (b"", "too short"), "text": (b"a photo of a butterfly" * 9, "not a safetensors file"),
        "cut off": (whole[: len(whole) // 2], "outside the file"),
        "picture": (b"\x89PNG\r\n\x1a\n" * 40, "not a safetensors file"), "foreign": (wide, "another model"),
        "half of it": ({name: state[name]}, "one of two"), "no tensors": ({}, "no adapter"),
        "model": ({"unet.conv_in.weight": torch.zeros(2, 2)}, "no LoRA"),
        "sdxl": ({key.replace("text_encoder.", "text_encoder_2."): value for key, value in state.items()}, "no LoRA"),
    }
    for each, (content, word) in files.items():
        path = folder / f"{each}.safetensors"
        path.write_bytes(content) if isinstance(content, bytes) else save_file(content, path)
        try:
            load_adapter(miniature.load(), path)
        except InputError as error:
            yield {"name": each, "file": to_text(path), "word": word, "python": str(error)}
        else:
            yield {"name": each, "file": to_text(path), "word": word, "python": None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    file, pipeline = parser.parse_args().file, miniature.load()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        cases = {
            "tokens": list(tokens(pipeline)), "noise": list(noise()), "solver": list(solver(pipeline)),
            "drawings": [drawn(pipeline, *each) for each in DRAWINGS], "looked": looked(),
            "adapters": list(adapters(folder)), "refused": list(refused(folder)),
        }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(cases))


if __name__ == "__main__":
    main()

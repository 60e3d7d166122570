"""What the benchmarks work on: model folders of the exact shapes of Stable Diffusion 1.4 and 2.1, and drawn pictures.

Shapes decide time and memory, weights do not: these are random numbers, in 16 bits on disk. The configs are those of
the published folders (`unet/config.json`, `vae/config.json`, `text_encoder/config.json`, `scheduler_config.json`) of
CompVis/stable-diffusion-v1-4 and stabilityai/stable-diffusion-2-1 on the Hugging Face Hub; the number of parameters of
every part is checked against theirs. The tokenizer is the miniature's, whose 593 words fit into any vocabulary.

    python benchmarks/materials.py FOLDER [--small]
"""
import argparse
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

UNET = {
    "act_fn": "silu", "attention_head_dim": 8, "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False, "cross_attention_dim": 768,
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"], "downsample_padding": 1,
    "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": 4, "layers_per_block": 2, "mid_block_scale_factor": 1,
    "norm_eps": 1e-5, "norm_num_groups": 32, "out_channels": 4, "sample_size": 64,
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
}  # fmt: skip
VAE = {
    "act_fn": "silu", "block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3, "latent_channels": 4, "layers_per_block": 2, "norm_num_groups": 32, "out_channels": 3,
    "sample_size": 512, "scaling_factor": 0.18215, "up_block_types": ["UpDecoderBlock2D"] * 4,
}  # fmt: skip
TEXT = {
    "architectures": ["CLIPTextModel"], "attention_dropout": 0.0, "bos_token_id": 0, "eos_token_id": 2,
    "hidden_act": "quick_gelu", "hidden_size": 768, "initializer_factor": 1.0, "initializer_range": 0.02,
    "intermediate_size": 3072, "layer_norm_eps": 1e-5, "max_position_embeddings": 77, "model_type": "clip_text_model",
    "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 1, "projection_dim": 768,
    "torch_dtype": "float16", "vocab_size": 49408,
}  # fmt: skip
NOISE = {
    "beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "clip_sample": False,
    "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
}  # fmt: skip
MODELS: dict[str, dict[str, dict[str, Any]]] = {
    "1.4": {"unet": UNET, "vae": VAE, "text_encoder": TEXT, "scheduler": {"_class_name": "PNDMScheduler", **NOISE}},
    "2.1": {
        "unet": UNET | {"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "sample_size": 96,
                        "dual_cross_attention": False, "only_cross_attention": False, "upcast_attention": True,
                        "use_linear_projection": True},
        "vae": VAE | {"sample_size": 768},
        "text_encoder": TEXT | {"hidden_act": "gelu", "hidden_size": 1024, "intermediate_size": 4096,
                                "num_attention_heads": 16, "num_hidden_layers": 23, "projection_dim": 512},
        "scheduler": {"_class_name": "DDIMScheduler", **NOISE, "prediction_type": "v_prediction"},
    },
}  # fmt: skip
PARAMETERS = {
    "1.4": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    "2.1": {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840},
}
KINDS = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
LIBRARIES = {"unet": "diffusers", "vae": "diffusers", "text_encoder": "transformers", "tokenizer": "transformers"}
DIFFUSERS_FILE, TRANSFORMERS_FILE = "diffusion_pytorch_model.safetensors", "model.safetensors"
WEIGHT_FILES = {"unet": DIFFUSERS_FILE, "vae": DIFFUSERS_FILE, "text_encoder": TRANSFORMERS_FILE}


def configs_of(name: str, small: bool = False) -> dict[str, dict[str, Any]]:
    """The configs of a model by part; small: of the same layout, a few channels wide, for pictures of 64 px."""
    parts = MODELS[name]
    if not small:
        return parts
    heads = [2, 4, 4, 4] if isinstance(parts["unet"]["attention_head_dim"], list) else 2
    unet = {"attention_head_dim": heads, "block_out_channels": [16, 32, 32, 32], "cross_attention_dim": 32,
            "norm_num_groups": 8, "sample_size": 8}  # fmt: skip
    vae = {"block_out_channels": [8, 8, 16, 16], "norm_num_groups": 4, "sample_size": 64}
    text = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    return parts | {name: parts[name] | change for name, change in zip(KINDS, (unet, vae, text), strict=True)}


def empty_network(part: str, config: Mapping[str, Any]) -> torch.nn.Module:
    """A part by its config, on the meta device: names and shapes, without memory."""
    kind = KINDS[part]
    with torch.device("meta"):
        return kind(CLIPTextConfig(**config)) if part == "text_encoder" else kind.from_config(dict(config))


def random_weights(part: str, config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Weights for a part, float16 by name: as spread as PyTorch's own at the start, so that nothing overflows.

    Norms are ones, biases zeros; of an embedding a row is as spread as CLIP's.
    """
    weights, generator = {}, torch.Generator().manual_seed(0)
    for name, weight in empty_network(part, config).state_dict().items():
        if weight.ndim > 1:
            spread = 0.02 if "embedding.weight" in name else (3 * weight[0].numel()) ** -0.5
            weights[name] = torch.empty(weight.shape).normal_(0, spread, generator=generator).half()
        elif weight.is_floating_point():
            weights[name] = torch.full(weight.shape, float(name.endswith("weight")), dtype=torch.float16)
    return weights


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a config, with the folder that it lies in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def build_part(folder: Path, part: str, config: Mapping[str, Any]) -> int:
    """Write config and random weights of one part; returns the number of parameters."""
    weights = random_weights(part, config)
    name = {} if part == "text_encoder" else {"_class_name": KINDS[part].__name__}
    write_json(folder / part / "config.json", name | config)
    # The published text encoders have this prefix, whatever the installed transformers calls them.
    prefix = "text_model." if part == "text_encoder" and not any("text_model." in each for each in weights) else ""
    save_file({prefix + each: weight for each, weight in weights.items()}, folder / part / WEIGHT_FILES[part],
              {"format": "pt"})  # fmt: skip
    return sum(weight.numel() for weight in weights.values())


def build(name: str, folder: Path, small: bool = False) -> None:
    """Write the folder of a model, part by part; one that is there already is left as it is.

    Raises ValueError when a part has another number of parameters than the published one.
    """
    if (folder / "model_index.json").is_file():
        return
    from diffusion_lessons.stable_diffusion.folder import shipped

    parts = configs_of(name, small)
    for part in KINDS:
        count = build_part(folder, part, parts[part])
        if not small and count != PARAMETERS[name][part]:
            raise ValueError(f"{part} of {name}: {count:,} parameters, and not {PARAMETERS[name][part]:,}")
        print(f"{name}: {part}, {count:,} parameters")
    write_json(folder / "scheduler" / "scheduler_config.json", parts["scheduler"])
    shutil.copytree(shipped("miniature") / "tokenizer", folder / "tokenizer", dirs_exist_ok=True)
    classes = {part: kind.__name__ for part, kind in KINDS.items()} | {"tokenizer": "CLIPTokenizer"}
    index = {part: [LIBRARIES[part], kind] for part, kind in classes.items()}
    write_json(folder / "model_index.json", {  # last: a folder with an index is whole
        "_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.38.0", "feature_extractor": [None, None],
        "requires_safety_checker": False, "safety_checker": [None, None], **index,
        "scheduler": ["diffusers", parts["scheduler"]["_class_name"]]})  # fmt: skip


def in_32_bits(model: Path) -> Path:
    """The same model beside it with a text encoder in 32 bits, without which the reference scripts do not train one."""
    folder = model.with_name(f"{model.name}-in-32-bits")
    if not folder.exists():
        shutil.copytree(model, folder, copy_function=os.link)
        weights, config = folder / "text_encoder" / TRANSFORMERS_FILE, folder / "text_encoder" / "config.json"
        wide = {name: weight.float() for name, weight in load_file(weights).items()}
        changed = json.loads(config.read_text(encoding="utf-8")) | {"torch_dtype": "float32"}
        for path in (weights, config):
            path.unlink()  # a link: writing into it would change the model that it came from
        save_file(wide, weights, {"format": "pt"})
        write_json(config, changed)
    return folder


def resized(model: Path, folder: Path, sample_size: int) -> None:
    """The same model for pictures of another size, in latent pixels: its files are links, only one number differs."""
    if not folder.exists():
        shutil.copytree(model, folder, copy_function=os.link)
    path = folder / "unet" / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"sample_size": sample_size}
    path.unlink()  # a link, as above
    write_json(path, config)


def model_folder(folder: Path, name: str, size: int | None = None) -> Path:
    """Where a model lies among others; size: the one for pictures of that size."""
    return folder / (f"stable-diffusion-{name}" + (f"-for-{size}-px" if size else ""))


def draw_subject(folder: Path, number: int, size: int) -> None:
    """Save drawn pictures of the subject, `size` pixels square, as PNG files."""
    from diffusion_lessons.pictures.meadow import subject

    folder.mkdir(parents=True, exist_ok=True)
    for index, row in enumerate(subject(number, size)):
        row["image"].save(folder / f"{index:02d}.png")


def main() -> None:
    """Build both models, 1.4 for another size too, and draw two pictures, as far as they are missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--small", action="store_true", help="the same layout, a few channels wide")
    parser.add_argument("--resized", type=int, default=256, help="pixels of a second 1.4 (default: %(default)s)")
    parser.add_argument("--subject", type=int, default=512, help="pixels of the pictures (default: %(default)s)")
    words = parser.parse_args()
    for name in MODELS:
        build(name, model_folder(words.folder, name), words.small)
    resized(model_folder(words.folder, "1.4"), model_folder(words.folder, "1.4", words.resized), words.resized // 8)
    draw_subject(words.folder / "subject", 2, words.subject)


if __name__ == "__main__":
    main()

"""Which butterfly should the course teach? A search over seeds, by three measures; run once for each set of weights.

    python benchmarks/subject.py                 # about a quarter of an hour on one core

Only butterflies with a mark in front and a star behind take part: a stranger needs something to know it by.

1. What the autoencoder keeps of it, in dB: a mark that does not survive the latents cannot be learned.
2. How far it is from its class in the eye: the mean of one minus the cosine to other butterflies.
3. How soon DreamBooth gets it: subject fidelity after a short run, for the best dozen by the first two.

Writes benchmarks/results/subject.json, which lesson 30 quotes, and a sheet of the dozen beside it.
"""
import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import measuring
import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from diffusion_lessons import miniature
from diffusion_lessons.dreambooth.config import DreamBoothConfig
from diffusion_lessons.dreambooth.loop import dreambooth_loop
from diffusion_lessons.dreambooth.prior import prior_preservation_loss
from diffusion_lessons.dreambooth.subject import load_subject
from diffusion_lessons.engine.checkpoints import write_json
from diffusion_lessons.engine.optimization import make_optimizer
from diffusion_lessons.engine.run import start_run
from diffusion_lessons.engine.tracking import say
from diffusion_lessons.metrics import cosine_similarities, subject_fidelity
from diffusion_lessons.miniature.autoencoder import psnr, reconstruct
from diffusion_lessons.miniature.eye import EyeEncoder
from diffusion_lessons.pictures import meadow
from diffusion_lessons.pictures.creatures import BACK, FRONT
from diffusion_lessons.pictures.figures import make_grid
from diffusion_lessons.pictures.sets import Source, dataset_source
from diffusion_lessons.stable_diffusion.drawing import draw, training_scheduler

RESULTS = Path(__file__).parent / "results"
SUBJECT, CLASS = "a photo of a sks butterfly", "a photo of a butterfly"
PLACES = ("snow", "night", "sea")


def pixels_of(rows) -> Tensor:
    """The pictures of a data set, uint8 (N, 3, H, W)."""
    return torch.from_numpy(np.stack([np.asarray(row["image"]).transpose(2, 0, 1) for row in rows]))


def has_marks(seed: int) -> bool:
    """Whether this seed's butterfly has a mark in front and a star behind."""
    look = meadow.subject_look(seed)
    return look.marks != FRONT["plain"] and look.hind_marks == BACK["star"]


def survey(seeds: int, vae: torch.nn.Module, eye: EyeEncoder) -> list[dict]:
    """The first two measures of each seed's butterfly, in six places."""
    others = eye(pixels_of(meadow.scenes(120, 64, seed=5, kinds=("butterfly",))))
    rows = []
    for seed in filter(has_marks, range(seeds)):
        pictures = pixels_of(meadow.subject(6, 64, seed))
        rows.append({"seed": seed, "decibels": float(psnr(pictures, reconstruct(vae, pictures)).mean()),
                     "distance": 1 - float(cosine_similarities(eye(pictures), others).mean())})
    for name in ("decibels", "distance"):
        for rank, row in enumerate(sorted(rows, key=lambda row: -row[name])):
            row["rank"] = row.get("rank", 0) + rank
    return sorted(rows, key=lambda row: row["rank"])


def class_source(pipeline, number: int = 48) -> Source:
    """The model's own pictures of the class."""
    drawn = draw(pipeline, [CLASS] * number, seed=1, num_inference_steps=15, batch_size=16)
    pictures = [Image.fromarray(each.permute(1, 2, 0).numpy()) for each in drawn]
    return dataset_source(Dataset.from_dict({"image": pictures}), "class")


def taught(seed: int, steps: int, of_class: Source, folder: str, places: Sequence[str] = PLACES, number: int = 4,
           **fields: Any) -> Tensor:
    """What a model draws of a butterfly after so many steps, so many pictures in each place: uint8 (N, 3, 64, 64).

    fields: of the run's config, where they differ.
    """
    pipeline = miniature.load()
    usual = {"learning_rate": 1e-3, "lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 20}
    config = DreamBoothConfig(
        pretrained_model_name_or_path="miniature", instance_data_dir="meadow", instance_prompt=SUBJECT,
        class_prompt=CLASS, class_data_dir="class", with_prior_preservation=True, resolution=64, train_batch_size=2,
        use_ema=True, ema_max_decay=0.99, max_train_steps=steps, checkpointing_steps=10_000, mixed_precision="no",
        seed=0, report_to="none", output_dir=f"{folder}/{seed}", **usual | fields).resolve()
    data = load_subject(config, pipeline, [dataset_source(meadow.subject(5, 64, seed), "meadow"), of_class])
    loader = DataLoader(data.dataset, config.train_batch_size, shuffle=True)
    optimizer = make_optimizer(pipeline.unet.parameters(), config)
    with start_run(config, {"unet": pipeline.unet}, optimizer, loader) as run:
        dreambooth_loop(run, config, data, training_scheduler(pipeline), prior_preservation_loss)
        with run.averaged_weights():
            prompts = [f"{SUBJECT} on {place}" for place in places for _ in range(number)]
            return draw(pipeline, prompts, seed=7, num_inference_steps=15, guidance_scale=5)


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=300, help="how many seeds to look at")
    parser.add_argument("--finalists", type=int, default=12, help="how many are taught to a model")
    parser.add_argument("--steps", type=int, default=100, help="of each short run")
    parser.add_argument("--eye", help="folder of another eye than the shipped one")
    parser.add_argument("--output_dir", type=Path, default=RESULTS)
    return parser.parse_args()


def compete(rows: list[dict], steps: int, eye: EyeEncoder, of_class: Source) -> tuple[list[dict], list[Tensor]]:
    """The rows with their subject fidelity after so many steps, the best one first; and what was drawn, row by row."""
    sheet = []
    with tempfile.TemporaryDirectory() as folder:
        for row in rows:
            pictures = taught(row["seed"], steps, of_class, folder)
            real = pixels_of(meadow.subject(5, 64, row["seed"]))
            row["fidelity"] = subject_fidelity(eye(pictures), eye(real))
            sheet.append(torch.cat([real[:3], pictures]))
            say(json.dumps(row))
    order = sorted(range(len(rows)), key=lambda index: -rows[index]["fidelity"])
    return [rows[index] for index in order], [sheet[index] for index in order]


def main() -> None:
    """Survey all seeds, let the best compete, write what was found."""
    given = options()
    torch.set_num_threads(1)
    start, pipeline, eye = time.monotonic(), miniature.load(), EyeEncoder(given.eye)
    rows = survey(given.seeds, pipeline.vae, eye)
    finalists, sheet = compete(rows[: given.finalists], given.steps, eye, class_source(pipeline))
    butterflies = pixels_of(meadow.scenes(200, 64, seed=6, kinds=("butterfly",)))
    of_its_class = float(psnr(butterflies, reconstruct(pipeline.vae, butterflies)).mean())
    write_json(given.output_dir / "subject.json", {
        "chosen": finalists[0]["seed"], "seeds": given.seeds, "marked": len(rows), "steps": given.steps,
        "butterflies through the autoencoder, in dB": of_its_class,
        "medians": {name: float(np.median([row[name] for row in rows])) for name in ("decibels", "distance")},
        "finalists": finalists, "seconds": round(time.monotonic() - start),
        "machine": measuring.about_machine(card=False)})
    best = torch.cat(sheet[:6])
    make_grid(list(best), 6, len(best) // 6).quantize(128).save(given.output_dir / "subject.png", optimize=True)


if __name__ == "__main__":
    main()

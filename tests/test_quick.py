"""`make butterflies` and `make dreambooth` themselves, minutes each on two cores: they run with `make test-slow`."""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, StableDiffusionPipeline
from PIL import Image

from diffusion_lessons.dreambooth.subject import instance_source, middle, read_pictures
from diffusion_lessons.metrics import DINOEncoder, diversity, prior_preservation, subject_fidelity
from diffusion_lessons.pictures.meadow import PLACES
from diffusion_lessons.stable_diffusion.drawing import draw


def pictures(grid: Path) -> np.ndarray:
    """The sixteen pictures of a sample grid, (16, 64, 64, 3), as floats from 0 to 255."""
    pixels = np.asarray(Image.open(grid).convert("RGB"), dtype=float)
    return pixels.reshape(4, 64, 4, 64, 3).transpose(0, 2, 1, 3, 4).reshape(16, 64, 64, 3)


def butterfly_marks(drawn: np.ndarray) -> dict[str, np.ndarray]:
    """What makes a picture of a specimen: white corners, a dark body, two sides of one shape, room taken, antennae."""
    edges = slice(0, 3), slice(-3, None)
    corners = np.stack([drawn[:, rows, columns] for rows in edges for columns in edges], axis=1)
    covered = drawn.min(axis=3) < 200
    overlap = (covered & covered[:, :, ::-1]).sum((1, 2)) / (covered | covered[:, :, ::-1]).sum((1, 2))
    return {
        "white": corners.mean((1, 2, 3, 4)),
        "body": drawn[:, 28:40, 30:34].mean((1, 2, 3)),
        "covered": covered.mean((1, 2)),
        "overlap": overlap,
        "colour": np.stack([picture[mask].mean(0) for picture, mask in zip(drawn, covered, strict=True)]),
    }


def make(target: str, checkout: Path) -> str:
    """Run `make TARGET` with as many threads as it likes; return what it printed."""
    environment = {name: value for name, value in os.environ.items() if not name.endswith("NUM_THREADS")}
    done = subprocess.run(["make", target], cwd=checkout, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_make_butterflies_draws_butterflies(checkout):
    make("butterflies", checkout)
    folder = checkout / "outputs" / "butterflies"
    grids = sorted((folder / "samples").glob("*.png"))
    assert len(grids) == 3
    marks = butterfly_marks(pictures(grids[-1]))
    assert np.median(marks["white"]) > 240 and (marks["white"] > 225).mean() > 0.8, "clean white around them"
    assert np.median(marks["body"]) < 110, "a dark body in the middle"
    assert 0.2 < np.median(marks["covered"]) < 0.6, "wings fill a good part of the picture"
    assert np.median(marks["overlap"]) > 0.75, "the two sides have one shape"
    assert marks["colour"].std(0).max() > 15, "they differ in colour"
    before = butterfly_marks(pictures(grids[0]))
    assert np.median(marks["overlap"]) > np.median(before["overlap"]), "and they became clearer while it learned"
    assert DDPMPipeline.from_pretrained(folder)(num_inference_steps=2).images[0].size == (64, 64)


def drawn_by(folder: Path, prompts: list[str]) -> torch.Tensor:
    """Pictures of the prompts, by plain diffusers' pipeline."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return draw(pipeline, prompts, seed=100)


@pytest.mark.slow
def test_make_dreambooth_teaches_the_subject_and_the_prior_keeps_the_class(checkout):
    from diffusion_lessons import miniature

    said = make("dreambooth", checkout)
    assert "keep checkpoint-" in said
    tuned, collapsed = checkout / "outputs" / "dreambooth", checkout / "outputs" / "dreambooth-without-prior"
    assert Image.open(tuned / "comparison.png").width > 1000
    encode = DINOEncoder("miniature")
    real = encode(middle(read_pictures(instance_source("meadow", 64), 64), 64))
    there = [f"a photo of a sks butterfly on {place}" for place in PLACES for _ in range(2)]
    of_class = ["a photo of a butterfly"] * 12
    folders = {"untouched": miniature.path(), "tuned": tuned, "collapsed": collapsed}
    fidelity = {name: subject_fidelity(encode(drawn_by(folder, there)), real) for name, folder in folders.items()}
    assert min(fidelity["tuned"], fidelity["collapsed"]) > 0.6 > 0.45 > fidelity["untouched"], fidelity
    drawn = {name: drawn_by(folder, of_class) for name, folder in folders.items()}
    left = {name: prior_preservation(encode(each), real) for name, each in drawn.items()}
    assert left["tuned"] < left["untouched"] + 0.2 and left["collapsed"] > left["tuned"] + 0.3, left
    apart = {name: diversity(each, encode.distance) for name, each in drawn.items()}
    assert apart["tuned"] > 1.3 * apart["collapsed"], apart

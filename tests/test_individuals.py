"""The benchmarks on individuals: the search for the course's subject, and the eye on pictures of tuned models."""
import json
import sys

import numpy as np
import pytest
import torch
from conftest import CHECKOUT

from diffusion_lessons.miniature import autoencoder
from diffusion_lessons.pictures import meadow
from diffusion_lessons.pictures.creatures import BACK, FRONT

sys.path.insert(0, str(CHECKOUT / "benchmarks"))
import eye
import subject

RESULTS = CHECKOUT / "benchmarks" / "results"


def test_the_course_teaches_the_butterfly_that_the_search_chose():
    found = json.loads((RESULTS / "subject.json").read_text(encoding="utf-8"))
    assert found["chosen"] == meadow.SUBJECT == found["finalists"][0]["seed"]
    fidelities = [row["fidelity"] for row in found["finalists"]]
    assert fidelities == sorted(fidelities, reverse=True) and len(fidelities) == 12
    look = meadow.subject_look()
    assert look.marks == FRONT["tip"] and look.hind_marks == BACK["star"]


def test_only_butterflies_with_marks_on_both_wings_take_part():
    taking_part = [seed for seed in range(60) if subject.has_marks(seed)]
    assert 3 < len(taking_part) < 30
    for seed in range(60):
        look = meadow.subject_look(seed)
        assert (seed in taking_part) == (look.marks != FRONT["plain"] and look.hind_marks == BACK["star"])


def test_the_survey_ranks_by_what_is_kept_and_by_distance(monkeypatch):
    """Two measures by hand: the best rank is that of the butterfly which is first in both."""
    decibels = {165: 30.0, 221: 20.0, 232: 25.0}
    monkeypatch.setattr(subject, "has_marks", lambda seed: seed in decibels)
    seen = iter(decibels.values())
    monkeypatch.setattr(subject, "reconstruct", lambda vae, pictures: pictures)
    monkeypatch.setattr(subject, "psnr", lambda *pictures: torch.tensor([next(seen)]))
    away = iter([(1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (0.5, 1.0)])  # the class first, then the three
    rows = subject.survey(300, None, lambda pictures: torch.tensor([next(away)]))
    assert [row["seed"] for row in rows] == [165, 232, 221] and [row["rank"] for row in rows] == [0, 2, 4]
    assert [round(row["distance"], 3) for row in rows] == [1, .553, .293]


def test_triples_of_what_two_models_drew():
    """Asked is what one drew; the same is a render elsewhere; the stranger is what the other drew in its stead."""
    drawn = {1: torch.arange(6, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 64, 64),
             2: torch.arange(10, 16, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 64, 64)}
    triples = eye.drawn_triples(drawn, (1, 2), number=1)
    assert len(triples.asked) == 2 * 6 * 25
    assert torch.equal(triples.asked[:150, 0, 0, 0] + 10, triples.stranger[:150, 0, 0, 0])
    assert torch.equal(triples.asked[150:], triples.stranger[:150])
    renders = subject.pixels_of(meadow.subject(30, 64, 1))
    asked_on_snow = triples.same[25:50]  # the second picture is on the second place
    assert torch.equal(asked_on_snow, renders[[at for at in range(30) if at % 6 != 1]])


def test_the_eyes_results_hold_what_is_claimed_of_it():
    found = json.loads((RESULTS / "eye.json").read_text(encoding="utf-8"))
    assert min(found["right"]["eye"].values()) > 0.9 and found["right"]["eye"]["as drawn"] > 0.95
    assert max(found["right"][name]["as drawn"] for name in ("CLIP", "judge")) < 0.2


@pytest.mark.parametrize("count", [1, 3])
def test_pictures_come_as_bytes(count):
    rows = meadow.subject(count, 32)
    pixels = subject.pixels_of(rows)
    assert pixels.shape == (count, 3, 32, 32) and pixels.dtype == torch.uint8
    np.testing.assert_array_equal(pixels[0, :, 5, 7], np.asarray(rows[0]["image"])[5, 7])
    assert autoencoder.psnr(pixels, pixels).isinf().all()

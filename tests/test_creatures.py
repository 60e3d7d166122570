"""Butterflies from tables, and the three other kinds."""
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.path import Path
from PIL import Image

from diffusion_lessons.pictures import creatures
from diffusion_lessons.pictures.creatures import (
    FOREWINGS,
    HINDWINGS,
    MARGINS,
    PATTERNS,
    Look,
    Marks,
    Wing,
    butterfly_shapes,
    random_look,
)
from diffusion_lessons.pictures.shapes import PALETTE, compose, fitted, spline, stretched, tinted

WINGS = {**FOREWINGS, **HINDWINGS}
OTHERS = {"beetle": creatures.beetle_shapes, "fish": creatures.fish_shapes, "flower": creatures.flower_shapes}


def pixels(shapes: list, size: int = 64, ground: str = "white") -> np.ndarray:
    picture = compose(fitted(shapes, .88, (.5, .5)), Image.new("RGB", (size, size), ground))
    return np.asarray(picture, dtype=float)


def wing_called(name: str) -> Wing:
    return Wing(spline(WINGS[name]), MARGINS.get(name, (.34, .76)))


@pytest.mark.parametrize("name", WINGS)
def test_wing_coordinates_stay_on_the_wing(name):
    wing = wing_called(name)
    along, out = np.random.default_rng(0).random((2, 1000))
    assert Path(wing.outline).contains_points(wing.at(along, .98 * out)).all()
    assert np.allclose(wing.at(along, 0 * out), wing.outline[0]), "out = 0 is the root"
    assert wing.outline[:, 0].min() > -.05, "the wing stays on its side"


@pytest.mark.parametrize("name", WINGS)
def test_coordinates_run_from_the_apex_outwards(name):
    wing = wing_called(name)
    radius = np.linalg.norm(wing.at(np.full(5, .4), np.linspace(0, 1, 5)) - wing.outline[0], axis=1)
    assert (np.diff(radius) > 0).all()
    assert wing.at(0, 1)[1] < wing.at(1, 1)[1], "the margin runs down the page"


def test_bands_follow_the_margin():
    wing = wing_called("rounded")
    band = wing.band(.5, .7, 0, 1, wave=0)
    assert np.allclose(band[0], wing.at(0, .7)) and np.allclose(band[-1], wing.at(0, .5))
    assert np.allclose(band[23], wing.at(1, .7)) and np.allclose(band[24], wing.at(1, .5))


@pytest.mark.parametrize("seed", range(12))
def test_a_spread_butterfly_is_its_own_mirror_image(seed):
    look = random_look(list(PALETTE)[seed % 10], np.random.default_rng(seed), two_tone=.5)
    picture = pixels(butterfly_shapes(look), 128)
    assert abs(picture - picture[:, ::-1]).mean() < 2


def test_wings_close_and_fold_over():
    look = random_look("blue", np.random.default_rng(0))
    extents = [np.concatenate([points for points, _ in butterfly_shapes(look, *[opening] * 2)])[:, 0].max()
               for opening in (1, .7, .4)]
    assert np.allclose(extents, np.array([1, .7, .4]) * extents[0], atol=.01)
    spread = np.concatenate([points for points, _ in butterfly_shapes(look, 1, 1)])
    folded = np.concatenate([points for points, _ in butterfly_shapes(look, -.8, 1)])
    assert spread[:, 0].min() < -.8 and folded[:, 0].min() > -.32, "both pairs on the right"


def test_two_wing_pairs_a_body_and_antennae_are_there():
    """The parts, read from the pixels of a red and blue butterfly with a dark body on green."""
    marks = Marks(veins=0, glow=0)
    look = Look("rounded", "fan", (255, 0, 0), (0, 0, 255), (20, 20, 20), (9, 9, 9), (9, 9, 9), marks)
    picture = pixels(butterfly_shapes(look), 64, "#00ff00")
    red, green, blue = (picture[..., channel] for channel in range(3))
    fore, hind = (red > 150) & (blue < 80) & (green < 80), (blue > 150) & (red < 80) & (green < 80)
    for side in (slice(0, 32), slice(32, 64)):
        assert fore[:, side].sum() > 200 and hind[:, side].sum() > 200
    assert np.nonzero(fore)[0].mean() < np.nonzero(hind)[0].mean(), "forewings above hindwings"
    dark = picture.max(axis=2) < 110
    assert dark[28:44, 30:34].mean() > .5, "a body in the middle"
    top = np.nonzero(dark.any(axis=1))[0].min()
    antennae = dark[top:top + 10, 20:44]
    assert antennae[:, :12].any(axis=1).sum() >= 5 and antennae[:, 12:].any(axis=1).sum() >= 5, "two antennae"


@pytest.mark.parametrize("name", PATTERNS)
def test_every_pattern_shows_and_none_is_the_subjects(name):
    assert PATTERNS[name].rays == 0 and PATTERNS[name].star == 0
    look = random_look("orange", np.random.default_rng(0))
    plain, marked = (pixels(butterfly_shapes(replace(look, marks=marks))) for marks in (Marks(), PATTERNS[name]))
    assert abs(plain - marked).mean() > .4


def test_looks_vary_and_repeat():
    rng = np.random.default_rng(0)
    looks = [random_look("pink", rng) for _ in range(300)]
    assert len({(look.forewing, look.hindwing) for look in looks}) == 25
    assert {look.marks for look in looks} == set(PATTERNS.values())
    assert len({look.fore for look in looks}) > 250
    assert random_look("pink", np.random.default_rng(5)) == random_look("pink", np.random.default_rng(5))


@pytest.mark.parametrize("colour", PALETTE)
def test_a_butterfly_without_two_tones_keeps_its_named_colour(colour):
    rng = np.random.default_rng(1)
    for _ in range(50):
        look = random_look(colour, rng)
        for wing in (look.fore, look.hind):
            nearest = min(PALETTE, key=lambda name: np.linalg.norm(np.subtract(PALETTE[name], wing)))
            assert nearest == colour


def test_two_tone_gives_other_hindwings():
    rng = np.random.default_rng(2)
    far = [np.linalg.norm(np.subtract(look.fore, look.hind)) > 80
           for look in (random_look("green", rng, two_tone=.5) for _ in range(200))]
    assert .3 < np.mean(far) < .7


@pytest.mark.parametrize("colour", PALETTE)
def test_even_a_pale_butterfly_has_an_edge_on_white(colour):
    for seed in range(8):
        picture = pixels(butterfly_shapes(random_look(colour, np.random.default_rng(seed))))
        paper = (picture > 254).all(axis=2)
        beside = paper & (np.roll(~paper, 1, 1) | np.roll(~paper, -1, 1))  # paper that touches the butterfly
        edge = ~paper & (np.roll(beside, 1, 1) | np.roll(beside, -1, 1))
        inside = np.minimum(picture, np.minimum(np.roll(picture, 1, 1), np.roll(picture, -1, 1)))[edge]
        assert (inside.mean(axis=1) < 190).mean() > .85, "nearly everywhere a dark pixel within one of the edge"


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("colour", PALETTE)
def test_the_other_kinds_show_their_colour(kind, colour):
    names = [name for name in PALETTE if name not in ("black", "white")] + [colour]
    hits = 0
    for seed in range(4):
        rng = np.random.default_rng(seed)
        picture = pixels(OTHERS[kind](tinted(colour, rng), rng), ground="#ff00ff")[12:46, 14:50].reshape(-1, 3)
        distance = np.linalg.norm(picture[:, None] - np.array([PALETTE[name] for name in names]), axis=2)
        near = distance.argmin(axis=1)[distance.min(axis=1) < 60]
        hits += names[np.bincount(near, minlength=len(names)).argmax()] == colour
    assert hits >= 3


@pytest.mark.parametrize("kind", OTHERS)
def test_the_other_kinds_vary_with_the_generator_only(kind):
    one, same, other = (pixels(OTHERS[kind]((200, 60, 60), np.random.default_rng(seed))) for seed in (1, 1, 3))
    assert np.array_equal(one, same) and abs(one - other).mean() > 1


def test_fish_swim_both_ways():
    def nose(seed):
        shapes = creatures.fish_shapes((200, 60, 60), np.random.default_rng(seed))
        return np.sign(shapes[-3][0][:, 0].mean())  # an eye
    assert {nose(seed) for seed in range(12)} == {-1, 1}


def test_beetles_are_symmetric_but_for_the_light():
    picture = pixels(creatures.beetle_shapes((60, 150, 60), np.random.default_rng(1)))
    assert abs(picture - picture[:, ::-1]).mean() < 12
    shapes = creatures.beetle_shapes((60, 150, 60), np.random.default_rng(1))
    mirrored = pixels(stretched(shapes, -1))
    assert abs(mirrored - picture[:, ::-1]).mean() < 2

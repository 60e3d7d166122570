"""The drawn world: captions, seeds, legibility, what is held out, and the one particular subject."""
import itertools
import os
import re
import subprocess
import sys
from dataclasses import replace

import datasets
import numpy as np
import pytest
from PIL import Image

from diffusion_lessons.engine.config import InputError
from diffusion_lessons.pictures import meadow
from diffusion_lessons.pictures.creatures import BACK, PATTERNS, butterfly_shapes, random_look, unusual_look
from diffusion_lessons.pictures.meadow import COLOURS, KINDS, PLACES, TRIPLES, caption, scenes, specimens, subject
from diffusion_lessons.pictures.shapes import PALETTE, compose, fitted


def arrays(pictures: datasets.Dataset) -> np.ndarray:
    return np.stack([np.asarray(picture) for picture in pictures["image"]])


def test_the_vocabulary_is_the_one_agreed():
    assert set(COLOURS) == set(PALETTE) and len(TRIPLES) == 240
    assert KINDS == ("butterfly", "beetle", "fish", "flower")
    assert PLACES == ("meadow", "snow", "sand", "sea", "sky", "night")


@pytest.mark.parametrize("triple", [("orange", "fish", "sea"), ("red", "butterfly", "meadow")])
def test_caption_grammar(triple):
    assert caption(*triple) == "a photo of a {} {} on {}".format(*triple)


@pytest.mark.parametrize(("make", "columns"), [
    (specimens, {"image", "caption", "colour", "kind", "place"}),
    (scenes, {"image", "caption", "colour", "kind", "place"}),
    (subject, {"image", "caption", "kind", "place"}),
])
def test_data_sets_have_their_columns_and_no_files(make, columns):
    drawn = make(7)
    assert isinstance(drawn, datasets.Dataset) and len(drawn) == 7 and set(drawn.column_names) == columns
    assert isinstance(drawn.features["image"], datasets.Image) and drawn.cache_files == []
    pattern = re.compile(r"a photo of a \w+ (butterfly|beetle|fish|flower) on \w+")
    for row in drawn:
        assert row["image"].mode == "RGB" and row["image"].size == (64, 64)
        assert pattern.fullmatch(row["caption"]) and row["kind"] in row["caption"]
        assert row["caption"].endswith(row["place"])


def test_captions_tell_the_attributes():
    for row in scenes(40, size=16):
        assert row["caption"] == caption(row["colour"], row["kind"], row["place"])


@pytest.mark.parametrize("make", [specimens, scenes, subject])
def test_a_seed_decides_everything_and_a_longer_set_starts_with_the_shorter(make):
    long, short, other = make(12, seed=3), make(5, seed=3), make(5, seed=4)
    assert np.array_equal(arrays(long)[:5], arrays(short)) and long["caption"][:5] == short["caption"]
    assert not np.array_equal(arrays(short), arrays(other))
    assert make(5, seed=3)._fingerprint == short._fingerprint != other._fingerprint


def test_another_process_draws_the_same():
    code = "from diffusion_lessons.pictures.meadow import scenes; print(scenes(6)._fingerprint)"
    environment = {**os.environ, "PYTHONHASHSEED": "77"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert run.stdout.split()[-1] == scenes(6)._fingerprint


def test_seeds_and_indices_have_nothing_in_common():
    pictures = np.concatenate([arrays(specimens(20, size=32, seed=seed)) for seed in range(3)])
    flat = pictures.reshape(60, -1)
    assert len(np.unique(flat, axis=0)) == 60


@pytest.mark.parametrize("size", [16, 32, 48, 64, 256, 1024])
def test_any_size_is_the_same_picture(size):
    one = specimens(1, size=size, seed=1)["image"][0]
    assert one.size == (size, size)
    reference = specimens(1, size=64, seed=1)["image"][0]
    shrunk = [np.asarray(picture.resize((16, 16), Image.Resampling.BOX), dtype=float) for picture in (one, reference)]
    assert abs(shrunk[0] - shrunk[1]).mean() < 5


def test_specimens_are_large_centred_on_clean_white_and_symmetric():
    ratios = []
    for picture in arrays(specimens(60)).astype(float):
        assert (picture[:3] == 255).all(axis=2).mean() > .9
        for corner in (picture[:4, :4], picture[:4, -4:], picture[-4:, :4], picture[-4:, -4:]):
            assert (corner == 255).all()
        rows, columns = np.nonzero((picture < 250).any(axis=2))
        assert .82 <= (max(np.ptp(rows), np.ptp(columns)) + 1) / 64 <= .94
        assert min(np.ptp(rows), np.ptp(columns)) > .5 * 64
        assert abs(rows.min() + rows.max() - 63) <= 4 and abs(columns.min() + columns.max() - 63) <= 4
        coarse = picture.reshape(16, 4, 16, 4, 3).mean(axis=(1, 3))  # a tilt of two degrees does not matter
        ratios.append(abs(coarse - coarse[:, ::-1]).mean() / abs(coarse - coarse[::-1]).mean())
    assert np.mean(ratios) < .3, "left and right agree, top and bottom do not"


def test_specimens_vary_in_colour_shape_and_pattern():
    drawer = specimens(200, size=32)
    counts = [drawer["colour"].count(colour) for colour in COLOURS]
    assert min(counts) > 5
    pictures = arrays(drawer).astype(float)
    covered = (pictures < 245).any(axis=3)
    assert covered.mean(axis=(1, 2)).std() > .03, "narrow wings and broad ones"
    nearest = []
    for index in range(60):
        distance = abs(pictures - pictures[index]).mean(axis=(1, 2, 3))
        nearest.append(np.sort(distance)[1])
    assert min(nearest) > 1, "no two are the same"


@pytest.mark.parametrize("colour", COLOURS)
def test_specimens_show_their_colour(colour):
    """Of the wing pixels that are no ink, the named colour has at least a good part."""
    shares = []
    for seed in range(6):
        picture = meadow.draw_specimen(colour, 64, np.random.default_rng(seed))
        pixels = np.asarray(picture.convert("RGB"), dtype=float).reshape(-1, 3)
        pixels = pixels[(pixels < 250).any(axis=1)]
        near = np.linalg.norm(pixels - PALETTE[colour], axis=1) < 75
        shares.append(near.mean())
    assert np.mean(shares) > .25


@pytest.fixture
def drawn_shapes(monkeypatch):
    """Collects the shapes of every scene that is composed."""
    collected = []

    def recording(shapes, *rest):
        collected.append(shapes)
        return compose(shapes, *rest)

    monkeypatch.setattr(meadow, "compose", recording)
    return collected


def contrast(picture: Image.Image, shapes: list) -> float:
    """How far subject and ground, or its rim and the halo around it, are apart in RGB: the larger of the two."""
    pixels, size = np.asarray(picture, dtype=float), picture.size
    on_black, on_white = (np.asarray(compose(shapes, Image.new("RGB", size, name)), dtype=int)
                          for name in ("black", "white"))
    covered = (on_white - on_black).mean(axis=2) < 128
    near = [np.roll(covered, shift, axis) for axis in (0, 1) for shift in (-2, -1, 1, 2)]
    rim, halo = covered & ~np.all(near, axis=0), ~covered & np.any(near, axis=0)
    rim, halo, inside, outside = (pixels[where].mean(axis=0) for where in (rim, halo, covered, ~covered & ~halo))
    return max(np.linalg.norm(inside - outside), np.linalg.norm(rim - halo))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", PLACES)
def test_every_subject_stands_out_from_its_place(kind, place, drawn_shapes):
    for colour in COLOURS:
        for seed in range(2):
            picture = meadow.draw_scene(kind, colour, place, 64, np.random.default_rng(seed))
            assert contrast(picture, drawn_shapes.pop()) > 40, colour


def test_places_can_be_read_from_the_border():
    def statistics(pictures):
        pixels = arrays(pictures).astype(float)
        frame = np.ones((64, 64), dtype=bool)
        frame[2:-2, 2:-2] = False
        return np.concatenate([pixels[:, frame].mean(axis=1), pixels[:, frame].std(axis=1)], axis=1)

    known, new = scenes(120, seed=8), scenes(120, seed=9)
    centres = np.stack([statistics(known)[np.array(known["place"]) == place].mean(axis=0) for place in PLACES])
    read = np.linalg.norm(statistics(new)[:, None] - centres, axis=2).argmin(axis=1)
    assert np.mean([PLACES[index] == place for index, place in zip(read, new["place"], strict=True)]) > .97


def test_scenes_cut_nothing_off(drawn_shapes):
    """Whatever the pose, the drawing lies within the frame."""
    for seed in range(60):
        rng = np.random.default_rng(seed)
        meadow.draw_scene(KINDS[seed % 4], COLOURS[seed % 10], PLACES[seed % 6], 16, rng)
        points = np.concatenate([points for points, _ in drawn_shapes.pop()])
        assert points.min() >= .019 and points.max() <= .981
        assert .6 < np.ptp(points, axis=0).max() < .87


def test_butterflies_take_many_poses():
    look = random_look("red", np.random.default_rng(0))
    ratios, folded = [], 0
    for seed in range(80):
        points = np.concatenate([points for points, _ in meadow.posed(look, np.random.default_rng(seed))])
        width, height = np.ptp(points, axis=0)
        ratios.append(width / height)
        folded += meadow.posed(look, np.random.default_rng(seed))[0][1] != \
            meadow.butterfly_shapes(look)[0][1]  # the far pair is darker
    assert min(ratios) < .75 and max(ratios) > 1.2 and 6 <= folded <= 30


def test_all_words_occur_about_equally_often():
    world = scenes(400, size=16)
    for column, words in (("colour", COLOURS), ("kind", KINDS), ("place", PLACES)):
        counts = np.array([world[column].count(word) for word in words])
        expected = 400 / len(words)
        assert (abs(counts - expected) < 4 * np.sqrt(expected)).all()


def test_words_can_be_restricted():
    world = scenes(30, size=16, colours=["red", "blue"], kinds=["fish"], places=["sea", "sky"])
    assert set(world["colour"]) == {"red", "blue"} and set(world["kind"]) == {"fish"}
    assert set(world["place"]) == {"sea", "sky"}


def test_excluded_triples_do_not_occur_and_nothing_else_changes():
    exclude = {triple for triple in TRIPLES if triple[0] == "red" or triple[1:] == ("fish", "sea")}
    everything, without = scenes(120, size=16), scenes(120, size=16, exclude=exclude)
    drawn = list(zip(without["colour"], without["kind"], without["place"], strict=True))
    assert not exclude & set(drawn)
    kept = [index for index, row in enumerate(everything.remove_columns("image"))
            if (row["colour"], row["kind"], row["place"]) not in exclude]
    assert 60 < len(kept) < 120
    assert np.array_equal(arrays(everything)[kept], arrays(without)[kept])
    assert [everything["caption"][index] for index in kept] == [without["caption"][index] for index in kept]


def test_lists_of_triples_work_as_well_as_tuples():
    exclude = [list(triple) for triple in TRIPLES if triple[1] != "fish"]
    assert set(scenes(10, size=16, exclude=exclude)["kind"]) == {"fish"}


def test_asked_for_attributes_are_drawn_in_order():
    wanted = list(itertools.islice(TRIPLES, 0, 240, 31))
    world = scenes(999, size=16, attributes=wanted)
    assert list(zip(world["colour"], world["kind"], world["place"], strict=True)) == wanted
    assert np.array_equal(arrays(world), arrays(scenes(size=16, attributes=wanted)))


@pytest.mark.parametrize(("call", "says"), [
    (lambda: scenes(2, kinds=["dragon"]), "kinds.*dragon.*butterfly"),
    (lambda: scenes(2, colours=[]), "colours.*empty"),
    (lambda: scenes(2, places=["moon"]), "places.*moon"),
    (lambda: scenes(2, exclude=TRIPLES), "exclude.*nothing"),
    (lambda: scenes(2, exclude=[("fish", "red", "sea")]), "exclude.*fish"),
    (lambda: scenes(2, attributes=[("red", "fish")]), "attributes.*red"),
    (lambda: scenes(2, size=4), "size.*4"),
    (lambda: specimens(2, size=0), "size.*0"),
    (lambda: subject(2, places=[]), "places.*empty"),
    (lambda: subject(2, places=["mars"]), "places.*mars"),
    (lambda: meadow.draw_specimen("beige", 32, np.random.default_rng(0)), "colour.*beige"),
    (lambda: meadow.draw_scene("cat", "red", "sea", 32, np.random.default_rng(0)), "kind.*cat"),
])
def test_what_cannot_be_drawn_is_refused_in_one_line(call, says):
    with pytest.raises(InputError, match=says) as error:
        call()
    assert "\n" not in str(error.value)


def test_the_subject_is_one_individual():
    assert meadow.subject_look(4) == meadow.subject_look(4)
    looks = {meadow.subject_look(seed) for seed in range(60)}
    assert len(looks) > 40
    for look in looks:
        assert look.marks not in PATTERNS.values() and look.hind_marks not in PATTERNS.values()
        for first, second in itertools.combinations((look.fore, look.hind, look.accent), 2):
            assert np.linalg.norm(np.subtract(first, second)) > 70


def test_hindwings_may_have_marks_of_their_own():
    def drawn(look):
        shapes = fitted(butterfly_shapes(look), .9, (.5, .5))
        return np.asarray(compose(shapes, Image.new("RGB", (128, 128), "white"))).astype(int)

    look = unusual_look(np.random.default_rng(0), marks=("tip", "star"))
    bare, same = drawn(replace(look, hind_marks=BACK["plain"])), drawn(replace(look, hind_marks=None))
    rows = np.flatnonzero(abs(drawn(look) - bare).max(axis=(1, 2)) > 40)
    assert len(rows) and rows.min() > 50, "only the hindwings, which lie in the lower half, have changed"
    np.testing.assert_array_equal(same, drawn(replace(look, hind_marks=look.marks)))


def test_the_subject_shows_its_colours_in_every_picture():
    look = meadow.subject_look(meadow.SUBJECT)
    for picture in arrays(subject(18, size=128)).astype(float):
        for colour in (look.fore, look.hind):
            assert (np.linalg.norm(picture - colour, axis=2) < 60).mean() > .008


def test_no_scene_shows_both_of_the_subjects_colours():
    """A natural butterfly has one colour: one of the two is rare on any that is not the subject."""
    look = meadow.subject_look(meadow.SUBJECT)

    def least(picture):
        return min((np.linalg.norm(picture - colour, axis=2) < 45).mean() for colour in (look.fore, look.hind))

    ours = [least(picture) for picture in arrays(subject(12, size=128)).astype(float)]
    others = [least(picture) for picture in arrays(scenes(40, size=128, kinds=["butterfly"])).astype(float)]
    assert np.median(ours) > 4 * max(others)


def test_the_subject_goes_round_the_places_under_its_name():
    drawn = subject(4, places=["sea", "night"], name="zwx")
    assert drawn["place"] == ["sea", "night", "sea", "night"]
    assert drawn["caption"][1] == "a photo of a zwx butterfly on night"

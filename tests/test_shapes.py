"""The drawing kit: curves, strokes, gradients, soft edges, poses."""
import itertools

import numpy as np
import pytest
from PIL import Image

from diffusion_lessons.pictures import shapes
from diffusion_lessons.pictures.shapes import (
    PALETTE,
    bezier,
    compose,
    disc,
    fitted,
    grown,
    mix,
    paint,
    shaded,
    spline,
    stroke,
)


def paper(size: int, colour: str = "white") -> Image.Image:
    return Image.new("RGB", (size, size), colour)


def area(outline: np.ndarray) -> float:
    x, y = outline.T
    return abs(np.sum(x * np.roll(y, -1) - y * np.roll(x, -1))) / 2


def covered(picture: Image.Image) -> float:
    return 1 - np.asarray(picture.convert("L")).mean() / 255


@pytest.mark.parametrize("size", [32, 64, 128, 256, 512, 1024])
def test_edges_are_soft_at_every_size(size):
    outline = disc((.5, .5), .37)
    picture = compose([(outline, (0, 0, 0))], paper(size))
    assert picture.size == (size, size) and picture.mode == "RGB"
    values = np.unique(np.asarray(picture))
    assert {0, 255} <= set(values.tolist()) and len(values) >= 5
    # What is left is Pillow's outline, half a small pixel wide all round.
    assert covered(picture) == pytest.approx(area(outline), rel=.7 / size / .37)


def test_painting_covers_in_order():
    picture = paint([(disc((.5, .5), .4), (255, 0, 0)), (disc((.5, .5), .2), (0, 255, 0))], paper(32))
    assert picture.getpixel((16, 16)) == (0, 255, 0) and picture.getpixel((26, 16)) == (255, 0, 0)
    assert picture.getpixel((0, 0)) == (255, 255, 255)


def test_compose_leaves_the_background_as_it_was():
    ground = paper(32)
    compose([(disc((.5, .5), .4), (0, 0, 0))], ground, (255, 0, 0))
    assert ground.getcolors() == [(32 * 32, (255, 255, 255))]


def test_halo_lies_outside_and_under_the_shape():
    shape = [(disc((.5, .5), .25), (10, 200, 30))]
    plain, halo = compose(shape, paper(64)), compose(shape, paper(64), (0, 0, 255))
    assert plain.getpixel((32, 32)) == halo.getpixel((32, 32)) == (10, 200, 30)
    outside = halo.getpixel((32 + 18, 32))
    assert outside[0] < 235 and outside[2] == 255, "bluish two pixels away"
    assert halo.getpixel((2, 2)) == (255, 255, 255), "and gone further out"


def test_spline_goes_through_its_knots_without_kinks():
    knots = np.random.default_rng(0).random((7, 2))
    curve = spline(knots)
    assert curve.shape == (56, 2) and np.allclose(curve[::8], knots)
    angles = np.linspace(0, 2 * np.pi, 8, endpoint=False)
    circle = spline(np.stack([np.cos(angles), np.sin(angles)], axis=1))
    directions = np.diff(np.concatenate([circle, circle[:2]]), axis=0)
    turns = np.arctan2(directions[:, 1], directions[:, 0])
    turns = np.abs((np.diff(turns) + np.pi) % (2 * np.pi) - np.pi)
    assert np.degrees(turns.max()) < 12, "a polygon through eight knots would turn by 45 degrees"


def test_bezier_and_stroke():
    line = bezier((0, 0), (1, 2), (2, 0), samples=9)
    assert np.allclose(line[[0, 4, 8]], [(0, 0), (1, 1), (2, 0)]), "half of the way to the control, in the middle"
    outline = stroke(line, .3, .1)
    widths = np.linalg.norm(outline[:9] - outline[:8:-1], axis=1)
    assert np.allclose(widths, np.linspace(.3, .1, 9))


def test_strokes_of_many_lines_equal_strokes_of_each():
    ends = np.random.default_rng(0).random((3, 5, 2))
    together = stroke(bezier(*ends), .1, .02)
    for index in range(5):
        assert np.allclose(together[index], stroke(bezier(*ends[:, index]), .1, .02))


def test_a_stroke_of_no_length_is_finite():
    assert np.isfinite(stroke(np.zeros((4, 2)), .1, .1)).all()


def test_star_and_disc():
    outline = shapes.star((1, 2), .5, points=6)
    radii = np.linalg.norm(outline - (1, 2), axis=1)
    assert len(outline) == 12 and np.allclose(radii[::2], .5) and radii[1::2].max() < .25
    assert outline[0] == pytest.approx((1, 1.5)), "the first point is up"
    assert np.allclose(np.ptp(disc((0, 0), 2, 1), axis=0), (4, 2), rtol=.01)


def test_the_ten_colours_keep_their_distance():
    assert len(PALETTE) == 10
    for first, second in itertools.combinations(PALETTE.values(), 2):
        assert np.linalg.norm(np.subtract(first, second)) > 70


def test_mixing_and_tinting():
    assert mix((0, 100, 200), (100, 0, 200), .25) == (25, 75, 200)
    rng = np.random.default_rng(0)
    for name, colour in PALETTE.items():
        tints = np.array([shapes.tinted(name, rng, 12) for _ in range(200)])
        limit = 6 if name in ("black", "white") else 12
        assert tints.min() >= 0 and tints.max() <= 255
        assert np.abs(tints - colour).max() <= limit and np.ptp(tints, axis=0).min() > limit / 2


def test_shading_runs_from_the_edge_inwards():
    outline = disc((0, 0), 1)
    copies = shaded(outline, (0, 0), (0, 0, 0), (100, 100, 100), (0, 0, 0), steps=8)
    assert np.array_equal(copies[0][0], outline) and copies[0][1] == (0, 0, 0)
    extents = [np.ptp(points) for points, _ in copies]
    assert extents == sorted(extents, reverse=True)
    assert [fill[0] for _, fill in copies] == [0, 25, 50, 75, 100, 75, 50, 25]


def test_growing_keeps_the_centre():
    square = np.array([(1., 1.), (3., 1.), (3., 3.), (1., 3.)])
    assert np.allclose(grown(square, 2).mean(axis=0), (2, 2)) and np.ptp(grown(square, 2)[:, 0]) == 4
    assert np.allclose(grown(square, .5, (1, 1))[0], (1, 1))


def test_turning_is_clockwise_on_the_page_and_undone_by_its_opposite():
    arrow = [(np.array([(1., 0.), (0., 0.)]), (0, 0, 0))]
    assert np.allclose(shapes.turned(arrow, np.pi / 2)[0][0][0], (0, 1))
    there_and_back = shapes.turned(shapes.turned(arrow, .7), -.7)
    assert np.allclose(there_and_back[0][0], arrow[0][0])
    assert np.allclose(shapes.stretched(arrow, -1)[0][0][0], (-1, 0))


@pytest.mark.parametrize("angle", [0, .5, 2, 4])
def test_fitting_fills_the_frame_and_cuts_nothing(angle):
    drawing = shapes.turned([(disc((3, 4), 2, .5), (0, 0, 0)), (disc((5, 4), .1), (1, 1, 1))], angle)
    points = np.concatenate([points for points, _ in fitted(drawing, .8, (.5, .4))])
    low, high = points.min(axis=0), points.max(axis=0)
    assert (high - low).max() == pytest.approx(.8) and np.allclose((low + high) / 2, (.5, .4))

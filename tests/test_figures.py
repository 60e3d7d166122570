import ast
import math
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_lessons.pictures.figures import (
    denoising_strip,
    make_grid,
    plot_curves,
    running_mean,
    show_images,
    to_pil,
    to_pil_list,
    to_pixels,
    with_sliders,
)


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


def as_model(pixels: np.ndarray) -> torch.Tensor:
    return (torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1).float()


def test_every_layout_gives_the_same_picture(pixels):
    first = np.ascontiguousarray(pixels.transpose(2, 0, 1))
    for picture in (pixels, first, torch.from_numpy(pixels), torch.from_numpy(first), as_model(pixels)):
        assert np.array_equal(np.asarray(to_pil(picture)), pixels)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_pixel_value_survives_the_round_trip(dtype):
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert np.array_equal(to_pixels((torch.from_numpy(values) / 127.5 - 1).to(dtype)), values)


def test_values_outside_the_range_are_clipped():
    assert to_pixels(torch.tensor([[-7.0, -1.0, 0.0, 1.0, 7.0]])).tolist() == [[0, 0, 128, 255, 255]]
    assert to_pixels(torch.tensor([[math.inf, -math.inf]])).tolist() == [[255, 0]]


def test_ambiguous_layouts_follow_the_kind_of_container():
    square = np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    assert np.array_equal(to_pixels(square), square)
    assert np.array_equal(to_pixels(torch.from_numpy(square)), square.transpose(1, 2, 0))


def test_grey_and_transparent_pictures_keep_their_mode():
    assert to_pil(torch.zeros(1, 4, 6)).mode == "L" and to_pil(torch.zeros(1, 4, 6)).size == (6, 4)
    assert to_pil(np.zeros((4, 6), np.uint8)).mode == "L"
    assert to_pil(np.zeros((4, 6, 4), np.uint8)).mode == "RGBA"


def test_a_tensor_that_requires_grad_can_be_shown():
    assert to_pil(torch.zeros(3, 4, 4, requires_grad=True)).getpixel((0, 0)) == (128, 128, 128)


@pytest.mark.parametrize(
    ("picture", "word"),
    [
        (torch.zeros(4, 8, 8), "channels"),
        (torch.zeros(2, 3, 8, 8), "shape"),
        (torch.zeros(8, 8, dtype=torch.int64), "int64"),
        (np.zeros((8, 8), dtype=bool), "bool"),
        (torch.full((3, 8, 8), math.nan), "NaN"),
    ],
)
def test_what_is_not_a_picture_is_refused(picture, word):
    with pytest.raises(ValueError, match=word):
        to_pixels(picture)


def test_grid_fills_rows_first_and_leaves_white():
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    grid = make_grid([Image.new("RGB", (4, 2), colour) for colour in colours], rows=2, cols=2)
    assert grid.size == (8, 4)
    assert [grid.getpixel(place) for place in [(0, 0), (4, 0), (0, 2), (4, 2)]] == [*colours, (255, 255, 255)]


def test_grid_takes_a_batch(pixels):
    batch = torch.stack([as_model(pixels), as_model(255 - pixels)])
    grid = np.asarray(make_grid(batch, rows=1, cols=2))
    assert np.array_equal(grid, np.concatenate([pixels, 255 - pixels], axis=1))


@pytest.mark.parametrize(
    ("sizes", "word"), [([], "0 images"), ([4] * 5, "5 images"), ([4, 4, 5], "Image 2")], ids=["none", "many", "mixed"]
)
def test_grid_refuses_what_does_not_fit(sizes, word):
    with pytest.raises(ValueError, match=word):
        make_grid([Image.new("RGB", (size, size)) for size in sizes], rows=2, cols=2)


def test_single_pictures_and_batches_become_lists(pixels):
    assert len(to_pil_list(to_pil(pixels))) == 1
    assert len(to_pil_list(as_model(pixels))) == 1
    assert [picture.size for picture in to_pil_list(torch.zeros(3, 3, 4, 6))] == [(6, 4)] * 3


def test_images_stand_in_rows_with_their_titles():
    show_images(torch.zeros(5, 3, 8, 8), titles=range(5), cols=3, title="five")
    axes = plt.gcf().axes
    assert [ax.get_title() for ax in axes] == ["0", "1", "2", "3", "4"]
    columns = {round(ax.get_position().x0, 6) for ax in axes}
    rows = {round(ax.get_position().y0, 6) for ax in axes}
    assert (len(columns), len(rows)) == (3, 2)
    assert plt.gcf().get_suptitle() == "five"


def test_pictures_do_not_overlap_their_titles():
    show_images(torch.zeros(6, 3, 8, 8), titles=["two\nlines"] * 6, cols=3, title="above")
    figure = plt.gcf()
    figure.canvas.draw()
    boxes = [ax.get_window_extent() for ax in figure.axes] + [ax.title.get_window_extent() for ax in figure.axes]
    boxes.append(figure._suptitle.get_window_extent())
    for index, box in enumerate(boxes):
        assert not any(box.padded(-0.5).overlaps(other.padded(-0.5)) for other in boxes[index + 1 :])


def test_grey_pictures_are_shown_on_the_full_scale():
    show_images([np.full((4, 4), 100, np.uint8)])
    assert plt.gca().images[0].get_clim() == (0, 255)


def test_titles_and_labels_must_match_the_images():
    with pytest.raises(ValueError, match="2 titles for 3 images"):
        show_images(torch.zeros(3, 3, 4, 4), titles=["a", "b"])
    with pytest.raises(ValueError, match="1 labels for 3 frames"):
        denoising_strip(torch.zeros(3, 3, 4, 4), ["a"], "strip")


def test_curves_take_values_pairs_and_tensors():
    plot_curves(
        {"values": [3.0, 2.0, 1.0], "pair": ([0, 10], [1.0, 2.0]), "tensor": torch.ones(4), "two": (5.0, 6.0)},
        "step", "loss", "title", log_y=True,
    )
    ax = plt.gca()
    lines = {line.get_label(): line.get_xydata().tolist() for line in ax.lines}
    assert lines["values"] == [[0, 3], [1, 2], [2, 1]]
    assert lines["pair"] == [[0, 1], [10, 2]]
    assert lines["tensor"] == [[i, 1] for i in range(4)]
    assert lines["two"] == [[0, 5], [1, 6]]
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_title(), ax.get_yscale()) == ("step", "loss", "title", "log")


def test_curves_draw_into_given_axes():
    figure, axes = plt.subplots(1, 2)
    plot_curves({"a": [1, 2]}, "x", "y", "left", ax=axes[0])
    assert len(axes[0].lines) == 1 and not axes[1].lines
    assert plt.get_fignums() == [figure.number]


def test_strip_is_one_row_with_labels_below():
    denoising_strip(list(torch.zeros(4, 3, 8, 8)), [999, 600, 300, 0], "out of the noise")
    axes = plt.gcf().axes
    assert [ax.get_xlabel() for ax in axes] == ["999", "600", "300", "0"]
    assert len({round(ax.get_position().y0, 6) for ax in axes}) == 1


def test_running_mean_agrees_with_the_plain_definition():
    values = np.random.default_rng(0).normal(size=50)
    expected = [values[max(0, i - 6) : i + 1].mean() for i in range(50)]
    assert np.allclose(running_mean(values, window=7), expected)
    assert running_mean([], window=3).tolist() == []
    with pytest.raises(ValueError, match="window"):
        running_mean(values, window=0)


def test_sliders_draw_at_once_and_whenever_one_is_moved(monkeypatch):
    ipywidgets = pytest.importorskip("ipywidgets", reason="sliders are ipywidgets'")
    made, seen = [], []
    interact = ipywidgets.interact
    monkeypatch.setattr(ipywidgets, "interact", lambda draw, **ranges: made.append(interact(draw, **ranges)))

    def draw(t: int = 50, scale: float = 1.0) -> None:
        seen.append((t, scale))

    with_sliders(draw, t=(0, 999), scale=(0.0, 2.0, 0.1))
    assert seen == [(50, 1.0)], "where the defaults are"
    slider = made[0].widget.children[0]
    assert (slider.min, slider.max) == (0, 999)
    slider.value = 700
    assert seen[1:] == [(700, 1.0)]


def test_without_ipywidgets_a_lesson_goes_on(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with_sliders(lambda t=50: pytest.fail("drawn"), t=(0, 999))
    assert "pip install ipywidgets" in capsys.readouterr().out


def test_every_slider_of_the_lessons_draws_with_its_defaults():
    """What the cell calls exists in its lesson, and each slider has a default within its range."""
    found = 0
    for path in sorted((Path(__file__).resolve().parent.parent / "nbs").rglob("[0-9]*.ipynb")):
        cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
        for cell in (cell for cell in cells if "with_sliders(" in cell.source):
            calls = [node for node in ast.walk(ast.parse(cell.source)) if isinstance(node, ast.Call)]
            for call in (call for call in calls if getattr(call.func, "id", "") == "with_sliders"):
                draw = next(node for node in ast.parse(cell.source).body if isinstance(node, ast.FunctionDef))
                assert call.args[0].id == draw.name, path.stem
                defaults = dict(zip([each.arg for each in draw.args.args], map(ast.literal_eval, draw.args.defaults),
                                    strict=True))  # fmt: skip
                ranges = {each.arg: ast.literal_eval(each.value) for each in call.keywords}
                assert ranges.keys() == defaults.keys(), path.stem
                assert all(low <= defaults[name] <= high for name, (low, high, *_) in ranges.items()), path.stem
                found += 1
    assert found >= 4

"""Any set of pictures: folders, data sets, the meadow; what is refused, what is skipped, what is stored."""

import io
import logging
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_lessons.engine.config import InputError
from diffusion_lessons.pictures import meadow
from diffusion_lessons.pictures import sets as module
from diffusion_lessons.pictures.files import fit_square, open_image
from diffusion_lessons.pictures.sets import dataset_source, folder_source, load_images, mapped, write_whole


def png_bytes(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def gray(level: int, size: tuple[int, int] = (12, 8)) -> Image.Image:
    return Image.new("RGB", size, (level, level, level))


def levels(images) -> list[int]:
    """The gray level of each picture."""
    return images[:]["images"][:, 0, 0, 0].tolist()


@pytest.fixture
def folder(tmp_path) -> Path:
    """Five gray pictures, named so that their order is that of their levels."""
    place = tmp_path / "photos"
    for index, name in enumerate(["a.png", "b 1.png", "class/c.png", "class/d.PNG", "나비.png"]):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        gray(10 * index).save(place / name)
    return place


# --- sources


def test_a_folder_in_its_order(folder):
    images = load_images("imagefolder", folder, 8)
    assert levels(images) == [0, 10, 20, 30, 40] and images.pixels.shape == (5, 3, 8, 8)
    assert [Path(name).name for name in images.names] == ["a.png", "b 1.png", "c.png", "d.PNG", "나비.png"]
    assert levels(load_images("meadow", str(folder), 8)) == levels(images), "a folder goes before the default"
    assert levels(load_images(None, folder, 8, num_images=2)) == [0, 10]


@pytest.mark.parametrize("resize", ["crop", "squeeze", "pad"])
def test_the_pixels_are_those_of_one_picture_at_a_time(shared_data, resize):
    images = load_images("imagefolder", shared_data / "butterflies", 32, resize=resize)
    assert len(images) == 92 and not images.skipped
    for index in (0, 45, 91):
        image = fit_square(open_image(images.names[index], near_size=128), 32, resize)
        assert np.array_equal(images.pixels[index].transpose(1, 2, 0), np.asarray(image))


def test_nothing_trains_sideways(shared_data):
    images = load_images("imagefolder", shared_data / "nasty", 64, resize="squeeze")
    names = [Path(name).name for name in images.names]
    index = names.index("exif_rotated_90.jpg")
    stored = Image.open(shared_data / "nasty" / names[index]).convert("RGB").resize((64, 64), Image.Resampling.BILINEAR)
    turned = np.rot90(np.asarray(stored).astype(int), -1)
    ours = images.pixels[index].transpose(1, 2, 0)
    assert np.abs(ours - turned).mean() < 2 < 5 < np.abs(ours - np.asarray(stored).astype(int)).mean()


def test_the_meadow_is_drawn_from_its_seed():
    few = load_images("meadow", image_size=16, num_images=3, seed=7)
    more = load_images(image_size=16, num_images=5, seed=7)
    assert np.array_equal(few.pixels, more.pixels[:3])
    assert few.fingerprint != load_images(image_size=16, num_images=3, seed=8).fingerprint
    drawn = np.stack([np.asarray(row["image"]) for row in meadow.specimens(3, 16, 7)])
    assert np.array_equal(few.pixels.transpose(0, 2, 3, 1), drawn)


def test_a_thousand_pictures_by_default():
    assert len(module.find_source("meadow", None, 16, None, None, None, 0).names) == 1000


def test_a_data_set_is_decoded_by_our_rules():
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    exif = Image.Exif()
    exif[274] = 6
    sideways = io.BytesIO()
    half = gray(0)
    half.paste((255, 255, 255), (0, 0, 6, 8))
    half.save(sideways, "PNG", exif=exif)
    rows = [{"bytes": content, "path": None} for content in (png_bytes(clear), sideways.getvalue())]
    dataset = datasets.Dataset.from_dict({"picture": rows}).cast_column("picture", datasets.Image())
    source = dataset_source(dataset, "someone/set")
    fetch = source.open()
    first, second = (open_image(fetch(row), source.names[row]) for row in range(2))
    assert first.getpixel((0, 0)) == (255, 255, 255)
    assert second.size == (8, 12) and second.getpixel((4, 0)) == (255,) * 3 and second.getpixel((4, 11)) == (0,) * 3


def test_the_column_is_found_or_named():
    images = datasets.Features({"left": datasets.Image(), "right": datasets.Image(), "label": datasets.Value("int64")})
    row = {"bytes": png_bytes(gray(1)), "path": None}
    both = datasets.Dataset.from_dict({"left": [row], "right": [row], "label": [1]}, features=images)
    with pytest.raises(InputError, match=r"--dataset_name x/y: 2 of its columns \['left', 'right', 'label'\].*rename"):
        dataset_source(both, "x/y")
    assert len(dataset_source(both.remove_columns("left"), "x/y").names) == 1
    assert len(dataset_source(both.rename_column("right", "image"), "x/y").names) == 1
    with pytest.raises(InputError, match="0 of its columns"):
        dataset_source(both.select_columns("label"), "x/y")


def test_bad_rows_are_named(monkeypatch):
    rows = [{"bytes": content, "path": None} for content in (png_bytes(gray(5)), b"nonsense")] + [None]
    features = datasets.Features({"image": datasets.Image()})
    dataset = datasets.Dataset.from_dict({"image": rows}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: dataset)
    with pytest.raises(InputError, match=r"some/set row 1: is no readable picture.*row 2: is empty.*on_bad_image skip"):
        load_images("some/set", image_size=8)
    images = load_images("some/set", image_size=8, on_bad_image="skip")
    assert levels(images) == [5] and len(images.skipped) == 2


def test_a_saved_parquet_file_as_a_local_data_set(tmp_path):
    rows = [{"bytes": png_bytes(gray(level)), "path": None} for level in (3, 4)]
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": rows}, features=features).to_parquet(tmp_path / "set" / "train.parquet")
    images = load_images(str(tmp_path / "set"), image_size=4, cache_dir=str(tmp_path / "cache"))
    assert levels(images) == [3, 4] and images.names[1].endswith("set row 1")


def layout(place: Path, names: list[str]) -> Path:
    for index, name in enumerate(names):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        gray(index).save(place / name)
    return place


def taken(place: Path, **options) -> list[str]:
    return [Path(name).relative_to(place).as_posix() for name in folder_source(place, **options).names]


@pytest.mark.parametrize(
    "names",
    [
        ["train/a.png", "test/b.png", "c.png"],
        ["train/cat/a.png", "train/dog/b.png", "validation/cat/c.png"],
        ["training/a.png", "val/b.png", "dev/c.png", "eval/d.png"],
        ["cats-train/a.png", "train 2/b.png", "trained/c.png", "Train/d.png", "my_test.set/e.png"],
        ["deep/er/train/a.png", "deep/er/test/b.png"],
        ["cat/a.png", "dog/b.png", "tests/c.png", "evaluate/d.png", "latest/e.png"],
        ["train/test/a.png", "train/b.png"],
        ["a.png", "b.png"],
    ],
)  # fmt: skip
def test_the_train_split_is_that_of_imagefolder(tmp_path, names):
    place = layout(tmp_path / "photos", names)
    theirs = datasets.load_dataset("imagefolder", data_dir=str(place), split="train", cache_dir=str(tmp_path / "cache"))
    files = [cell["path"] for cell in theirs.cast_column("image", datasets.Image(decode=False))["image"]]
    assert sorted(taken(place)) == sorted(Path(file).relative_to(place).as_posix() for file in files)


def test_folders_for_tests_are_left_out_and_it_is_said(tmp_path, capsys):
    place = layout(tmp_path / "photos", ["a.png", "cat/b.png", "test/c.png", "validation/d.png", "eval 1.png"])
    images = load_images("imagefolder", place, 8)
    assert [Path(name).name for name in images.names] == ["a.png", "b.png", "eval 1.png"]
    assert capsys.readouterr().out == (
        f"note: 2 of 5 pictures in {place} are left out: they lie in folders for validation or tests\n")  # fmt: skip
    load_images("imagefolder", layout(tmp_path / "other", ["train/a.png", "b.png"]), 8)
    assert "1 of 2 pictures" in (said := capsys.readouterr().out) and "in no `train` folder" in said
    with pytest.raises(InputError, match="--train_data_dir .*no picture to train on; 1 of 1 pictures .*test"):
        load_images("imagefolder", layout(tmp_path / "third", ["test/a.png"]), 8)
    assert taken(place / "test") == ["c.png"], "named itself, it is what somebody wants"
    load_images("imagefolder", place / "cat", 8)
    assert capsys.readouterr().out == ""


def test_the_subjects_folder_has_no_splits(tmp_path):
    place = layout(tmp_path / "dog", ["a.png", "test/b.png", "train/c.png"])
    source = folder_source(place, flag="instance_data_dir", splits=False)
    assert len(source.names) == 3
    assert source.notes == [f"2 of 3 pictures lie in sub-folders of {place} (test, train) and are used, too"]


def test_pictures_without_a_suffix_are_named(tmp_path, capsys):
    place = layout(tmp_path / "photos", ["a.png", "b.PNG"])
    (place / "IMG_0001").write_bytes(png_bytes(gray(1)))
    (place / "LICENSE").write_text("no picture")
    assert len(load_images("imagefolder", place, 8)) == 2
    assert f"note: pictures without a suffix are passed over: 1 in {place} (IMG_0001)" in capsys.readouterr().out
    for path in place.glob("*.*"):
        path.unlink()
    with pytest.raises(InputError, match="no picture to train on; pictures without a suffix .*rename them"):
        load_images("imagefolder", place, 8)


# --- refusals


def test_wrong_folders(tmp_path):
    (tmp_path / "file.txt").write_text("text")
    (tmp_path / "empty").mkdir()
    (tmp_path / "hidden" / ".ipynb_checkpoints").mkdir(parents=True)
    gray(1).save(tmp_path / "hidden" / ".ipynb_checkpoints" / "a.png")
    (tmp_path / "hidden" / ".DS_Store").write_bytes(b"\x00")
    for name, reason in [("missing", "no such folder"), ("file.txt", "is a file"), ("empty", "no picture in it"),
                         ("hidden", "no picture in it")]:  # fmt: skip
        with pytest.raises(InputError) as caught:
            load_images("imagefolder", tmp_path / name, 8)
        assert f"--train_data_dir {tmp_path / name}: {reason}" in str(caught.value) and "\n" not in str(caught.value)


def test_wrong_values(folder):
    for options, expected in [
        ({"dataset_name": "imagefolder"}, "--dataset_name imagefolder: needs the folder; add --train_data_dir"),
        ({"dataset_name": "a/b", "train_data_dir": folder}, "--dataset_name a/b: --train_data_dir is given too"),
        ({"image_size": 0}, "--image_size 0: must be 1 or more"),
        ({"num_images": 0}, "--num_images 0: must be 1 or more"),
        ({"resize": "stretch"}, "--resize stretch: must be crop, squeeze or pad"),
        ({"on_bad_image": "ignore"}, "--on_bad_image ignore: must be error or skip"),
    ]:
        with pytest.raises(InputError) as caught:
            load_images(**options)
        assert str(caught.value).startswith(expected)


def test_a_hub_id_while_offline():
    with pytest.raises(InputError) as caught:
        load_images("someone/butterflies", image_size=8)
    message = str(caught.value)
    assert message.startswith("--dataset_name someone/butterflies: cannot be loaded") and "\n" not in message
    assert "check the name and the connection" in message and "meadow" in message and "--train_data_dir" in message


def add_bad_files(folder: Path) -> None:
    (folder / "class" / "bad 1.jpg").write_bytes(b"")
    (folder / "class" / "bad 2.png").write_text("text")
    (folder / "class" / "bad 3.png").write_bytes(png_bytes(gray(9, (64, 64)))[:60])
    (folder / "bad 4.gif").symlink_to(folder / "gone.gif")


def test_bad_files_are_refused_together(folder):
    add_bad_files(folder)
    with pytest.raises(InputError) as caught:
        load_images("imagefolder", folder, 8)
    message = str(caught.value)
    assert all(name in message for name in ("bad 1.jpg: is empty", "bad 2.png: is no readable", "bad 4.gif: cannot be"))
    assert "and 1 more" in message and message.endswith("or pass --on_bad_image skip") and "\n" not in message


def test_bad_files_are_skipped_and_named(folder, caplog):
    add_bad_files(folder)
    with caplog.at_level(logging.WARNING):
        images = load_images("imagefolder", folder, 8, on_bad_image="skip")
    assert levels(images) == [0, 10, 20, 30, 40] and len(images.skipped) == 4 and len(images.names) == 5
    assert "4 unreadable pictures skipped" in caplog.text and "bad 1.jpg" in caplog.text
    assert "4 skipped" in repr(images)


def test_reading_stops_after_ten_bad_files(tmp_path, monkeypatch):
    for index in range(600):
        (tmp_path / f"{index:03d}.png").write_text("text")
    opened = []
    original = module.open_image
    monkeypatch.setattr(module, "open_image", lambda *a, **k: opened.append(1) or original(*a, **k))
    with pytest.raises(InputError, match=r"no picture can be read: .*and 7 more"):
        load_images("imagefolder", tmp_path, 8)
    assert len(opened) <= 256, "not every file of a wrong folder"
    with pytest.raises(InputError, match=r"no picture can be read: .*and 597 more"):
        load_images("imagefolder", tmp_path, 8, on_bad_image="skip")


# --- the stored block


@pytest.fixture
def small_limit(monkeypatch):
    monkeypatch.setattr(module, "MEMORY_LIMIT", 100)


def test_a_large_set_is_mapped_and_found_again(folder, tmp_path, small_limit, monkeypatch):
    plain = load_images("imagefolder", folder, 4)
    cache = str(tmp_path / "cache")
    first = load_images("imagefolder", folder, 8, cache_dir=cache)
    assert isinstance(first.pixels, np.memmap) and levels(first) == levels(plain) and first.fingerprint
    opened = []
    original = module.open_image
    monkeypatch.setattr(module, "open_image", lambda *a, **k: opened.append(1) or original(*a, **k))
    again = load_images("imagefolder", folder, 8, cache_dir=cache)
    assert not opened and np.array_equal(again.pixels, first.pixels) and again.names == first.names
    assert again.fingerprint == first.fingerprint == module.ImageSet(np.array(first.pixels)).fingerprint
    load_images("imagefolder", folder, 8, cache_dir=cache, resize="squeeze")
    load_images("imagefolder", folder, 9, cache_dir=cache)
    gray(99).save(folder / "a.png")
    assert levels(load_images("imagefolder", folder, 8, cache_dir=cache))[0] == 99
    assert len(opened) == 15


def test_several_processes_share_a_small_set(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    images = load_images("imagefolder", folder, 4, cache_dir=str(tmp_path / "cache"))
    assert isinstance(images.pixels, np.memmap) and levels(images) == [0, 10, 20, 30, 40]
    drawn = load_images(image_size=16, num_images=2, cache_dir=str(tmp_path / "cache"))
    monkeypatch.setattr(meadow, "specimens", lambda *_: pytest.fail("drawn again"))
    again = load_images(image_size=16, num_images=2, cache_dir=str(tmp_path / "cache"))
    assert np.array_equal(again.pixels, drawn.pixels)


def test_a_finished_block_is_read_where_nobody_can_write(tmp_path, monkeypatch):
    def none(*_):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "images-1").mkdir()
    monkeypatch.setattr(module, "held_lock", none)
    write_whole(tmp_path / "images-1", fill=None)
    with pytest.raises(PermissionError):
        write_whole(tmp_path / "images-2", fill=None)


def test_a_block_that_skipped_is_not_taken_for_a_whole_one(folder, tmp_path, small_limit):
    add_bad_files(folder)
    cache = str(tmp_path / "cache")
    with pytest.raises(InputError, match="on_bad_image skip"):
        load_images("imagefolder", folder, 8, cache_dir=cache)
    assert [path.suffix for path in Path(cache, "diffusion_lessons").iterdir()] == [".lock"]
    assert len(load_images("imagefolder", folder, 8, cache_dir=cache, on_bad_image="skip").skipped) == 4
    with pytest.raises(InputError, match="on_bad_image skip"):
        load_images("imagefolder", folder, 8, cache_dir=cache)


def test_a_full_disk_and_a_folder_that_is_none(folder, tmp_path, small_limit, monkeypatch):
    (tmp_path / "occupied").write_text("a file")
    with pytest.raises(InputError, match=r"--cache_dir .*occupied.*; name a folder that can take 0\.00 GiB"):
        load_images("imagefolder", folder, 8, cache_dir=str(tmp_path / "occupied"))
    usage = module.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage._replace(free=10))
    with pytest.raises(InputError, match=r"--cache_dir .*the disk is too full"):
        load_images("imagefolder", folder, 8, cache_dir=str(tmp_path / "cache"))


def test_a_disk_that_fills_up_while_writing(tmp_path):
    def fill(file):
        file.write(b"some")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_whole(tmp_path / "images-x", fill)
    assert [path.name for path in tmp_path.iterdir()] == ["images-x.lock"]


def load_slowly(folder: Path, cache: Path, log: Path, delay: float) -> None:
    """In a process of its own: decode with a pause before each picture, and note each of them."""

    def slowly(*arguments, **options):
        with log.open("a") as file:
            file.write("x")
        time.sleep(delay)
        return open_image(*arguments, **options)

    module.open_image, module.MEMORY_LIMIT = slowly, 0
    images = load_images("imagefolder", folder, 8, cache_dir=str(cache))
    os._exit(0 if levels(images) == [0, 10, 20, 30, 40] else 1)


def test_killed_in_the_middle_then_two_at_once(folder, tmp_path):
    """A killed process leaves no lock and no half block; of two that come together, one decodes."""
    cache, log, context = tmp_path / "cache", tmp_path / "log", multiprocessing.get_context("fork")
    victim = context.Process(target=load_slowly, args=(folder, cache, log, 60))
    victim.start()
    deadline = time.monotonic() + 30
    while not log.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    victim.kill()
    victim.join()
    place = cache / "diffusion_lessons"
    assert sorted(path.suffix for path in place.iterdir()) == [".lock", ".partial"]
    log.write_text("")
    both = [context.Process(target=load_slowly, args=(folder, cache, log, 0.1)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(30)
    assert [process.exitcode for process in both] == [0, 0]
    assert len(log.read_text()) == 5, "five pictures, decoded by one of the two"
    assert sorted(path.suffix for path in place.iterdir()) == ["", ".lock"]


FORK_AFTER_LOADING = """
import os, sys
import torch
torch.set_num_threads(2)
from diffusion_lessons.pictures.sets import load_images, make_dataloader
images = load_images("imagefolder", sys.argv[1], 256)  # large enough for torch to use several threads, if it is asked
loader = make_dataloader(images, 4)
batch = next(iter(loader))
child = os.fork()
if child == 0:
    layer = torch.nn.Conv2d(3, 8, 3)
    for batch in loader:
        layer(batch["images"].float()).square().mean().backward()
    os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_child_can_train(folder):
    """`notebook_launcher` forks: a thread pool that torch started in the parent would make the child hang here."""
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", FORK_AFTER_LOADING, str(folder)], timeout=120, env=environment)
    assert done.returncode == 0


def test_the_key_of_a_data_set_stays_the_same():
    rows = [{"bytes": png_bytes(gray(level)), "path": None} for level in (1, 2)]
    features = datasets.Features({"image": datasets.Image()})

    def key(rows):
        return dataset_source(datasets.Dataset.from_dict({"image": rows}, features=features), "a/b").key

    assert key(rows) == key(rows) != key(rows[::-1])


def test_the_key_of_a_folder(folder):
    before = folder_source(folder).key
    assert folder_source(str(folder)).key == before
    (folder / "notes.txt").write_text("no picture")
    assert folder_source(folder).key == before
    (folder / "a.png").rename(folder / "z.png")
    assert folder_source(folder).key != before


def test_no_torch_operation_on_the_way(folder, tmp_path):
    """`mapped` hands out a read-only map: nothing in a run can change the stored block."""
    pixels, about = mapped(folder_source(folder), 8, "crop", "error", tmp_path / "cache")
    assert not pixels.flags.writeable and len(about["names"]) == 5
    with pytest.raises(ValueError, match="read-only"):
        pixels[0] = 0
    assert torch.is_tensor(module.ImageSet(pixels, **about)[0]["images"])

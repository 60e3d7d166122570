"""One picture: each awkward kind of file becomes upright RGB by its stated rule, or is refused in one line."""

import io
import os
import struct
import unicodedata
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, TiffImagePlugin
from torchvision import transforms

from diffusion_lessons.dreambooth.subject import instance_source, read_pictures
from diffusion_lessons.engine.config import InputError
from diffusion_lessons.pictures import files as pictures
from diffusion_lessons.pictures.files import (
    conversion_to_srgb,
    eight_bits,
    find_images,
    fit_square,
    open_image,
    upright,
)
from diffusion_lessons.pictures.sets import load_images

pytestmark = pytest.mark.filterwarnings("ignore")  # Pillow's remarks on the damaged files made here


def landmark(width: int = 24, height: int = 16) -> Image.Image:
    """Four quarters in four colours: every turn and every mirroring of it differs."""
    pixels = np.full((height, width, 3), 255, dtype=np.uint8)
    pixels[: height // 2, : width // 2] = (255, 0, 0)
    pixels[: height // 2, width // 2 :] = (0, 255, 0)
    pixels[height // 2 :, : width // 2] = (0, 0, 255)
    return Image.fromarray(pixels)


def saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(width: int, height: int, bits: int, colour_type: int, rows: bytes) -> bytes:
    """A PNG written by hand, for the kinds that Pillow reads but does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n"
    return start + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def pixels(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


# --- orientation

# The corners of `landmark` (top left, top right, bottom left) after each orientation, from the EXIF standard's words:
# 6 means "the 0th row is the visual right-hand side, the 0th column the visual top".
CORNERS = {1: "RGB", 2: "GRW", 3: "WBG", 4: "BWR", 5: "RBG", 6: "BRW", 7: "WGB", 8: "GWR"}
COLOURS = {"R": (255, 0, 0), "G": (0, 255, 0), "B": (0, 0, 255), "W": (255, 255, 255)}


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_in_every_format(kind, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    image = open_image(saved(landmark(), kind, exif=exif, **options))
    assert image.size == ((16, 24) if orientation >= 5 else (24, 16))
    corners = [image.getpixel(place) for place in [(0, 0), (image.width - 1, 0), (0, image.height - 1)]]
    assert corners == [COLOURS[letter] for letter in CORNERS[orientation]]


def test_jpeg_orientation_and_damaged_exif():
    exif = Image.Exif()
    exif[274] = 6
    content = saved(landmark(), "JPEG", exif=exif, quality=95, subsampling=0)
    assert open_image(content).size == (16, 24)
    damaged = saved(landmark(), "JPEG", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff" + b"\xff" * 40)
    assert open_image(damaged).size == (24, 16)
    odd = Image.Exif()
    odd[274] = 9  # not defined
    assert open_image(saved(landmark(), "JPEG", exif=odd)).size == (24, 16)


def test_upright_leaves_a_picture_without_a_note_alone():
    image = landmark()
    assert upright(image) is image


def test_the_photographs_that_came_with_traps(shared_data):
    stored = Image.open(shared_data / "nasty" / "exif_rotated_90.jpg")
    assert stored.getexif()[274] == 6
    image = open_image(shared_data / "nasty" / "exif_rotated_90.jpg")
    assert image.size == stored.size[::-1]
    assert np.array_equal(pixels(image), np.rot90(np.asarray(stored.convert("RGB")), -1))
    gray = pixels(open_image(shared_data / "nasty" / "grayscale.jpg"))
    assert (gray == gray[..., :1]).all() and gray.std() > 1
    mpo = Image.open(shared_data / "nasty" / "mpo_two_frames.jpg")
    assert mpo.n_frames == 2
    mpo.seek(1)
    second = np.asarray(mpo.convert("RGB")).astype(int)
    mpo.seek(0)
    first = np.asarray(mpo.convert("RGB"))
    ours = pixels(open_image(shared_data / "nasty" / "mpo_two_frames.jpg"))
    assert np.array_equal(ours, first) and not np.array_equal(ours, second)


# --- modes


def test_soft_edges_over_white():
    alpha = np.arange(256, dtype=np.uint8)[None].repeat(4, 0)
    colour = np.zeros((4, 256, 3), dtype=np.uint8)
    colour[..., 0] = 200
    content = saved(Image.fromarray(np.dstack([colour, alpha])), "PNG")
    share = alpha[..., None] / 255
    assert np.abs(pixels(open_image(content)) - (share * colour + (1 - share) * 255)).max() <= 1


def test_transparency_of_a_palette_a_key_colour_and_gray():
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([255, 0, 0, 0, 0, 0] + [0] * 762)
    palette.putpixel((0, 0), 0)
    assert pixels(open_image(saved(palette, "PNG", transparency=1)))[0, :2].tolist() == [[255, 0, 0], [255, 255, 255]]
    assert pixels(open_image(saved(palette, "GIF", transparency=1)))[0, :2].tolist() == [[255, 0, 0], [255, 255, 255]]
    key = Image.new("RGB", (2, 1), (1, 2, 3))
    key.putpixel((0, 0), (9, 9, 9))
    keyed = open_image(saved(key, "PNG", transparency=(1, 2, 3)))
    assert pixels(keyed)[0].tolist() == [[9, 9, 9], [255, 255, 255]]
    gray = Image.fromarray(np.array([[[100, 255], [100, 0]]], dtype=np.uint8), "LA")
    assert pixels(open_image(saved(gray, "PNG")))[0].tolist() == [[100] * 3, [255] * 3]


def test_cmyk_gray_and_one_bit():
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    assert np.abs(pixels(open_image(saved(cmyk, "JPEG", quality=100))) - [255, 0, 0]).max() <= 3
    assert (pixels(open_image(saved(Image.new("L", (4, 4), 77), "PNG"))) == 77).all()
    assert (pixels(open_image(saved(Image.new("1", (4, 4), 1), "BMP"))) == 255).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_by_their_range(kind):
    values = np.linspace(0, 65535, 64).astype(np.uint16)[None].repeat(4, 0)
    image = pixels(open_image(saved(Image.fromarray(values), kind)))
    assert np.array_equal(image[..., 0], np.round(values / 257).astype(int))
    assert (image == image[..., :1]).all()


def test_a_dark_scan_stays_dark():
    """The range is that of the format, so that pictures of one set keep their brightness relative to each other."""
    values = np.linspace(300, 30_000, 64).astype(np.uint16)[None].repeat(4, 0)
    image = pixels(open_image(saved(Image.fromarray(values), "PNG")))
    assert np.array_equal(image[..., 0], np.round(values / 257).astype(int))


def test_sixteen_bit_colour():
    values = np.linspace(0, 65535, 30).astype(">u2").reshape(2, 5, 3)
    rows = b"".join(b"\x00" + row.tobytes() for row in values)
    assert np.abs(pixels(open_image(png(5, 2, 16, 2, rows))) - values.astype(int) / 257).max() <= 1


def test_deeper_numbers():
    assert eight_bits(np.array([[0, 65535]], dtype=np.int32)).tolist() == [[0, 255]]
    assert eight_bits(np.array([[-100, 0, 100]], dtype=np.int32)).tolist() == [[0, 128, 255]]
    assert eight_bits(np.array([[0.0, 0.5, 1.0]], dtype=np.float32)).tolist() == [[0, 128, 255]]
    assert eight_bits(np.array([[10.0, 20.0, 30.0]], dtype=np.float32)).tolist() == [[0, 128, 255]]
    assert eight_bits(np.full((2, 2), 1e6, dtype=np.float32)).tolist() == [[0, 0], [0, 0]]
    floats = Image.fromarray(np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4))
    assert pixels(open_image(saved(floats, "TIFF")))[-1, -1].tolist() == [255] * 3
    with pytest.raises(InputError, match=r"nan\.tif.*not finite"):
        open_image(saved(Image.fromarray(np.full((2, 2), np.nan, dtype=np.float32)), "TIFF"), "nan.tif")


@pytest.mark.parametrize(("kind", "options"), [("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})])
def test_the_first_frame_of_several(kind, options):
    later = [Image.new("RGB", (24, 16), colour) for colour in ("yellow", "cyan")]
    content = saved(landmark(), kind, save_all=True, append_images=later, **options)
    assert Image.open(io.BytesIO(content)).n_frames == 3
    assert np.array_equal(pixels(open_image(content)), pixels(landmark()))


def test_one_pixel_and_eight_thousand():
    tiny = open_image(saved(Image.new("RGB", (1, 1), (10, 20, 30)), "PNG"))
    for resize in ("crop", "squeeze", "pad"):
        assert (pixels(fit_square(tiny, 32, resize)) == [10, 20, 30]).all()
    large = open_image(saved(Image.new("L", (8000, 8000), 90), "PNG"))
    assert large.size == (8000, 8000) and (pixels(fit_square(large, 16)) == 90).all()
    for size in [(8000, 1), (1, 8000)]:
        strip = open_image(saved(Image.new("RGB", size, (1, 2, 3)), "PNG"))
        for resize in ("crop", "squeeze", "pad"):
            assert fit_square(strip, 512, resize).size == (512, 512)


# --- refusals


REFUSED = {
    "empty.jpg": (b"", "is empty"),
    "text.png": ("그림이 아니다".encode(), "no readable picture"),
    "page.jpg": (b"<!DOCTYPE html><html>404</html>", "no readable picture"),
    "script.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n", "no readable picture"),
    "photo.heic": (b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic", "convert HEIC"),
    "header.jpg": (b"\xff\xd8\xff\xe0", ""),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("as_file", [True, False])
def test_what_is_no_picture_is_named_in_one_line(name, as_file, tmp_path):
    content, reason = REFUSED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        open_image(tmp_path / name) if as_file else open_image(content, name)
    message = str(caught.value)
    assert name in message and reason in message and "replace or remove" in message and "\n" not in message


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "TIFF", "WEBP"])
def test_truncated_files(kind, tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    content = saved(noise, kind)
    (tmp_path / "cut off.img").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"cut off\.img: "):
        open_image(tmp_path / "cut off.img")


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(InputError, match=r"none\.png: cannot be read \(No such file"):
        open_image(tmp_path / "none.png")
    with pytest.raises(InputError, match=r"cannot be read"):
        open_image(tmp_path)


def test_a_bomb_is_refused_before_it_is_decoded(monkeypatch):
    for width, height in [(60_000, 60_000), (10_000, 9_000)]:
        bomb = png(width, height, 8, 2, b"")
        assert len(bomb) < 200
        monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
        with pytest.raises(InputError, match=r"bomb\.png: has more than 89 million pixels"):
            open_image(bomb, "bomb.png")


def test_a_pil_image_is_held_to_the_same_limit(monkeypatch):
    monkeypatch.setattr(pictures, "MAX_PIXELS", 100)
    assert open_image(Image.new("RGB", (10, 10))).size == (10, 10)
    with pytest.raises(InputError, match="picture: has more"):
        open_image(Image.new("RGB", (10, 11)))


def test_damaged_files_never_raise_anything_else():
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 255, (24, 24, 3), dtype=np.uint8))
    outcomes = set()
    for kind in ("JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP", "AVIF", "JPEG2000"):
        content = saved(noise, kind)
        for _ in range(60):
            damaged = bytearray(content)
            for place in rng.integers(0, len(content), 4):
                damaged[place] = rng.integers(0, 256)
            try:
                outcomes.add(open_image(bytes(damaged)).mode)
            except InputError:
                outcomes.add("refused")
    assert outcomes == {"RGB", "refused"}


def test_files_are_closed(tmp_path):
    for index in range(40):
        (tmp_path / f"{index}.gif").write_bytes(saved(landmark(), "GIF", save_all=True, append_images=[landmark()]))
    kept = [open_image(path) for path in sorted(tmp_path.iterdir())]
    descriptors = Path("/proc/self/fd")
    if descriptors.is_dir():
        links = [os.readlink(link) for link in descriptors.iterdir() if link.is_symlink() and link.exists()]
        assert not any(str(tmp_path) in link for link in links)
    assert len(kept) == 40


# --- squares


def test_squeeze_is_the_tutorials_resize():
    image = Image.fromarray(np.random.default_rng(1).integers(0, 255, (107, 256, 3), dtype=np.uint8))
    assert np.array_equal(pixels(fit_square(image, 64, "squeeze")), pixels(transforms.Resize((64, 64))(image)))


def test_crop_keeps_the_middle():
    image = Image.new("RGB", (300, 100), "red")
    image.paste((0, 0, 255), (100, 0, 200, 100))
    assert (pixels(fit_square(image, 100, "crop")) == [0, 0, 255]).all()
    assert (pixels(fit_square(image.transpose(Image.Transpose.ROTATE_90), 50, "crop"))[2:-2] == [0, 0, 255]).all()


def test_crop_agrees_with_resize_then_centre_crop():
    smooth = Image.fromarray(np.add.outer(np.arange(120), np.arange(200)).clip(0, 255).astype(np.uint8)).convert("RGB")
    theirs = transforms.CenterCrop(60)(transforms.Resize(60)(smooth))
    assert np.abs(pixels(fit_square(smooth, 60, "crop")) - pixels(theirs)).max() <= 2


def test_pad_keeps_everything_on_its_own_border_colour():
    image = Image.new("RGB", (200, 100), (250, 240, 230))
    image.paste((0, 0, 0), (20, 20, 180, 80))
    square = pixels(fit_square(image, 100, "pad"))
    assert (square[:24] == [250, 240, 230]).all() and (square[-24:] == [250, 240, 230]).all()
    dark = (square < 128).all(axis=2)
    assert dark.any(axis=0).sum() == pytest.approx(80, abs=2) and dark.any(axis=1).sum() == pytest.approx(30, abs=2)


def test_whole_butterflies(shared_data):
    """Wings reach close to the edge in these photographs: pad must keep every dark column that the original has."""
    paths = find_images(shared_data / "butterflies")
    assert len(paths) == 92
    for path in paths[::10]:
        image = open_image(path)
        dark = (np.asarray(image.convert("L")) < 110).any(axis=0)
        square = (np.asarray(fit_square(image, image.width, "pad").convert("L")) < 110).any(axis=0)
        assert np.array_equal(dark, square)


def test_a_draft_is_close_to_the_whole():
    rng = np.random.default_rng(2)
    coarse = Image.fromarray(rng.integers(0, 255, (12, 16, 3), dtype=np.uint8))
    smooth = coarse.resize((2048, 1536), Image.Resampling.BICUBIC)
    content = saved(smooth, "JPEG", quality=92)
    draft = open_image(content, near_size=128)
    assert min(draft.size) >= 128 and draft.width < 2048
    difference = np.abs(pixels(fit_square(draft, 32)) - pixels(fit_square(open_image(content), 32)))
    assert difference.mean() < 1


# --- folders


def test_hidden_files_and_folders_are_passed_over(tmp_path):
    content = saved(landmark(), "PNG")
    wanted = ["b.png", "A photo.JPEG", "나비 한 마리.png", "class one/a.webp", "class two/deep/er/x.gif", "phone.HEIC"]
    unwanted = [".DS_Store", "._b.png", ".ipynb_checkpoints/b-checkpoint.png", "__MACOSX/b.png", "Thumbs.db",
                "metadata.csv", "class one/.hidden/c.png", "notes.txt", "weights.safetensors"]  # fmt: skip
    for name in wanted + unwanted:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder.png").mkdir()
    assert sorted(path.relative_to(tmp_path).as_posix() for path in find_images(tmp_path)) == sorted(wanted)


@pytest.mark.parametrize("name", ["a.CR3", "a.jxl", "a.raf", "a.ORF", "a.rw2", "a.pef", "a.srw", "a.heics", "a.hif",
                                  "a.nrw", "a.avif", "a.psb", "a.exr"])  # fmt: skip
def test_what_is_surely_a_picture_is_not_overlooked(tmp_path, name):
    (tmp_path / name).write_bytes(b"what no decoder here knows")
    assert [path.name for path in find_images(tmp_path)] == [name]
    with pytest.raises(InputError, match=f"{name}: is no readable picture .convert HEIC, RAW, JPEG XL or SVG"):
        open_image(tmp_path / name)


def test_the_thumbnail_of_a_raw_file_is_not_the_picture(tmp_path):
    plain, thumbnail, dng = (TiffImagePlugin.ImageFileDirectory_v2() for _ in range(3))
    thumbnail[254], dng[50706] = 1, b"\1\4\0\0"
    for name, tags, refused in [("a.nef", plain, True), ("b.tif", thumbnail, True), ("c.tif", dng, True),
                                ("d.tif", plain, False)]:  # fmt: skip
        (tmp_path / name).write_bytes(saved(landmark(), "TIFF", tiffinfo=tags))
        if refused:
            with pytest.raises(InputError, match=f"{name}: is no readable picture"):
                open_image(tmp_path / name)
        else:
            assert open_image(tmp_path / name).size == (24, 16)


def test_the_order_depends_on_the_names_alone(tmp_path):
    names = ["2.png", "10.png", "é.png", "z.png", "나비.png"]
    one, two = tmp_path / "one", tmp_path / "two"
    for folder, form, order in [(one, "NFC", names), (two, "NFD", names[::-1])]:
        folder.mkdir()
        for name in order:
            (folder / unicodedata.normalize(form, name)).touch()
    listed = [[unicodedata.normalize("NFC", path.name) for path in find_images(folder)] for folder in (one, two)]
    assert listed[0] == listed[1] == sorted(names)


def test_links_are_followed_once(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.png").touch()
    (tmp_path / "real" / "loop").symlink_to(tmp_path)
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    names = [path.relative_to(tmp_path).as_posix() for path in find_images(tmp_path)]
    assert names == ["gone.png", "real/a.png"]


def test_a_folder_that_cannot_be_listed_is_not_left_out(tmp_path, monkeypatch):
    (tmp_path / "locked").mkdir()
    scan = os.scandir

    def refuse(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError, match="locked: Permission denied"):
        find_images(tmp_path)


# --- colour profiles ---


def icc(space: bytes, tags: dict[bytes, bytes], kind: bytes = b"mntr", pcs: bytes = b"XYZ ") -> bytes:
    """An ICC profile of these tags, version 4.2."""
    table, body, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, tag in tags.items():
        table += name + struct.pack(">II", start + len(body), len(tag))
        body += tag + bytes(-len(tag) % 4)
    header = struct.pack(">I4xI4s4s4s", start + len(body), 0x04200000, kind, space, pcs)
    return header + struct.pack(">6H4s28x3i48x", 2026, 1, 1, 0, 0, 0, b"acsp", *fixed(0.9642, 1, 0.8249)) + table + body


def fixed(*values: float) -> list[int]:
    return [round(65536 * value) for value in values]


def xyz(*values: float) -> bytes:
    return struct.pack(">4s4x3i", b"XYZ ", *fixed(*values))


WHITE = {b"wtpt": xyz(0.9642, 1, 0.8249)}
SRGB_CURVE = struct.pack(">4s4xHxx5i", b"para", 3, *fixed(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045))
LINEAR = struct.pack(">4s4xHxxi", b"para", 0, *fixed(1.0))
DISPLAY_P3 = icc(b"RGB ", WHITE | {
    b"rXYZ": xyz(0.51512, 0.2412, -0.00105), b"gXYZ": xyz(0.29198, 0.69225, 0.04189),
    b"bXYZ": xyz(0.1571, 0.06657, 0.78407), b"rTRC": SRGB_CURVE, b"gTRC": SRGB_CURVE, b"bTRC": SRGB_CURVE})  # fmt: skip
LINEAR_GRAY = icc(b"GRAY", WHITE | {b"kTRC": LINEAR})
# A press whose black ink gives half of the lightness, and whose other inks give nothing: a table of 2^4 points.
RAMP = bytes(range(256))
POINTS = b"".join(bytes([127 if point & 1 else 255, 128, 128]) for point in range(16))
PRESS = icc(b"CMYK", WHITE | {b"A2B0": struct.pack(">4s4x4B9i", b"mft1", 4, 3, 2, 0, *fixed(1, 0, 0, 0, 1, 0, 0, 0, 1))
                              + RAMP * 4 + POINTS + RAMP * 3}, b"prtr", b"Lab ")  # fmt: skip
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def with_profile(image: Image.Image, profile: bytes, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, icc_profile=profile, **options)
    return file.getvalue()


def off(image: Image.Image, colour: tuple[int, int, int]) -> int:
    """How far the first pixel is from a colour, in grey levels."""
    return int(np.abs(np.array(image.getpixel((0, 0))) - colour).max())


@pytest.mark.parametrize("stored, shown", [((234, 51, 35), (255, 0, 0)), ((117, 251, 76), (0, 255, 0)),
                                           ((0, 0, 245), (0, 0, 255)), ((128, 128, 128), (128, 128, 128)),
                                           ((200, 100, 100), (215, 93, 97)), ((0, 0, 0), (0, 0, 0))])  # fmt: skip
def test_display_p3_becomes_srgb(stored, shown):
    image = Image.new("RGB", (8, 8), stored)
    assert off(open_image(with_profile(image, DISPLAY_P3)), shown) <= 3
    assert off(open_image(with_profile(image, DISPLAY_P3, "JPEG", quality=100, subsampling=0)), shown) <= 6
    assert "icc_profile" not in open_image(with_profile(image, DISPLAY_P3)).info


def test_profiles_go_with_every_other_rule():
    red = Image.new("RGB", (8, 16), (234, 51, 35))
    turn = Image.Exif()
    turn[274] = 6
    turned = open_image(with_profile(red, DISPLAY_P3, "JPEG", exif=turn, quality=100))
    assert turned.size == (16, 8) and off(turned, (255, 0, 0)) <= 4
    assert off(open_image(with_profile(red.quantize(4), DISPLAY_P3)), (255, 0, 0)) <= 3
    clear = red.convert("RGBA")
    clear.putalpha(0)
    assert off(open_image(with_profile(clear, DISPLAY_P3)), (255, 255, 255)) == 0
    clear.putalpha(128)
    assert off(open_image(with_profile(clear, DISPLAY_P3)), (255, 127, 127)) <= 3
    large = with_profile(Image.new("RGB", (800, 800), (234, 51, 35)), DISPLAY_P3, "JPEG", quality=100)
    draft = open_image(large, near_size=100)
    assert draft.size == (100, 100) and off(draft, (255, 0, 0)) <= 4


def test_gray_deep_and_printed_pictures_have_profiles_of_their_own():
    linear = 255 * 0.5 ** (1 / 2.4) * 1.055 - 0.055 * 255  # sRGB's number for half of the light
    for mode, level in (("L", 128), ("LA", (128, 255)), ("I;16", 32896)):
        shown = open_image(with_profile(Image.new(mode, (4, 4), level), LINEAR_GRAY))
        assert shown.mode == "RGB" and off(shown, (round(linear),) * 3) <= 2
    for ink, gray in ((0, 255), (255, 119)):  # a lightness of 50 is sRGB's 119
        press = open_image(with_profile(Image.new("CMYK", (8, 8), (0, 0, 0, ink)), PRESS, "TIFF"))
        assert off(press, (gray,) * 3) <= 2


@pytest.mark.parametrize("profile, mode", [(SRGB, "RGB"), (DISPLAY_P3[:150], "RGB"), (b"nonsense", "RGB"),
                                           (LINEAR_GRAY, "RGB"), (DISPLAY_P3, "L"), (DISPLAY_P3, "CMYK"),
                                           (DISPLAY_P3[:128] + bytes(264), "RGB")])  # fmt: skip
def test_a_profile_that_is_srgb_or_does_not_fit_changes_nothing(profile, mode):
    noise = np.random.default_rng(0).integers(0, 256, (9, 9, {"L": 1, "RGB": 3, "CMYK": 4}[mode]), np.uint8)
    image = Image.frombytes(mode, (9, 9), noise.tobytes())
    expected = open_image(image)
    assert open_image(with_profile(image, profile, "TIFF")).tobytes() == expected.tobytes()


def test_threads_share_a_conversion():
    images = [Image.new("RGB", (300, 300), (200, 100, index)) for index in range(40)]
    for image in images:
        image.info["icc_profile"] = DISPLAY_P3
    conversion_to_srgb.cache_clear()
    with ThreadPoolExecutor(8) as pool:
        together = [image.tobytes() for image in pool.map(open_image, images)]
    assert together == [open_image(image).tobytes() for image in images]


def test_both_kinds_of_training_read_the_same_colours(tmp_path):
    (tmp_path / "red.png").write_bytes(with_profile(Image.new("RGB", (32, 32), (234, 51, 35)), DISPLAY_P3))
    (pixels,) = read_pictures(instance_source(str(tmp_path), 16), 16)
    images = load_images("imagefolder", tmp_path, 16)[:]["images"]
    assert np.array_equal(images[0].numpy(), pixels)
    assert np.abs(pixels[:, 0, 0].astype(int) - (255, 0, 0)).max() <= 2

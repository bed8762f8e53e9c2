from __future__ import annotations

import contextlib
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from ditf.runtime.errors import InputError
from ditf.runtime.images import decode_image, fit_image, open_image, picture_count
from ditf.runtime.label_images import read_label_image

WHITE = (255, 255, 255)


@pytest.fixture
def picture() -> Image.Image:
    """An image of noise, 40 px high and 60 px wide."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3)).astype(np.uint8))


def saved(image: Image.Image, path: Path, **options: object) -> Path:
    image.save(path, **options)
    return path


def test_path_string_image_and_array_are_the_same(picture, tmp_path):
    path = saved(picture, tmp_path / "a.png")
    for source in (path, str(path), picture, np.asarray(picture)):
        opened = open_image(source)
        assert opened.mode == "RGB"
        np.testing.assert_array_equal(opened, picture)


def test_array_need_not_be_contiguous(picture):
    flipped = np.asarray(picture)[::-1, ::2]
    np.testing.assert_array_equal(open_image(flipped), flipped)


@pytest.mark.parametrize(
    ("mode", "pixel", "expected"),
    [
        ("1", 1, WHITE),
        ("L", 77, (77, 77, 77)),
        ("LA", (10, 255), (10, 10, 10)),
        ("LA", (10, 0), WHITE),
        ("RGBA", (1, 2, 3, 255), (1, 2, 3)),
        ("RGBA", (1, 2, 3, 0), WHITE),
        ("RGBA", (0, 100, 255, 51), (204, 224, 255)),  # a fifth of the colour, four of white
        ("CMYK", (0, 0, 0, 0), WHITE),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("I", 257 * 80, (80, 80, 80)),
        ("I;16", 257 * 200, (200, 200, 200)),
        ("I;16", 65535, WHITE),
        ("I;16", 0, (0, 0, 0)),
    ],
)
def test_modes_become_rgb(mode, pixel, expected):
    opened = open_image(Image.new(mode, (3, 2), pixel))
    assert (opened.mode, opened.size) == ("RGB", (3, 2))
    assert opened.getpixel((1, 1)) == expected


@pytest.mark.parametrize("transparency", [0, bytes([0, 255])], ids=["index", "bytes"])
def test_palette_transparency_is_laid_over_white(tmp_path, transparency):
    image = Image.new("P", (2, 1))
    image.putpalette([9, 9, 9, 200, 0, 0])
    image.putpixel((1, 0), 1)
    opened = open_image(saved(image, tmp_path / "p.png", transparency=transparency))
    assert [opened.getpixel((x, 0)) for x in (0, 1)] == [WHITE, (200, 0, 0)]


def test_rgb_transparent_colour_is_laid_over_white(tmp_path):
    image = Image.new("RGB", (1, 1), (9, 8, 7))
    opened = open_image(saved(image, tmp_path / "t.png", transparency=(9, 8, 7)))
    assert opened.getpixel((0, 0)) == WHITE


def test_16_bit_png(tmp_path):
    grey = np.arange(256, dtype=np.uint16)[None] * 257
    path = saved(Image.fromarray(grey), tmp_path / "deep.png")
    np.testing.assert_array_equal(np.asarray(open_image(path))[0, :, 1], np.arange(256))


def test_cmyk_jpeg(tmp_path):
    path = saved(Image.new("CMYK", (16, 16), (0, 0, 0, 0)), tmp_path / "print.jpg")
    assert open_image(path).getpixel((8, 8)) == WHITE


@pytest.mark.parametrize(
    ("mode", "pixel", "problem"),
    [
        ("F", 0.5, "float image"),
        ("I", -1, "outside 16 bits"),
        ("I", 65536, "outside 16 bits"),
    ],
)
def test_unknown_ranges_are_refused(tmp_path, mode, pixel, problem):
    path = saved(Image.new(mode, (4, 4), pixel), tmp_path / "depth.tiff")
    with pytest.raises(InputError, match=problem) as caught:
        open_image(path)
    assert str(path) in caught.value.problem
    assert caught.value.fix


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(picture, tmp_path, orientation):
    turned = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(picture, tmp_path / "phone.png", exif=exif)
    np.testing.assert_array_equal(open_image(path), turned[orientation](np.asarray(picture)))


ORIENTED = pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "avif", "tif"])


@pytest.fixture
def sideways(picture, tmp_path):
    """A function that saves `picture` as a camera does that was held upright: turned, which EXIF says."""

    def save(suffix: str) -> Path:
        exif = Image.Exif()
        exif[0x0112] = 6  # rotate by 90 degrees clockwise to show
        return saved(picture, tmp_path / f"phone.{suffix}", exif=exif)

    return save


@ORIENTED
def test_a_file_opened_by_the_caller_is_turned_like_its_path(sideways, suffix):
    path = sideways(suffix)
    upright = open_image(path)
    assert upright.size == (40, 60)
    assert open_image(str(path)).size == (40, 60)
    assert decode_image(path.read_bytes(), "upload").size == (40, 60)
    for prepare in (lambda image: None, lambda image: image.load(), lambda image: image.thumbnail((60, 60))):
        with Image.open(path) as image:
            prepare(image)
            np.testing.assert_array_equal(open_image(image), upright)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "avif"])  # Pillow itself turns TIFF files
@pytest.mark.parametrize(
    "turn",
    [
        ImageOps.exif_transpose,
        lambda image: image.transpose(Image.Transpose.ROTATE_270),
        lambda image: image.rotate(-90, expand=True),
        lambda image: image.convert("RGB").transpose(Image.Transpose.ROTATE_270),
    ],
    ids=["exif_transpose", "transpose", "rotate", "convert"],
)
def test_an_image_that_its_owner_has_turned_is_not_turned_again(sideways, suffix, turn):
    path = sideways(suffix)
    with Image.open(path) as image:
        np.testing.assert_array_equal(open_image(turn(image)), open_image(path))
        ImageOps.exif_transpose(image, in_place=True)
        np.testing.assert_array_equal(open_image(image), open_image(path))


def test_an_image_in_memory_is_its_pixels_and_a_left_over_orientation_is_told(sideways, caplog):
    """Nobody can know whether its owner has turned it. Points are in its own pixels."""
    with Image.open(sideways("jpg")) as image:
        converted = image.convert("RGB")
    np.testing.assert_array_equal(open_image(converted), np.asarray(converted))
    assert "carries an EXIF orientation (6)" in caplog.text
    assert "pass ImageOps.exif_transpose(image)" in caplog.text
    caplog.clear()
    open_image(ImageOps.exif_transpose(converted))
    open_image(Image.new("RGB", (4, 4)))
    with Image.open(sideways("png")) as image:
        open_image(image)
    assert not caplog.text


@pytest.mark.parametrize(("suffix", "options"), [("jpg", {"quality": 95}), ("png", {})])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.95])
def test_truncated_file_is_refused(picture, tmp_path, suffix, options, share):
    path = saved(picture, tmp_path / f"cut.{suffix}", **options)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(InputError, match="not a readable image") as caught:
        open_image(path)
    assert "\n" not in str(caught.value)


def test_truncated_file_opened_by_the_caller_is_refused(picture, tmp_path):
    path = saved(picture, tmp_path / "cut.png")
    path.write_bytes(path.read_bytes()[:2000])
    with Image.open(path) as lazy, pytest.raises(InputError, match="image"):
        open_image(lazy)


@pytest.mark.parametrize("data", [b"", b"not an image\n", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"BM"])
def test_broken_file_is_refused(tmp_path, data):
    path = tmp_path / "broken.png"
    path.write_bytes(data)
    with pytest.raises(InputError, match="not a readable image"):
        open_image(path)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(position=st.integers(0, 10_000), byte=st.integers(0, 255))
def test_one_wrong_byte_is_an_image_or_an_input_error(tmp_path_factory, position, byte):
    path = tmp_path_factory.getbasetemp() / "flipped.png"
    Image.new("RGB", (20, 10), "teal").save(path)
    data = bytearray(path.read_bytes())
    data[position % len(data)] = byte
    path.write_bytes(data)
    with contextlib.suppress(InputError):
        assert open_image(path).mode == "RGB"


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match="no such image"):
        open_image(tmp_path / "none.png")


def test_directory(tmp_path):
    with pytest.raises(InputError, match="is a directory"):
        open_image(tmp_path)


@pytest.mark.parametrize("size", [(1, 1), (20_000, 10), (10, 20_000)])
def test_extreme_sizes(tmp_path, size):
    path = saved(Image.new("RGB", size, "red"), tmp_path / "extreme.png")
    opened = open_image(path)
    assert opened.size == size
    for fit in ("stretch", "pad"):
        pixels, (rows, columns) = fit_image(opened, (64, 48), fit)
        assert pixels.shape == (64, 48, 3)
        assert 1 <= rows <= 64
        assert 1 <= columns <= 48
        assert tuple(pixels[0, 0]) == (255, 0, 0)


def test_decompression_bomb(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    allowed = saved(Image.new("RGB", (12, 12)), tmp_path / "large.png")  # Pillow warns here: not an error
    assert open_image(allowed).size == (12, 12)
    bomb = saved(Image.new("RGB", (15, 15)), tmp_path / "bomb.png")
    with pytest.raises(InputError, match="more than 200 pixels") as caught:
        open_image(bomb)
    assert caught.value.fix


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4, 3), np.int64),
        np.zeros((4, 4, 3), bool),
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((3, 4, 4), np.uint8),
        np.zeros((1, 4, 4, 3), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((4, 0, 3), np.uint8),
    ],
    ids=lambda array: f"{array.dtype}{list(array.shape)}",
)
def test_wrong_arrays_are_refused(array):
    with pytest.raises(InputError, match="RGB uint8") as caught:
        open_image(array)
    assert str(array.dtype) in str(caught.value)


def test_empty_image_is_refused():
    with pytest.raises(InputError, match="0x5"):
        open_image(Image.new("RGB", (0, 5)))


@pytest.mark.parametrize("thing", [None, 5, [[1, 2]], b"left.jpg"])
def test_what_is_no_image_at_all(thing):
    with pytest.raises(InputError, match="a path, a PIL image or an array"):
        open_image(thing)


@pytest.mark.parametrize("read", [open_image, picture_count, lambda path: read_label_image(path, (4, 4))])
def test_a_fifo_and_a_device_are_no_images(tmp_path, read):
    """Opening a FIFO would wait for a writer, and a device has no end."""
    os.mkfifo(tmp_path / "picture.png")
    for path in (tmp_path / "picture.png", Path("/dev/zero")):
        if read is picture_count:
            assert picture_count(path) == 1
            continue
        with pytest.raises(InputError) as caught:
            read(path)
        assert str(path) in caught.value.problem


def test_an_image_file_without_end(tmp_path):
    with (tmp_path / "picture.png").open("wb") as file:
        file.truncate(1 << 40)  # a sparse file
    with pytest.raises(InputError, match="it has 1,099,511,627,776 bytes, more than"):
        open_image(tmp_path / "picture.png")


def test_postscript_is_not_run(tmp_path):
    """Pillow hands EPS files to Ghostscript, whatever their names end in."""
    path = tmp_path / "picture.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\nshowpage\n")
    with pytest.raises(InputError, match="EPS is a program, not a picture"):
        open_image(path)


def test_messages_hold_no_address_of_an_object(tmp_path):
    for content in (b"", b"no image"):
        (tmp_path / "a.png").write_bytes(content)
        with pytest.raises(InputError, match="no kind of image that Pillow reads"):
            open_image(tmp_path / "a.png")
    os.mkfifo(tmp_path / "fifo.png")
    with pytest.raises(InputError, match=r"\(it is a FIFO, not a regular file\)"):
        open_image(tmp_path / "fifo.png")


@pytest.mark.parametrize("suffix", ["avif", "dds", "webp", "tif", "jp2", "qoi"])
def test_damaged_files_of_any_format_are_input_errors(picture, tmp_path, suffix):
    """AVIF's decoder raises RuntimeError and that of DDS NotImplementedError, as if ditf had a defect."""
    rng = np.random.default_rng(0)
    path = saved(picture, tmp_path / f"a.{suffix}")
    content = path.read_bytes()
    refused = 0
    for _ in range(40):
        damaged = np.frombuffer(content, np.uint8).copy()
        damaged[rng.integers(0, len(damaged), 8)] = rng.integers(0, 256, 8)
        damaged[rng.integers(0, min(200, len(damaged)))] ^= 0xFF
        try:
            assert decode_image(damaged.tobytes(), "a").mode == "RGB"
        except InputError:
            refused += 1
    assert refused


def test_premultiplied_grey_is_read():
    grey = Image.new("LA", (2, 2), (100, 255)).convert("La")
    assert open_image(grey).getpixel((0, 0)) == (100, 100, 100)

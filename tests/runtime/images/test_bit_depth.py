"""Values of more than 8 bits are read on their scale, or refused.

OpenCV, tifffile and imageio write the files, of photographs that come with scikit-image.
"""

from __future__ import annotations

import struct
import zlib

import cv2
import imageio.v3 as imageio
import numpy as np
import pytest
import skimage.data
import tifffile
from PIL import Image

from ditf.runtime.errors import InputError
from ditf.runtime.images import open_image

COLOUR = skimage.data.chelsea()[100:164, 120:216]
GREY = skimage.data.camera()[200:264, 200:296]


def opened(source) -> np.ndarray:
    return np.asarray(open_image(source)).astype(int)


def written(path, array):
    """Write an array in the file format of the path's suffix, with the library of its stem."""
    if path.stem == "opencv":
        assert cv2.imwrite(str(path), array if array.ndim == 2 else array[..., ::-1])
    elif path.stem == "tifffile":
        tifffile.imwrite(path, array)
    else:
        imageio.imwrite(path, array)
    return path


def refusal(source) -> InputError:
    with pytest.raises(InputError) as caught:
        open_image(source)
    return caught.value


FILES = ["opencv.png", "opencv.tiff", "opencv.jp2", "imageio.png", "tifffile.tif"]


@pytest.mark.parametrize("name", [*FILES, "opencv.pgm"])
def test_grey_that_fills_16_bits(tmp_path, name):
    path = written(tmp_path / name, GREY.astype(np.uint16) * 257)
    tolerance = 5 if path.suffix == ".jp2" else 0  # OpenCV's is lossy
    with Image.open(path) as image:
        for source in (path, image):
            np.testing.assert_allclose(opened(source), np.dstack([GREY] * 3), atol=tolerance)


@pytest.mark.parametrize("name", [*FILES[:3], "opencv.ppm", "tifffile.tif"])
def test_colour_that_fills_16_bits(tmp_path, name):
    path = written(tmp_path / name, COLOUR.astype(np.uint16) * 257)
    np.testing.assert_allclose(opened(path), COLOUR, atol=3 if path.suffix == ".jp2" else 0)


@pytest.mark.parametrize("bits", [8, 10, 12, 14])
@pytest.mark.parametrize("name", [*FILES, "opencv.pgm"])
def test_grey_of_fewer_bits_is_refused(tmp_path, name, bits):
    path = written(tmp_path / name, GREY.astype(np.uint16) << (bits - 8))
    with Image.open(path) as image:
        for source, called in ((path, str(path)), (image, "the image")):
            error = refusal(source)
            assert error.problem.startswith(f"{called} has values from")
            assert error.problem.endswith("on a scale of 0 to 65,535, so it would come out dark")
            assert f"value / {2**bits - 1} * 255" in error.fix


@pytest.mark.parametrize("bits", [8, 12, 14])
@pytest.mark.parametrize("name", [*FILES[:3], "opencv.ppm", "tifffile.tif"])
def test_colour_of_fewer_bits_is_refused(tmp_path, name, bits):
    path = written(tmp_path / name, COLOUR.astype(np.uint16) << (bits - 8))
    assert "on a scale of 0 to 65,535, so it would come out dark" in refusal(path).problem


def test_grey_and_colour_with_alpha(tmp_path):
    alpha = np.full((*GREY.shape, 1), 65535, np.uint16)
    full = np.concatenate([COLOUR.astype(np.uint16) * 257, alpha], 2)
    assert cv2.imwrite(str(tmp_path / "a.png"), cv2.cvtColor(full, cv2.COLOR_RGBA2BGRA))
    np.testing.assert_array_equal(opened(tmp_path / "a.png"), COLOUR)
    full[..., :3] = full[..., :3] // 16
    assert cv2.imwrite(str(tmp_path / "a.png"), full)
    with pytest.raises(InputError, match="come out dark"):
        open_image(tmp_path / "a.png")


def test_temperatures_are_refused(tmp_path):
    """Radiometric files hold hundredths of a kelvin: all of a room lies within a few thousand of 65,535."""
    kelvin = (29315 + GREY.astype(np.uint16) * 8).astype(np.uint16)
    for name in FILES:
        with pytest.raises(InputError, match="so it would come out flat") as caught:
            open_image(written(tmp_path / name, kelvin))
        assert "(value - 29" in caught.value.fix


@pytest.mark.parametrize("dtype", [np.int32, np.uint32, np.uint16, np.int16])
def test_values_of_8_bits_in_a_larger_type(dtype):
    with pytest.raises(InputError, match="values from 0 to 255 on a scale of 0 to 65,535"):
        open_image(Image.fromarray(np.tile(np.arange(256, dtype=dtype), (64, 1))))


def test_flat_images():
    """Black is black on any scale. Otherwise the value decides."""
    for value, expected in ((0, 0), (65535, 255), (257 * 80, 80)):
        assert opened(Image.new("I;16", (4, 4), value)).max() == expected
    for value in (200, 4095):
        with pytest.raises(InputError, match="come out dark"):
            open_image(Image.new("I;16", (4, 4), value))


def test_dark_images_of_8_bits_are_taken():
    np.testing.assert_array_equal(opened(Image.fromarray(COLOUR // 16)), COLOUR // 16)


def test_a_tiff_file_of_12_bits_states_its_scale(tmp_path):
    """Two pixels in three bytes. No Python package that is installed here packs them, so the test does."""
    values = (GREY.astype(np.uint16) << 4) | (GREY >> 4)
    pairs = values.reshape(-1, 2).astype(np.uint32)
    words = pairs[:, 0] << 12 | pairs[:, 1]
    packed = np.stack([words >> 16, words >> 8 & 255, words & 255], 1).astype(np.uint8).tobytes()
    height, width = GREY.shape
    tags = {256: width, 257: height, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: len(packed)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    header = struct.pack("<2sHI", b"II", 42, 8 + len(packed))
    (tmp_path / "a.tif").write_bytes(
        header + packed + struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)
    )
    np.testing.assert_array_equal(opened(tmp_path / "a.tif"), np.dstack([GREY] * 3))


def test_kinds_of_tiff_files_that_pillow_misreads(tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, GREY.astype(np.uint16) * 257, photometric="miniswhite")
    np.testing.assert_array_equal(opened(path), 255 - np.dstack([GREY] * 3))
    tifffile.imwrite(path, GREY, photometric="miniswhite")
    np.testing.assert_array_equal(opened(path), 255 - np.dstack([GREY] * 3))
    tifffile.imwrite(path, GREY.astype(np.int16) * 128)
    np.testing.assert_allclose(opened(path), np.dstack([GREY] * 3), atol=1)
    tifffile.imwrite(path, (GREY.astype(np.int16) - 128).astype(np.int8))
    with pytest.raises(InputError, match="signed 8-bit values"):
        open_image(path)
    planes = np.moveaxis(COLOUR.astype(np.uint16) * 257, 2, 0).copy()
    tifffile.imwrite(path, planes, photometric="rgb", planarconfig="separate")
    with pytest.raises(InputError, match="16-bit colours in separate planes"):
        open_image(path)


def test_floats_are_refused(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", (GREY / 255).astype(np.float32))
    with Image.open(tmp_path / "a.tif") as image:
        for source in (tmp_path / "a.tif", image):
            assert "float image of unknown range" in refusal(source).problem


@pytest.mark.parametrize("array", [GREY.astype(np.uint16), COLOUR.astype(np.uint16), COLOUR / 255.0, GREY])
def test_arrays_are_not_scaled(array):
    with pytest.raises(InputError, match=r"RGB uint8 \[H, W, 3\]") as caught:
        open_image(array)
    assert "scale other values to 0..255" in caught.value.fix


@pytest.mark.parametrize("channels", [1, 3])
def test_a_transparent_colour_of_16_bits_is_refused(tmp_path, channels):
    """Pillow compares it with 8 bits and finds no pixel, so that it would be ignored."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    path = written(tmp_path / "opencv.png", (GREY if channels == 1 else COLOUR).astype(np.uint16) * 257)
    content = path.read_bytes()
    colour = chunk(b"tRNS", b"\x12\x34" * channels)
    path.write_bytes(content[:33] + colour + content[33:])  # after the header
    with pytest.raises(InputError, match="16 bits and a transparent colour"):
        open_image(path)

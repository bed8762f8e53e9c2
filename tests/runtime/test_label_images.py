from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image

from ditf.runtime.errors import InputError
from ditf.runtime.label_images import read_label_image, write_label_image


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG file."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


LABELS = np.arange(12, dtype=np.uint8).reshape(3, 4) * 23


def test_indexed_labels_and_their_colours_survive(tmp_path):
    palette = bytes(range(256)) * 3
    write_label_image(tmp_path / "a.png", LABELS, palette)
    labels, colours = read_label_image(tmp_path / "a.png", (3, 4))
    np.testing.assert_array_equal(labels, LABELS)
    assert colours == palette


def test_a_palette_that_is_not_full(tmp_path):
    image = Image.fromarray(np.array([[0, 1]], np.uint8))
    image.putpalette([1, 2, 3, 4, 5, 6])
    image.save(tmp_path / "a.png")
    labels, colours = read_label_image(tmp_path / "a.png", (1, 2))
    assert labels.tolist() == [[0, 1]]
    assert colours[:6] == bytes([1, 2, 3, 4, 5, 6])
    assert len(colours) == 768


def test_grey_and_black_and_white(tmp_path):
    Image.fromarray(LABELS).save(tmp_path / "grey.png")
    labels, colours = read_label_image(tmp_path / "grey.png", (3, 4))
    np.testing.assert_array_equal(labels, LABELS)
    assert len({colours[i : i + 3] for i in range(0, 768, 3)}) == 256  # every label has its own
    Image.fromarray(LABELS > 50).save(tmp_path / "mask.png")
    np.testing.assert_array_equal(read_label_image(tmp_path / "mask.png", (3, 4))[0], LABELS > 50)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "F", "I;16"])
def test_other_pictures_are_refused(tmp_path, mode):
    Image.new(mode, (4, 3)).save(tmp_path / "a.tiff")
    with pytest.raises(InputError, match="not of labels"):
        read_label_image(tmp_path / "a.tiff", (3, 4))


def test_another_size_a_folder_and_a_broken_file_are_refused(tmp_path):
    write_label_image(tmp_path / "a.png", LABELS, bytes(768))
    with pytest.raises(InputError, match="has 4x3 pixels, the image 3x4"):
        read_label_image(tmp_path / "a.png", (4, 3))
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    for path in (tmp_path, tmp_path / "b.png"):
        with pytest.raises(InputError, match="not a readable picture of labels"):
            read_label_image(path, (3, 4))


def test_files_that_change_the_values_are_refused(tmp_path):
    Image.fromarray(LABELS).save(tmp_path / "lossy.jpg")
    with pytest.raises(InputError, match="is a JPEG, which does not keep values, not of labels"):
        read_label_image(tmp_path / "lossy.jpg", (3, 4))
    header = struct.pack(">IIBBBBB", 4, 1, 4, 0, 0, 0, 0)  # 4x1 pixels of grey with 4 bits
    data = zlib.compress(b"\0\x01\x23")
    chunks = ((b"IHDR", header), (b"IDAT", data), (b"IEND", b""))
    (tmp_path / "four.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*one) for one in chunks))
    with Image.open(tmp_path / "four.png") as image:
        assert np.asarray(image).tolist() == [[0, 17, 34, 51]]  # labels 0 to 3
    with pytest.raises(InputError, match="grey whose values Pillow scales or inverts"):
        read_label_image(tmp_path / "four.png", (1, 4))
    tifffile.imwrite(tmp_path / "white.tif", LABELS, photometric="miniswhite")
    with pytest.raises(InputError, match="grey whose values Pillow scales or inverts"):
        read_label_image(tmp_path / "white.tif", (3, 4))
    tifffile.imwrite(tmp_path / "black.tif", LABELS)
    np.testing.assert_array_equal(read_label_image(tmp_path / "black.tif", (3, 4))[0], LABELS)


def test_several_pictures_are_refused(tmp_path):
    frames = [Image.fromarray(LABELS + shift) for shift in (0, 1)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    with pytest.raises(InputError, match=r"a\.gif holds 2 pictures"):
        read_label_image(tmp_path / "a.gif", (3, 4))


def test_labels_are_turned_as_their_exif_data_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(LABELS).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_label_image(tmp_path / "a.png", (4, 3))[0], np.rot90(LABELS, -1))
